"""Model predictive path integral control as TD-MPC2 plans (Hansen et al. 2024, section 3.3), for any way to score
action sequences: a world model (`tdmpc2_planning`) or a simulator (`physics_planning`).

An iteration draws sequences around a mean, scores all of them, and refits mean and deviation to the best ones, weighted
by exp(temperature * (score - best score)). The next step's plan starts from this one's, moved on by a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
"""Action sequences [N, K, H, A] -> their values [N, K]."""


@dataclass(frozen=True)
class MPPIConfig:
    """TD-MPC2's published settings. `policy_trajectories` of the samples come from the policy prior, where there is
    one. Raises ValueError for settings that cannot be met."""

    horizon: int = 3
    samples: int = 512
    elites: int = 64
    iterations: int = 6
    policy_trajectories: int = 24
    temperature: float = 0.5
    min_std: float = 0.05
    max_std: float = 2.0

    def __post_init__(self) -> None:
        for name in ("horizon", "samples", "elites", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.elites <= self.samples:
            raise ValueError(f"elites must be <= samples {self.samples}, got {self.elites}")
        if not 0 <= self.policy_trajectories < self.samples:
            raise ValueError(
                f"policy_trajectories must be from 0 to samples - 1 = {self.samples - 1}, got "
                f"{self.policy_trajectories}"
            )
        if not 0 < self.min_std <= self.max_std or not math.isfinite(self.max_std):
            raise ValueError(f"0 < min_std <= max_std must hold, got {self.min_std} and {self.max_std}")
        if not self.temperature > 0 or not math.isfinite(self.temperature):
            raise ValueError(f"temperature must be > 0 and finite, got {self.temperature}")

    @staticmethod
    def published(action_dim: int) -> MPPIConfig:
        """TD-MPC2's: two more iterations from 20 actions on."""
        return MPPIConfig(iterations=8 if action_dim >= 20 else 6)


def with_samples(config: MPPIConfig, samples: int | None = None, horizon: int | None = None) -> MPPIConfig:
    """Another number of sequences, with as large shares of elites and of the policy's trajectories, or a horizon."""
    share = (samples or config.samples) / config.samples
    return replace(
        config,
        samples=samples or config.samples,
        elites=max(round(config.elites * share), 1),
        policy_trajectories=int(config.policy_trajectories * share),
        horizon=horizon or config.horizon,
    )


class MPPI:
    """Plans of N environments at once; what it draws depends on `seed` and the calls so far.

    `action_mask` [N or 1, A] is 0 at entries that an environment does not have: they stay 0.
    """

    def __init__(
        self,
        config: MPPIConfig,
        num_envs: int,
        action_dim: int,
        seed: int = 0,
        action_mask: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self.config, self._options = config, {"dtype": dtype, "device": device}
        self.generator = torch.Generator(device).manual_seed(seed)
        self._mean = torch.zeros(num_envs, config.horizon, action_dim, **self._options)  # type: ignore[call-overload]
        self._mask = None if action_mask is None else action_mask.to(self._mean)[:, None]  # [N or 1, 1, A]

    def reset(self, ended: Tensor | None = None) -> None:
        """Forget the plans of the environments [N] that begin an episode (all of them by default)."""
        self._mean[slice(None) if ended is None else ended] = 0.0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, **self._options)  # type: ignore[call-overload]

    @torch.no_grad()
    def plan(self, score: Score, prior: Tensor | None = None, explore: bool = False) -> Tensor:
        """The actions [N, A] to take now.

        `prior` [N, P, H, A] are the policy's trajectories, drawn once and scored in every iteration; `explore` adds
        noise of the plan's own deviation. Raises ValueError where no sequence of an environment has a finite value.
        """
        c = self.config
        mean = torch.cat([self._mean[:, 1:], torch.zeros_like(self._mean[:, :1])], 1)
        std = torch.full_like(mean, c.max_std)
        envs, horizon, width = mean.shape
        drawn = c.samples - (0 if prior is None else prior.shape[1])
        for _ in range(c.iterations):
            noise = self.normal(envs, drawn, horizon, width)
            actions = torch.addcmul(mean[:, None], std[:, None], noise).clamp_(-1.0, 1.0)  # [N, K, H, A]
            if prior is not None:
                actions = torch.cat([prior, actions], 1)
            if self._mask is not None:
                actions = actions * self._mask[:, None]
            elites, weights = self._elites(actions, score(actions))
            mean = (weights[..., None, None] * elites).sum(1)
            spread = (weights[..., None, None] * (elites - mean[:, None]).square()).sum(1)
            std = spread.sqrt().clamp(c.min_std, c.max_std)
        self._mean = mean
        chosen = torch.multinomial(weights, 1, generator=self.generator)  # what a Gumbel maximum draws
        first = elites[torch.arange(envs, device=elites.device), chosen[:, 0], 0]  # [N, A]
        if explore:
            first = first + std[:, 0] * self.normal(envs, width)
        if self._mask is not None:
            first = first * self._mask[:, 0]
        return first.clamp(-1.0, 1.0)

    def _elites(self, actions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The best sequences [N, E, H, A] and their weights [N, E], which sum to 1."""
        values = torch.where(values.isfinite(), values, -torch.inf)
        best, index = values.topk(self.config.elites, 1)
        if not best[:, 0].isfinite().all():
            bad = int((~best[:, 0].isfinite()).nonzero()[0])
            raise ValueError(
                f"no action sequence of environment {bad} has a finite value: its observation, or the model, holds "
                "NaN or infinite numbers"
            )
        elites = actions.gather(1, index[..., None, None].expand(-1, -1, *actions.shape[2:]))
        return elites, torch.softmax(self.config.temperature * best, 1)
