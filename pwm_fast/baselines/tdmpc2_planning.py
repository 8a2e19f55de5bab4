"""TD-MPC2's planning on a world model: what a policy extracted from the same model is compared with.

The value of an action sequence is the discounted sum of the model's rewards over the horizon, and behind it the value
of the state reached; a policy prior draws some of the sequences. Prior and value are a `Guide` (`guides.py`): TD-MPC2's
own policy and Q functions, or the actor and critics of an extraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pwm_fast.baselines.guides import Guide
from pwm_fast.baselines.mppi import MPPI, MPPIConfig
from pwm_fast.models.frozen import FrozenNetwork
from pwm_fast.models.matmul import fast_matmul
from pwm_fast.models.workspace import Workspace
from pwm_fast.models.world_model import WorldModel

DISCOUNT_RANGE = (0.95, 0.995)


def published_discount(episode_length: int) -> float:
    """TD-MPC2's discount of a task: 1 - 5 / T within [0.95, 0.995] (0.99 for 500 steps, 0.95 for 100)."""
    low, high = DISCOUNT_RANGE
    return min(max(1.0 - 5.0 / episode_length, low), high)


class LatentModel(Protocol):
    """What MPPI needs of a model: `WorldModelDynamics`, or one whose optimum is known."""

    def encode(self, obs: Tensor) -> Tensor:
        """Latents [N, 1, Z] of raw observations [N, S]."""

    def step(self, z: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Next latents [N, K, Z], rewards [N, K], and where the episode ends there [N, K] (None: never)."""


class WorldModelDynamics:
    """A world model with everything constant folded in. `tasks`: one task index per environment, or one for all."""

    def __init__(self, world_model: WorldModel, tasks: Tensor | None = None):
        frozen = world_model.frozen(tasks)
        simnorm = frozen.config.simnorm_dim
        self._config, self._model = frozen.config, world_model
        self._encoder = FrozenNetwork(frozen.encoder, simnorm)
        self._dynamics = FrozenNetwork(frozen.dynamics, simnorm, packed=True)
        self._reward = FrozenNetwork(frozen.reward, simnorm, packed=True)
        self._termination = FrozenNetwork(frozen.termination, simnorm) if frozen.termination is not None else None
        self._workspace = Workspace()

    def encode(self, obs: Tensor) -> Tensor:
        return self._encoder.forward(obs[:, None])[0]

    def step(self, z: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        w, inputs = self._workspace, torch.cat([z, action], -1)
        logits, _ = self._reward.forward(inputs, w.part("reward"))
        reward = self._model.expected_reward(logits)
        change, _ = self._dynamics.forward(inputs, w.part("dynamics"))
        after = z + change if self._config.residual else change
        ended = None if self._termination is None else self._termination.forward(after)[0].squeeze(-1) > 0
        return after, reward, ended


class TDMPC2Planner:
    """MPPI on a latent model, for N environments at once; used as a policy: `planner(obs)`.

    `discount`: of a step, a number or one per environment [N]; `guide` None: no prior, and the horizon's end is worth
    nothing, so that the horizon should be long. `action_mask` [N or 1, A]: 0 where a task has no action.
    """

    def __init__(
        self,
        model: LatentModel,
        action_dim: int,
        num_envs: int = 1,
        guide: Guide | None = None,
        config: MPPIConfig | None = None,
        discount: float | Sequence[float] = 0.99,
        action_mask: Tensor | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self.config = config or MPPIConfig.published(action_dim)
        self.model, self.guide, self.num_envs = model, guide, num_envs
        self._discount = torch.as_tensor(discount, dtype=dtype, device=device).reshape(-1, 1)  # [N or 1, 1]
        if not ((self._discount > 0) & (self._discount <= 1)).all():
            raise ValueError(f"discount must be in (0, 1], got {discount}")
        self._mppi = MPPI(self.config, num_envs, action_dim, seed, action_mask, dtype, device)
        self._dtype, self._device = dtype, torch.device(device)

    def reset(self, ended: Tensor | None = None) -> None:
        """Forget the plans of the environments [N] that begin an episode (all of them by default)."""
        self._mppi.reset(ended)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Actions [N, A] in [-1, 1] for raw observations [N, S]."""
        return self.act(torch.as_tensor(obs)).cpu().numpy()

    @torch.no_grad()
    def act(self, obs: Tensor, explore: bool = False) -> Tensor:
        """Actions [N, A] for observations [N, S]. Raises ValueError for another number of environments, or where no
        plan has a finite value."""
        if obs.dim() != 2 or len(obs) != self.num_envs:
            raise ValueError(f"observations must be [{self.num_envs}, S], got {tuple(obs.shape)}")
        with fast_matmul(self._dtype, self._device):
            z = self.model.encode(obs.to(self._device, self._dtype)).clone()
            prior = self._prior(z) if self.guide is not None and self.config.policy_trajectories else None
            return self._mppi.plan(lambda actions: self.values(z, actions), prior, explore)

    def _prior(self, z: Tensor) -> Tensor:
        """Trajectories [N, P, H, A] of the policy from latents [N, 1, Z]."""
        assert self.guide is not None
        z, actions = z.expand(-1, self.config.policy_trajectories, -1), []
        for _ in range(self.config.horizon):
            actions.append(self.guide.action(z, self._mppi.generator))
            if len(actions) < self.config.horizon:
                z = self.model.step(z, actions[-1])[0]
        return torch.stack(actions, 2)

    def values(self, z: Tensor, actions: Tensor) -> Tensor:
        """Values [N, K] of sequences [N, K, H, A] from latents [N, 1, Z]: sum of gamma^h r_h, and gamma^H V(z_H)."""
        z = z.expand(-1, actions.shape[1], -1)
        total, weight = torch.zeros_like(actions[..., 0, 0]), torch.ones_like(actions[..., 0, 0])
        for action in actions.unbind(2):
            z, reward, ended = self.model.step(z, action)
            total = torch.addcmul(total, weight, reward)
            weight = weight * self._discount
            if ended is not None:
                weight = weight * ~ended
        return total if self.guide is None else total + weight * self.guide.value(z, self._mppi.generator)
