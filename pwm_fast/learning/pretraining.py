"""World-model learning: Adam on the loss of PWM's Equation 10 (TD-MPC2's without its value terms).

A batch is a function of the step alone, so a run resumes exactly. The loss and its gradient: `model_gradient.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pwm_fast.learning.configuration import PRECISIONS
from pwm_fast.learning.model_gradient import ModelGradient
from pwm_fast.learning.optim import Adam
from pwm_fast.models.matmul import fast_matmul
from pwm_fast.models.parameters import FlatParameters
from pwm_fast.models.world_model import WorldModel

BETAS = (0.9, 0.999)


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
        return Windows(
            torch.as_tensor(batch["obs"]),
            torch.as_tensor(batch["action"]),
            torch.as_tensor(batch["reward"]),
            torch.as_tensor(batch["terminated"]).float(),
            torch.as_tensor(batch["task"]).long() if with_task else None,
            torch.as_tensor(batch["valid"]).float() if "valid" in batch else None,
        ).to(device)

    def to(self, device: str | torch.device) -> Windows:
        """The same on `device`; views of the same memory where they are there already."""
        return self.map(lambda value: value.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Windows:
        """What `function` makes of each tensor that is there."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        done: dict[str, Any] = {name: None if value is None else function(value) for name, value in parts.items()}
        return Windows(**done)


class Pretraining:
    """Adam on the clipped `ModelGradient`, with exact resume: state is the model, the optimiser and the step count.

    `batch(step)` returns the windows of a step, on any device; it must depend on the step alone.
    """

    def __init__(self, model: WorldModel, config: PretrainingConfig, batch: Callable[[int], Windows]):
        self.model, self.config, self.batch = model, config, batch
        self.step_count = 0
        parts: dict[bool, dict[str, nn.Parameter]] = {True: {}, False: {}}  # the encoder's and the rest
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
        terms, norm = self.gradients(self.batch(self.step_count).to(self.model.obs_mean.device))
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
