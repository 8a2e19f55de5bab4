"""World-model learning: Adam on the loss of PWM's Equation 10 (TD-MPC2's without its value terms), and validation.

A batch is a function of the step alone, so a run resumes exactly. The loss and its gradient: `model_gradient.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pwm_fast.data.episodes import EpisodeStore, WindowSampler
from pwm_fast.learning.configuration import PRECISIONS
from pwm_fast.learning.model_gradient import ModelGradient
from pwm_fast.learning.optim import Adam
from pwm_fast.models.matmul import fast_matmul
from pwm_fast.models.parameters import FlatParameters
from pwm_fast.models.world_model import WorldModel

BETAS = (0.9, 0.999)
VALIDATION_BATCH = 256


@dataclass(frozen=True)
class PretrainingConfig:
    """Defaults are PWM's and TD-MPC2's, but for the slower encoder and the late decay (see docs of `learning_rate`)."""

    steps: int = 10_000
    batch_size: int = 256
    horizon: int = 16
    learning_rate: float = 3e-4
    encoder_lr_scale: float = 0.3
    decay_fraction: float = 0.4
    final_lr_scale: float = 0.02
    rho: float = 0.99
    consistency_coef: float = 20.0
    reward_coef: float = 0.1
    termination_coef: float = 0.1
    grad_clip: float = 20.0
    precision: str = "fp32"  # "tf32": products on CUDA; "bf16": autocast, with float32 parameters and moments

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")


# One step at a time, with many different ones in a batch, teaches residual dynamics fastest: after four minutes each on
# the humanoid, windows of 4 gave a gradient cosine of 0.50 (measured as in bench/test_gradients.py), single steps 0.60.
PRESETS = {
    "simnorm": PretrainingConfig(),
    "observation": PretrainingConfig(batch_size=1024, horizon=1, learning_rate=1e-3),
}


@dataclass
class Windows:
    """A batch of H-step windows as tensors: obs [H+1, B, S], action [H, B, A], reward [H, B], terminated [H, B]."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    task: Tensor | None = None  # [B]
    valid: Tensor | None = None  # [H, B], 1 before the episode's end; None: all

    @staticmethod
    def of(batch: dict[str, np.ndarray], with_task: bool, device: str | torch.device = "cpu") -> Windows:
        as_tensor = lambda x: torch.as_tensor(x).to(device)  # noqa: E731
        return Windows(
            as_tensor(batch["obs"]),
            as_tensor(batch["action"]),
            as_tensor(batch["reward"]),
            as_tensor(batch["terminated"]).float(),
            as_tensor(batch["task"]).long() if with_task else None,
            as_tensor(batch["valid"]).float() if "valid" in batch else None,
        )


def fit_normalisation(model: WorldModel, statistics: dict[str, Any]) -> None:
    """Set observation mean and deviation, and the reward scale, from a store's statistics.

    Constant observation entries get deviation 1. A linear two-hot head clamps to [vmin, vmax], so 98% of the rewards
    fill half of that range and a policy better than the data still has room; symlog heads keep scale 1.
    """
    std = torch.as_tensor(statistics["obs_std"], dtype=torch.float32)
    model.obs_mean.copy_(torch.as_tensor(statistics["obs_mean"], dtype=torch.float32))
    model.obs_std.copy_(torch.where(std > 1e-4, std, torch.ones_like(std)))
    if not model.config.reward_symlog:
        quantiles = statistics["reward_quantiles"]
        largest = max(abs(quantiles["0.01"]), abs(quantiles["0.99"]), 1e-6)
        model.reward_scale.fill_(largest / (0.5 * model.config.vmax if model.config.num_bins > 1 else 1.0))


@torch.no_grad()
def fit_steps(model: WorldModel, windows: Windows) -> None:
    """Set mean and deviation of a step's change of the latent state, where the model predicts that."""
    if model.config.residual:
        z = model.encode(windows.obs, windows.task)
        change = (z[1:] - z[:-1]).flatten(0, 1)
        model.step_mean.copy_(change.mean(0))
        model.step_std.copy_(change.std(0).clamp(min=1e-4))


def rollout(model: WorldModel, windows: Windows) -> Tensor:
    """Open-loop latents z [H+1, B, Z] from the first observation under the recorded actions."""
    z = [model.encode(windows.obs[0], windows.task)]
    for action in windows.action:
        z.append(model.next(z[-1], action, windows.task))
    return torch.stack(z)


class Pretraining:
    """Adam on the clipped `ModelGradient`, with exact resume: state is the model, the optimiser and the step count.

    `batch(step)` returns the windows of a step; it must depend on the step alone.
    """

    def __init__(self, model: WorldModel, config: PretrainingConfig, batch: Callable[[int], Windows]):
        self.model, self.config, self.batch = model, config, batch
        self.step_count = 0
        parts = {True: {}, False: {}}  # the encoder's and the rest
        for name, p in model.named_parameters():
            parts[name.startswith("_encoder.")][name] = p
        self.parameters = [p for part in parts.values() for p in part.values()]
        self._adams = [
            (Adam(_flattened(part), 1, BETAS), config.encoder_lr_scale if encoder else 1.0)
            for encoder, part in parts.items()
            if part
        ]
        self._gradient = ModelGradient(model, torch.bfloat16 if config.precision == "bf16" else None)

    def learning_rate(self, step: int) -> float:
        """Constant, then linear decay over the last `decay_fraction` of the steps."""
        c = self.config
        start = (1.0 - c.decay_fraction) * c.steps
        progress = min(max((step - start) / max(c.steps - start, 1.0), 0.0), 1.0)
        return c.learning_rate * (1.0 + (c.final_lr_scale - 1.0) * progress)

    def step(self) -> dict[str, float]:
        """One gradient step; returns the loss terms and the gradient norm before clipping."""
        terms, norm = self.gradients(self.batch(self.step_count))
        if not torch.isfinite(norm):
            raise FloatingPointError(self.broken(norm.item(), self.step_count))
        self.update(norm.new_tensor(self.learning_rate(self.step_count), dtype=torch.float64), norm)
        self.step_count += 1
        return {**{k: v.item() for k, v in terms.items()}, "grad_norm": norm.item()}

    def broken(self, norm: float, step: int) -> str:
        """What to say of a gradient that is not finite."""
        return (
            f"world-model gradient is {norm} at step {step}: check the data for outliers, "
            f"or lower the learning rate ({self.config.learning_rate})"
        )

    def gradients(self, windows: Windows) -> tuple[dict[str, Tensor], Tensor]:
        """The loss's gradients, in the parameters' `.grad`; its terms, and the gradients' norm [] over all of them."""
        with fast_matmul(torch.float32, self.model.obs_mean.device, tf32=self.config.precision != "fp32"):
            terms = self._gradient(windows, self.config)
        return terms, torch.stack([torch.linalg.vector_norm(adam.grad) for adam, _ in self._adams]).norm()

    def update(self, rate: Tensor, norm: Tensor) -> None:
        """Clip by the norm and take Adam's step at learning rate [] float64; nothing where the norm is not finite."""
        finite = torch.isfinite(norm)[None]
        scale = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        for adam, share in self._adams:
            adam.grad *= scale
            adam.step((rate * share)[None].to(adam.value.dtype), math.inf, finite)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": [adam.state_dict() for adam, _ in self._adams],
            "step": self.step_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, in place: a captured step goes on with its tensors."""
        self.model.load_state_dict(state["model"])
        for (adam, _), saved in zip(self._adams, state["optimizer"], strict=True):
            adam.load_state_dict(saved)
        self.step_count = int(state["step"])


def _flattened(parameters: dict[str, nn.Parameter]) -> FlatParameters:
    """The parameters' values and gradients moved into two rows of memory, of which they become views."""
    first = next(iter(parameters.values()))
    flat = FlatParameters(1, {name: tuple(p.shape) for name, p in parameters.items()}, first.dtype, first.device)
    for name, p in parameters.items():
        flat[name][0] = p.detach()
        p.data, p.grad = flat[name][0], flat.grads[name][0]
    return flat


def store_batches(
    store: EpisodeStore,
    episodes: np.ndarray | None,
    config: PretrainingConfig,
    seed: int,
    with_task: bool,
    partial: bool = True,
    device: str | torch.device = "cpu",
) -> Callable[[int], Windows]:
    """Windows that start anywhere in some episodes of a store, a pure function of (seed, step)."""
    sampler = WindowSampler(store, config.horizon, episodes=episodes, seed=seed, partial=partial)
    return lambda step: Windows.of(sampler.windows(step, config.batch_size), with_task, device)


@torch.no_grad()
def validate(model: WorldModel, batches: list[Windows], endings: list[Windows]) -> dict[str, float]:
    """Open-loop quality on held-out windows: `batches` are whole, `endings` may meet their episodes' ends.

    `latent_error`: mean squared error of z_H over the variance of the encodings (0 is perfect, 1 is the mean's);
    `return_r2`: R^2 of the summed H-step reward; `reward_mae` per step; `termination_auc` where there is a head.
    """
    errors, encodings, predicted, actual, step_error, logits, ended = [], [], [], [], [], [], []
    for w in batches:
        z, goal = rollout(model, w), model.encode(w.obs[-1], w.task)
        errors.append((z[-1] - goal).square().mean(0))
        encodings.append(goal)
        reward = model.reward(z[:-1], w.action, w.task)
        predicted.append(reward.sum(0))
        actual.append(w.reward.sum(0))
        step_error.append((reward - w.reward).abs().mean())
    for w in endings if model.has_termination else []:
        logit = model.termination_logit(rollout(model, w)[1:], w.task)
        valid = torch.ones_like(logit) if w.valid is None else w.valid
        logits.append(logit[valid > 0])
        ended.append(w.terminated[valid > 0])
    variance = torch.cat(encodings).var(0, unbiased=False)
    p, a = torch.cat(predicted), torch.cat(actual)
    out = {
        "latent_error": (torch.stack(errors).mean(0).sum() / variance.sum()).item(),
        "return_r2": (1.0 - (p - a).square().mean() / a.var(unbiased=False).clamp(min=1e-12)).item(),
        "reward_mae": torch.stack(step_error).mean().item(),
    }
    if logits and 0 < torch.cat(ended).sum() < torch.cat(ended).numel():
        out["termination_auc"] = _auc(torch.cat(logits), torch.cat(ended))
    return out


def _auc(score: Tensor, label: Tensor) -> float:
    """Area under the ROC curve, from ranks."""
    rank = torch.empty_like(score)
    rank[score.argsort()] = torch.arange(1, len(score) + 1, dtype=score.dtype)
    positives = label.sum()
    area = rank[label > 0].sum() - positives * (positives + 1) / 2
    return (area / (positives * (len(label) - positives))).item()


class StoreTraining:
    """Everything of a pre-training run on one store: split, normalisation, batches, validation.

    `validation_fraction` of the episodes, shuffled, is held out; validation windows are the same at every call and
    `validation_horizon` steps long, whatever the training's.
    """

    def __init__(
        self,
        store: EpisodeStore,
        model: WorldModel,
        config: PretrainingConfig,
        seed: int = 0,
        validation_fraction: float = 0.05,
        validation_batches: int = 4,
        validation_horizon: int = 16,
    ):
        if store.obs_dim != model.config.obs_dim or store.action_dim != model.config.action_dim:
            raise ValueError(
                f"the store has {store.obs_dim} observations and {store.action_dim} actions, the world model "
                f"{model.config.obs_dim} and {model.config.action_dim}"
            )
        self.statistics = store.statistics()
        training, held_out = store.split(validation_fraction, seed)
        fit_normalisation(model, self.statistics)
        with_task = model.config.num_tasks > 0
        device = model.obs_mean.device
        batches = store_batches(store, training, config, seed, with_task, device=device)
        self.pretraining = Pretraining(model, config, batches)
        looking = replace(config, horizon=validation_horizon, batch_size=VALIDATION_BATCH)
        whole = store_batches(store, held_out, looking, seed + 1, with_task, partial=False, device=device)
        anywhere = store_batches(store, held_out, looking, seed + 1, with_task, device=device)
        fit_steps(model, Windows.of(WindowSampler(store, 1, training, seed).windows(0, 65_536), with_task, device))
        self._validation = [whole(i) for i in range(validation_batches)]
        self._endings = [anywhere(i) for i in range(validation_batches)]

    def validate(self) -> dict[str, float]:
        return validate(self.pretraining.model, self._validation, self._endings)
