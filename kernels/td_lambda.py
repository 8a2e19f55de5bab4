"""TD(lambda) returns (PWM Eq. 7-9; Sutton and Barto section 12.2), computed backwards along the horizon.

G_h = r_h + gamma c_h ((1 - lambda) V_{h+1} + lambda G_{h+1}), started with G_H = V_H: lambda = 0 is TD(0), lambda = 1
the discounted sum with a terminal value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.kernels.dispatch import native_for


def td_lambda(reward: Tensor, next_value: Tensor, continues: Tensor | None, gamma: float, lam: float) -> Tensor:
    """The definition; see `returns`."""
    result = []
    following = next_value[-1]
    for h in reversed(range(reward.shape[0])):
        bootstrap = (1 - lam) * next_value[h] + lam * following
        following = reward[h] + gamma * (bootstrap if continues is None else continues[h] * bootstrap)
        result.append(following)
    return torch.stack(result[::-1])


@torch.no_grad()
def returns(
    reward: Tensor,
    next_value: Tensor,
    continues: Tensor | None,
    gamma: float,
    lam: float,
    backend: str | None = None,
) -> Tensor:
    """Returns [H, ...] of rewards r_h, values V_{h+1} and continuation c_h, all [H, ...] (c None: nothing ends)."""
    if next_value.shape != reward.shape or (continues is not None and continues.shape != reward.shape):
        shapes = [None if t is None else tuple(t.shape) for t in (reward, next_value, continues)]
        raise ValueError(f"reward, next_value and continues must have one shape [H, ...], got {shapes}")
    if reward.dim() == 0 or reward.shape[0] < 1:
        raise ValueError(f"horizon must be >= 1, got shape {tuple(reward.shape)}")
    if continues is not None:
        continues = continues.to(reward.dtype)
    native = native_for(backend, reward, next_value, *(() if continues is None else (continues,)))
    if native is None:
        return td_lambda(reward, next_value, continues, gamma, lam)
    reward, next_value = reward.contiguous(), next_value.contiguous()
    continues = None if continues is None else continues.contiguous()
    result = torch.empty_like(reward)
    native.td_lambda(
        reward.data_ptr(),
        next_value.data_ptr(),
        0 if continues is None else continues.data_ptr(),
        result.data_ptr(),
        reward.shape[0],
        reward[0].numel(),
        gamma,
        lam,
    )
    return result
