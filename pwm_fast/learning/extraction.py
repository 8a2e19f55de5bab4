"""Policy extraction: P policies at once, by first-order gradients through a frozen world model (PWM, Algorithm 1).

One step is: imagine, update the actors, update the critics. Everything is a tensor on one device; a step reads nothing
back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pwm_fast.kernels import td_lambda
from pwm_fast.kernels.gemm import huge_copy
from pwm_fast.learning import noise as counter_noise
from pwm_fast.learning.configuration import PRECISIONS, PRESETS, ExtractionConfig, preset
from pwm_fast.learning.imagination import Imagination, Rollout
from pwm_fast.learning.native_critics import NativeCritics
from pwm_fast.learning.optim import Adam, linear_schedule
from pwm_fast.learning.returns import ReturnStatistics, imagined_return
from pwm_fast.models.critic import VALUE_ROWS, Critic
from pwm_fast.models.matmul import fast_matmul
from pwm_fast.models.policy import FORMAT, Actor, Policy
from pwm_fast.models.workspace import Workspace
from pwm_fast.models.world_model import FrozenLayer, FrozenWorldModel, WorldModel, WorldModelConfig
from pwm_fast.profiling import span

__all__ = ["PRESETS", "CriticRows", "Extraction", "ExtractionConfig", "preset"]


class CriticRows(NamedTuple):
    """What a step's critics learn from, time-major within a policy."""

    latents: Tensor  # [P, H * B, Z]
    targets: Tensor  # [P, H * B]


class CriticEpochs(Protocol):
    """All of a step's minibatch updates of the critics at once, in place: the place of a kernel."""

    def __call__(self, rows: CriticRows, orders: Tensor, lr: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From `orders` [P, epochs, rows], rates and active policies [P]: mean loss, last norm, still active [P]."""


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


class Extraction:
    """P actors and P x K critics on one frozen world model.

    `task_ids` [P] are the world model's task indices (None: it has no embedding); `seeds` [P] determine everything a
    policy draws (initial weights, noise, minibatch order), whoever shares the batch. `tasks` [P] are names for files.
    `dims` [P] are the tasks' own (observation, action) sizes where the world model's are padded to its widest task's:
    actions beyond are 0, and finished policies take and give what the task has.
    `precision`: "fp32"; "tf32" for the matrix products on CUDA and on AMX; "bf16" for dynamics, reward and termination
    networks in bfloat16, the latents, actors, critics and optimisers staying float32 (with products as of "tf32"). On
    the native backend "bf16" rounds the factors of those networks' products only.
    A policy whose loss or gradient stops being finite is frozen as it was before that update and marked in `diverged`.
    """

    world_config: WorldModelConfig
    imagination: Imagination

    def __init__(
        self,
        world_model: WorldModel,
        config: ExtractionConfig = PRESETS["paper"],
        task_ids: Sequence[int] | Tensor | None = None,
        seeds: Sequence[int] = (0,),
        total_steps: int = 10_000,
        tasks: Sequence[str] | None = None,
        precision: str = "fp32",
        dims: Sequence[tuple[int, int]] | None = None,
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.config, self.precision = config, precision
        self.seeds = [int(seed) for seed in seeds]
        self.policies_count = len(self.seeds)
        self.tasks = list(tasks) if tasks is not None else ["unknown"] * len(self.seeds)
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"seeds must be one integer >= 0 per policy, got {self.seeds}")
        if len(self.tasks) != len(self.seeds):
            raise ValueError(f"tasks must name {len(self.seeds)} policies, got {len(self.tasks)}")
        self.task_ids = None if task_ids is None else torch.as_tensor(task_ids, dtype=torch.int64)
        self.dims = None if dims is None else [(int(s), int(a)) for s, a in dims]
        if self.dims is not None and len(self.dims) != len(self.seeds):
            raise ValueError(f"dims must give the sizes of {len(self.seeds)} policies, got {len(self.dims)}")
        if self.task_ids is not None and self.task_ids.shape != (len(self.seeds),):
            raise ValueError(f"task_ids must have shape ({len(self.seeds)},), got {tuple(self.task_ids.shape)}")
        self.set_world_model(world_model)
        like = self.imagination.encoder.layers[0].weight
        self._dtype, self._device = like.dtype, like.device
        self._schedule_length = torch.zeros((), dtype=torch.float64, device=self._device)
        self.set_total_steps(total_steps)
        c, w = config, world_model.config
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.actor = Actor(self.seeds, w.latent_dim, w.action_dim, c.actor_units, **options)
        if self.dims is not None:
            if wrong := [d for d in self.dims if not (0 < d[0] <= w.obs_dim and 0 < d[1] <= w.action_dim)]:
                raise ValueError(f"dims must be within the world model's {(w.obs_dim, w.action_dim)}, got {wrong[0]}")
            self.actor.restrict([action_dim for _, action_dim in self.dims])
        self.critic = Critic(self.seeds, w.latent_dim, c.num_critics, c.critic_units, **options)
        self.actor_adam = Adam(self.actor.parameters, len(self.seeds), c.betas)
        self.critic_adam = Adam(self.critic.parameters, len(self.seeds), c.betas)
        self.average = self.actor.parameters.flat.clone()  # [P, n]: the actors, averaged over their last steps
        self._workspace = Workspace()
        self.critic_epochs: CriticEpochs | None = None
        self._native_critics = NativeCritics(self.critic, self.critic_adam, c)
        self.return_statistics = ReturnStatistics(len(self.seeds), **options)
        self.iteration = torch.zeros((), dtype=torch.int64, device=self._device)
        self.diverged = torch.zeros(len(self.seeds), dtype=torch.bool, device=self._device)
        self.seed_tensor = torch.tensor(self.seeds, dtype=torch.int64, device=self._device)

    def set_world_model(self, world_model: WorldModel) -> None:
        """Go on with another (fine-tuned) world model of the same shape; actors, critics and optimisers stay.

        Its weights are copied to where the old ones lie.
        """
        tasks = None if self.task_ids is None else self.task_ids.to(world_model.obs_mean.device)
        frozen: FrozenWorldModel = world_model.frozen(tasks)
        if not hasattr(self, "world_config"):
            dtype = torch.bfloat16 if self.precision == "bf16" else None
            self.world_config = world_model.config
            self.imagination = Imagination(frozen, self.config.terminations, dtype)
        elif self.world_config != world_model.config:
            raise ValueError(f"world model must keep its shape {self.world_config}, got {world_model.config}")
        else:
            self.imagination.load(frozen)

    def set_total_steps(self, total_steps: int) -> None:
        """Length of the learning-rate schedule in steps, counted from the first."""
        if total_steps < 1:
            raise ValueError(f"steps must be >= 1, got {total_steps}")
        self.total_steps = total_steps
        self._schedule_length.fill_(total_steps)

    @torch.no_grad()
    def step(self, start_obs: Tensor | np.ndarray, noise: Tensor | None = None) -> dict[str, Tensor]:
        """One gradient step of all policies from raw observations [P, B, S]; returns metrics [P] on the device.

        `noise` [P, H, B, A] replaces the counter-based action noise (for comparisons).
        """
        c = self.config
        obs = torch.as_tensor(start_obs).to(self._device, self._dtype)
        expected = (self.policies_count, c.batch_size, self.world_config.obs_dim)
        if tuple(obs.shape) != expected:
            raise ValueError(f"start observations must be [P, B, S] = {expected}, got {tuple(obs.shape)}")
        if noise is None:
            noise = self.action_noise(self.iteration)
        with self.arithmetic():
            self.actor.clamp_log_std(c.min_log_std)
            return self._learn(self.imagination.rollout(self.actor, obs, noise))

    def arithmetic(self) -> AbstractContextManager[None]:
        """Every step's matrix products run inside."""
        return fast_matmul(self._dtype, self._device, tf32=self.precision != "fp32")

    def action_noise(self, step: Tensor) -> Tensor:
        """The actors' noise [P, H, B, A] of gradient step number `step` [] int64."""
        c = self.config
        shape = (c.horizon, c.batch_size, self.world_config.action_dim)
        noise = counter_noise.normal(self.seed_tensor, step, counter_noise.ACTION_NOISE, shape, self._dtype)
        return noise if self.actor.mask is None else noise * self.actor.mask[:, None]

    @torch.no_grad()
    def step_along(
        self, obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        """One gradient step along the policies' own real trajectories (`Imagination.along`); metrics as of `step`.

        obs [H+1, P, B, S], action [H, P, B, A]; reward, terminated and valid (before the episode's end) [H, P, B].
        """
        c = self.config
        expected = (c.horizon + 1, self.policies_count, c.batch_size, self.world_config.obs_dim)
        if tuple(obs.shape) != expected:
            raise ValueError(f"windows must have observations [H+1, P, B, S] = {expected}, got {tuple(obs.shape)}")
        with self.arithmetic():
            self.actor.clamp_log_std(c.min_log_std)
            obs, action, reward, terminated = (
                x.to(self._device, self._dtype) for x in (obs, action, reward, terminated)
            )
            rollout = self.imagination.along(self.actor, obs, action, reward, 1 - terminated)
            return self._learn(rollout, valid.to(self._device))

    def _learn(self, rollout: Rollout, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Update actors and critics from a rollout; where `valid` [H, P, B] is false critics have nothing to learn."""
        metrics, rows = self.learn_actor(rollout, valid)
        metrics |= self.learn_critics(rows)
        self.iteration += 1
        return metrics

    def learn_actor(self, rollout: Rollout, valid: Tensor | None = None) -> tuple[dict[str, Tensor], CriticRows]:
        """The first half of a step: update the actors. Metrics, and what the critics are to learn."""
        metrics, next_values = self.update_actor(rollout)
        targets = self.targets(rollout, next_values)
        if valid is not None:  # what lies beyond an episode's end keeps its value
            targets[1:] = torch.where(valid[1:], targets[1:], next_values[:-1])
        return metrics, self._rows(rollout, targets)

    def learning_rate(self, start: float) -> Tensor:
        """The scheduled rate [P] at the present step for one that starts at `start`."""
        rate = linear_schedule(self.iteration, start, self.config.final_lr, self._schedule_length)
        return rate.to(self._dtype).expand(self.policies_count)

    def update_actor(self, rollout: Rollout) -> tuple[dict[str, Tensor], Tensor]:
        """Ascend the imagined return. Returns metrics and min_k V(z_{h+1}) [H, P, B]."""
        c = self.config
        horizon, policies, batch = rollout.reward.shape
        latents = rollout.latents[:, 1:].reshape(policies, horizon * batch, -1)
        values = self.critic.values(latents, self._workspace).amin(1)  # [P, H * B]
        next_values = values.view(policies, horizon, batch).transpose(0, 1)
        returns = imagined_return(
            rollout.reward, rollout.continues, next_values[-1], c.gamma, c.terminal_discount_offset
        )
        active = ~self.diverged & torch.isfinite(returns.value).all(1)
        if c.return_normalisation:
            self.return_statistics.update(-returns.value, active)
            divisor = self.return_statistics.scale()
        else:
            divisor = torch.full_like(returns.value[:, 0], horizon)
        loss = -returns.value.mean(1) / divisor
        weight = (-1 / (batch * divisor))[:, None]  # dL / d return, [P, 1]

        last_values, saved = self.critic.forward(rollout.latents[:, horizon], self._workspace)  # [P, K, B]
        d_values = torch.zeros_like(last_values)
        d_values.scatter_(1, last_values.argmin(1, keepdim=True), (weight * returns.d_last)[:, None])
        d_last = self.critic.input_gradient(d_values, saved)
        self.imagination.backward(
            self.actor,
            rollout,
            weight * returns.d_reward,
            None if returns.d_continues is None else weight * returns.d_continues,
            d_last,
            c.detach_actor_input,
        )
        with span("actor update"):
            rate = self.learning_rate(c.actor_lr) * (self.iteration >= c.actor_delay)
            norm = self.actor_adam.step(rate, c.actor_max_norm, active)
            self.diverged |= ~(active & torch.isfinite(norm))
        self.average.lerp_(self.actor.parameters.flat, 1 - c.actor_average)
        metrics = {
            "actor_loss": loss,
            "actor_grad_norm": norm,
            "imagined_return": returns.value.mean(1),
            "imagined_reward": rollout.reward.mean((0, 2)),
            "value": values.mean(1),
            "action_std": self.actor.parameters["log_std"].exp().mean(1),
        }
        if rollout.continues is not None:
            metrics["survival"] = rollout.continues.prod(0).mean(1)
        return metrics, next_values

    @span("targets")
    def targets(self, rollout: Rollout, next_values: Tensor) -> Tensor:
        """TD(lambda) targets [H, P, B] of z_0 .. z_{H-1} (PWM Eq. 7-9), from the values before any update."""
        c = self.config
        return td_lambda.returns(rollout.reward, next_values, rollout.continues, c.gamma, c.td_lambda)

    def update_critic(self, rollout: Rollout, targets: Tensor) -> dict[str, Tensor]:
        """Epochs of minibatch regression of all critics on targets [H, P, B]. Returns metrics."""
        return self.learn_critics(self._rows(rollout, targets))

    @staticmethod
    def _rows(rollout: Rollout, targets: Tensor) -> CriticRows:
        return CriticRows(rollout.latents[:, :-1].flatten(1, 2), targets.transpose(0, 1).flatten(1))

    @span("critic")
    def learn_critics(self, rows: CriticRows) -> dict[str, Tensor]:
        """The second half of a step, which leaves actors and world model alone. Metrics."""
        c = self.config
        lr = self.learning_rate(c.critic_lr)
        active = ~self.diverged
        epochs = self.critic_epochs or (self._native_critics if self._native_critics.available() else None)
        if epochs is not None:
            loss, norm, active = epochs(rows, self._orders(rows.latents.shape[1]), lr, active)
            self.diverged |= ~active
            return {"critic_loss": loss, "critic_grad_norm": norm, "target": rows.targets.mean(1)}
        total = torch.zeros_like(lr)
        for latents, target in self._minibatches(*rows):
            loss, norm = self._regress(latents, target[:, None], lr, active)
            total = total + loss
            active = active & (norm < torch.inf)  # false for NaN, and one operation where isfinite is four
        self.diverged |= ~active
        return {
            "critic_loss": total / (c.critic_epochs * c.critic_minibatches),
            "critic_grad_norm": norm,
            "target": rows.targets.mean(1),
        }

    def _regress(self, latents: Tensor, target: Tensor, lr: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """One step of all critics on latents [P, R, Z], targets [P, 1, R]; squared error and gradient norm [P]."""
        values, saved = self.critic.forward(latents, self._workspace)
        error = values - target
        loss = error.square().mean((1, 2))
        self.critic.backward(error.mul_(2 / (self.config.num_critics * target.shape[2])), saved, self._workspace)
        return loss, self.critic_adam.step(lr, self.config.critic_max_norm, active)

    @torch.no_grad()
    def fit_critics(
        self, obs: Sequence[Tensor], target: Sequence[Tensor], steps: int = 400, batch: int = 256
    ) -> Tensor:
        """Regress given values before the first step: per policy obs [N, S] and target [N]; the last loss [P].

        Bootstrapping from untrained critics takes hundreds of steps to reach values of hundreds; returns of real
        episodes of the same policy put them there at once, by least squares in the last layers and then by gradient.
        """
        padded = pad_sequence(list(obs), True), pad_sequence(list(target), True)
        there = pad_sequence([torch.ones(len(rows)) for rows in obs], True)
        parts = zip(*(x.to(self._device, self._dtype).split(VALUE_ROWS, 1) for x in (*padded, there)))
        self.critic.fit_last_layers((self.imagination.encoder.forward(rows)[0], *rest) for rows, *rest in parts)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        active, lr, loss = ~self.diverged, self.learning_rate(self.config.critic_lr), torch.zeros(len(self.seeds))
        for _ in range(steps):
            picks = [torch.randint(len(o), (batch,), generator=g) for o, g in zip(obs, generators)]
            rows = torch.stack([o[i] for o, i in zip(obs, picks)]).to(self._device, self._dtype)
            value = torch.stack([t[i] for t, i in zip(target, picks)]).to(self._device, self._dtype)
            loss, _ = self._regress(self.imagination.encoder.forward(rows)[0], value[:, None], lr, active)
        return loss

    def _minibatches(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents [P, R, Z] and targets [P, R] of every critic step, from `CriticRows`.

        Fixed contiguous blocks, or a new order in each epoch.
        """
        c = self.config
        if not c.shuffle:
            blocks = list(zip(x.tensor_split(c.critic_minibatches, 1), y.tensor_split(c.critic_minibatches, 1)))
            yield from blocks * c.critic_epochs
            return
        policies, rows, _ = x.shape
        orders = self._orders(rows) + torch.arange(policies, device=self._device)[:, None, None] * rows
        flat, place = x.reshape(policies * rows, -1), self._workspace.tensor("shuffled", x, *x.shape)
        for order in orders.unbind(1):
            torch.index_select(flat, 0, order.reshape(-1), out=place.view_as(flat))
            shuffled = y.reshape(-1)[order]
            yield from zip(place.tensor_split(c.critic_minibatches, 1), shuffled.tensor_split(c.critic_minibatches, 1))

    def _orders(self, rows: int) -> Tensor:
        """The order of a policy's rows in each of the critics' epochs: int64 [P, epochs, rows]."""
        c = self.config
        if not c.shuffle:
            return torch.arange(rows, device=self._device).expand(self.policies_count, c.critic_epochs, -1)
        return counter_noise.permutations(
            self.seed_tensor, self.iteration, counter_noise.MINIBATCH_ORDER, c.critic_epochs, rows
        )

    def policies(self, averaged: bool = False) -> list[Policy]:
        """The policies as they are now, or averaged over their last steps; copies that share one encoder's weights."""
        encoder = [
            FrozenLayer(huge_copy(s.weight), s.bias.clone(), s.activation, _copy(s.ln_weight), _copy(s.ln_bias))
            for s in self.imagination.encoder.layers
        ]
        out, rows, w = [], self.average if averaged else self.actor.parameters.flat, self.world_config
        last = f"{self.actor.mlp.depth - 1}."
        for i, task in enumerate(self.tasks):
            obs_dim, action_dim = self.dims[i] if self.dims is not None else (w.obs_dim, w.action_dim)
            layers = [replace(s, bias=s.bias[i if len(s.bias) > 1 else 0][None]) for s in encoder]
            layers[0] = replace(layers[0], weight=layers[0].weight[:, :obs_dim])  # what pads an observation is 0
            actor = Actor([0], w.latent_dim, action_dim, self.config.actor_units, self._dtype, self._device)
            for name, value in self.actor.parameters.of(rows[i]).items():
                own = name.startswith(last) or name == "log_std"
                actor.parameters[name][0].copy_(value[:action_dim] if own else value)
            out.append(Policy(layers, actor, self._describe(i, task, obs_dim, action_dim)))
        return out

    def _describe(self, policy: int, task: str, obs_dim: int, action_dim: int) -> dict[str, Any]:
        w = self.world_config
        return {
            "format": FORMAT,
            "task": task,
            "seed": self.seeds[policy],
            "obs_dim": obs_dim,
            "action_dim": action_dim,
            "latent_dim": w.latent_dim,
            "encoder_units": [s.weight.shape[0] for s in self.imagination.encoder.layers[:-1]],
            "actor_units": list(self.config.actor_units),
            "simnorm_dim": w.simnorm_dim,
            "latent": w.latent,
            "architecture": "encoder: "
            + ("Linear; " if w.residual else "Linear-LayerNorm-Mish, last Linear-LayerNorm-SimNorm; ")
            + "actor: Linear-Mish-LayerNorm, last Linear, tanh",
            "normalisation": "observations are raw; their mean and standard deviation are folded into encoder.0",
            "steps": int(self.iteration),
            "versions": {"torch": torch.__version__},
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a later process needs to go on as if nothing had happened (tensors and plain values)."""
        return {
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()},
            "seeds": list(self.seeds),
            "total_steps": self.total_steps,
            "iteration": self.iteration.clone(),
            "diverged": self.diverged.clone(),
            "actor": self.actor.parameters.flat.clone(),
            "average": self.average.clone(),
            "critic": self.critic.parameters.flat.clone(),
            "actor_adam": self.actor_adam.state_dict(),
            "critic_adam": self.critic_adam.state_dict(),
            "return_statistics": self.return_statistics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; raises ValueError if it belongs to another configuration, population or shape."""
        mine = self.state_dict()
        if missing := sorted(set(mine) - set(state)):
            raise ValueError(f"the extraction state lacks {', '.join(missing)}")
        for name in ("config", "seeds"):
            if mine[name] != state[name]:
                raise ValueError(f"the extraction state has {name} {state[name]}, this run has {mine[name]}")
        for name in ("actor", "average", "critic"):
            if mine[name].shape != state[name].shape:
                raise ValueError(
                    f"the extraction state's {name} has shape {tuple(state[name].shape)}, "
                    f"this run's {tuple(mine[name].shape)}"
                )
        self.set_total_steps(int(state["total_steps"]))
        self.iteration.copy_(state["iteration"])
        self.diverged.copy_(state["diverged"])
        self.actor.parameters.flat.copy_(state["actor"])
        self.average.copy_(state["average"])
        self.critic.parameters.flat.copy_(state["critic"])
        self.actor_adam.load_state_dict(state["actor_adam"])
        self.critic_adam.load_state_dict(state["critic_adam"])
        self.return_statistics.load_state_dict(state["return_statistics"])
