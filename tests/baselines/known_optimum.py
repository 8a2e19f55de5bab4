"""A latent model whose best actions, and their value, are known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Chase:
    """z' = z + a / 2, reward -|z' - goal|_1: going straight for the goal is best."""

    goal = torch.tensor([1.0, -2.0])

    def encode(self, obs: Tensor) -> Tensor:
        return obs[:, None]

    def step(self, z: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        after = z + action / 2
        return after, -(after - self.goal).abs().sum(-1), None

    @staticmethod
    def best_action(z: Tensor) -> Tensor:
        return (2 * (Chase.goal - z)).clamp(-1, 1)


class ChaseGuide:
    """The exact value (without discount), and a prior that knows nothing."""

    def action(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(z.shape, generator=generator) * 2 - 1

    def value(self, z: Tensor, generator: torch.Generator) -> Tensor:
        left = (z - Chase.goal).abs()
        return -torch.stack([(left - k / 2).clamp(min=0).sum(-1) for k in range(1, 20)]).sum(0)


def chase_return(policy: Callable[[Tensor], object], z: Tensor, steps: int) -> Tensor:
    """Returns [N] of `policy` from latents z [N, 2]."""
    total = torch.zeros(len(z))
    for _ in range(steps):
        z, reward, _ = Chase().step(z, torch.as_tensor(policy(z)))
        total += reward
    return total
