"""A differentiable environment small enough to reason about: points on a plane that are to be pushed to the origin."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor


class PointEnv:
    """q' = q + 0.1 qd, qd' = qd + 0.5 a, reward -|q|^2 - 0.1 |a|^2, obs = [q, qd]; ends at |q| > 3 or `length`."""

    obs_dim, action_dim = 4, 2
    task = SimpleNamespace(name="point", action_obs=0)

    def __init__(self, num_envs: int, length: int = 20, seed: int = 0):
        self.num_envs, self.length = num_envs, length
        self.generator = torch.Generator().manual_seed(seed)
        self.broken: int | None = None  # this environment's gradients are NaN
        self.reset()

    def _start(self) -> tuple[Tensor, Tensor]:
        return 2 * torch.rand(2, self.num_envs, 2, generator=self.generator) - 1

    def reset(self) -> Tensor:
        self.q, self.qd = self._start()
        self.progress = torch.arange(self.num_envs) % self.length  # so that ends do not coincide
        return self.initialize_trajectory()

    def initialize_trajectory(self) -> Tensor:
        self.q, self.qd = self.q.detach(), self.qd.detach()
        self.obs = torch.cat([self.q, self.qd], -1)
        return self.obs

    def step(self, action: Tensor):
        reward = -self.obs[:, :2].square().sum(-1) - 0.1 * action.square().sum(-1)
        self.q, self.qd = self.q + 0.1 * self.qd, self.qd + 0.5 * action
        if self.broken is not None and self.qd.requires_grad:
            mask = torch.zeros(self.num_envs, 1)
            mask[self.broken] = float("nan")
            self.qd = self.qd.view_as(self.qd)
            self.qd.register_hook(lambda g: g + mask)
        self.progress = self.progress + 1
        final_obs = torch.cat([self.q, self.qd], -1)
        terminated = self.q.detach().norm(dim=-1) > 3
        truncated = self.progress >= self.length
        done = terminated | truncated
        q0, qd0 = self._start()
        self.q, self.qd = torch.where(done[:, None], q0, self.q), torch.where(done[:, None], qd0, self.qd)
        self.progress = torch.where(done, 0, self.progress)
        self.obs = torch.cat([self.q, self.qd], -1)
        return self.obs, reward, terminated, truncated, {"final_obs": final_obs}

    def state_dict(self) -> dict[str, Tensor]:
        kept = {name: getattr(self, name).detach().clone() for name in ("q", "qd", "progress")}
        return {**kept, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("q", "qd", "progress"):
            setattr(self, name, state[name].clone())
        self.generator.set_state(state["generator"])


@pytest.fixture
def point_env():
    """The class `PointEnv`."""
    return PointEnv
