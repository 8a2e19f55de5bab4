"""Returns of imagined trajectories: the actor's objective with its gradient, and the running normalisation.

Critic targets are `pwm_fast.kernels.td_lambda.returns`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ImaginedReturn(NamedTuple):
    """Returns and their partial derivatives."""

    value: Tensor  # [P, B]
    d_reward: Tensor  # [H, P, B] (expanded where nothing ends)
    d_continues: Tensor | None  # [H, P, B]
    d_last: Tensor  # [P, B] with respect to V(z_H)


def imagined_return(
    reward: Tensor, continues: Tensor | None, last_value: Tensor, gamma: float, terminal_discount_offset: int = 0
) -> ImaginedReturn:
    """sum_h D_h r_h + gamma^offset D_H V(z_H) with D_h = prod_{i<h} gamma c_i (PWM Eq. 6; there c = 1, offset 0).

    reward, continues [H, P, B] (None: nothing ends), last_value [P, B]. The published code uses offset 1.
    """
    horizon = reward.shape[0]
    terminal = gamma**terminal_discount_offset
    if continues is None:
        discount = gamma ** torch.arange(horizon, dtype=reward.dtype, device=reward.device)
        d_reward = discount[:, None, None].expand_as(reward)
        d_last = torch.full_like(last_value, gamma**horizon * terminal)
        return ImaginedReturn((d_reward * reward).sum(0) + d_last * last_value, d_reward, None, d_last)
    discounts = [torch.ones_like(last_value)]
    for h in range(horizon):
        discounts.append(discounts[h] * gamma * continues[h])
    following = terminal * last_value  # G_{h+1} = r_{h+1} + gamma c_{h+1} G_{h+2}
    d_continues = torch.empty_like(reward)
    for h in reversed(range(horizon)):
        torch.mul(discounts[h] * gamma, following, out=d_continues[h])
        following = reward[h] + gamma * continues[h] * following
    return ImaginedReturn(following, torch.stack(discounts[:horizon]), d_continues, discounts[horizon] * terminal)


class ReturnStatistics:
    """Running mean and variance [P] of the actor's per-state losses over all samples ever seen.

    Cumulative and biased, as published (count starts at 1e-4, variance at 1): updated before it is used.
    """

    def __init__(self, policies: int, dtype: torch.dtype, device: str | torch.device):
        self.mean = torch.zeros(policies, dtype=dtype, device=device)
        self.variance = torch.ones_like(self.mean)
        self.count = torch.full_like(self.mean, 1e-4)

    def update(self, sample: Tensor, active: Tensor) -> None:
        """Merge a batch [P, B] into the rows that are `active` [P] bool (Chan et al. 1979)."""
        number = sample.shape[1]
        variance, mean = torch.var_mean(sample, 1, correction=0)
        total = self.count + number
        delta = mean - self.mean
        squares = self.variance * self.count + variance * number + delta.square() * self.count * number / total
        self.mean.copy_(torch.where(active, self.mean + delta * number / total, self.mean))
        self.variance.copy_(torch.where(active, squares / total, self.variance))
        self.count.copy_(torch.where(active, total, self.count))

    def scale(self) -> Tensor:
        """sqrt(variance + 1e-5) [P], what losses are divided by."""
        return torch.sqrt(self.variance + 1e-5)

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean.clone(), "variance": self.variance.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)
