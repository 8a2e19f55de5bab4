"""TD(lambda) returns (PWM Eq. 7-9; Sutton and Barto section 12.2), computed backwards along the horizon.

G_h = r_h + gamma c_h ((1 - lambda) V_{h+1} + lambda G_{h+1}), started with G_H = V_H: lambda = 0 is TD(0), lambda = 1
the discounted sum with a terminal value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast import backend as backends
from pwm_fast.kernels.ahead_of_time import Compilation, signature
from pwm_fast.kernels.dispatch import backend_for
from pwm_fast.kernels.triton_support import jit, operator, tl, triton


def td_lambda(reward: Tensor, next_value: Tensor, continues: Tensor | None, gamma: float, lam: float) -> Tensor:
    """The definition; see `returns`."""
    result = []
    following = next_value[-1]
    for h in reversed(range(reward.shape[0])):
        bootstrap = (1 - lam) * next_value[h] + lam * following
        following = reward[h] + gamma * (bootstrap if continues is None else continues[h] * bootstrap)
        result.append(following)
    return torch.stack(result[::-1])


@jit
def td_lambda_kernel(
    reward, next_value, continues, result, columns, gamma, lam, HORIZON: tl.constexpr, ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    following = tl.load(next_value + (HORIZON - 1) * columns + column, mask=inside, other=0.0).to(tl.float32)
    for back in range(HORIZON):
        place = (HORIZON - 1 - back) * columns + column
        bootstrap = (1 - lam) * tl.load(next_value + place, mask=inside, other=0.0).to(tl.float32) + lam * following
        if ENDS:
            bootstrap = tl.load(continues + place, mask=inside, other=0.0).to(tl.float32) * bootstrap
        following = tl.load(reward + place, mask=inside, other=0.0).to(tl.float32) + gamma * bootstrap
        tl.store(result + place, following, mask=inside)


BLOCK = 64  # columns per program: B of them per policy are few, and every step back waits for its loads


@operator("result")
def td_lambda_returns(
    reward: Tensor, next_value: Tensor, continues: Tensor | None, result: Tensor, gamma: float, lam: float
) -> None:
    """`returns` in Triton on contiguous tensors: reads each input once, writes once, 16 bytes per float32 element."""
    if result.numel() == 0:
        return
    horizon, columns = reward.shape[0], reward[0].numel()
    td_lambda_kernel[(triton.cdiv(columns, BLOCK),)](
        reward, next_value, continues, result, columns, gamma, lam, horizon, continues is not None, BLOCK, num_warps=2
    )


COMPILATIONS = [
    Compilation(
        f"td_lambda_kernel {dtype}",
        td_lambda_kernel,
        signature({f"*{dtype}": "reward next_value continues result", "i32": "columns", "fp32": "gamma lam"}),
        {"HORIZON": 16, "ENDS": True, "BLOCK": BLOCK},
        num_warps=2,
    )
    for dtype in ("fp32", "bf16")
]


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
    chosen = backend_for(backend, reward, next_value, *(() if continues is None else (continues,)))
    if chosen == "torch":
        return td_lambda(reward, next_value, continues, gamma, lam)
    reward, next_value = reward.contiguous(), next_value.contiguous()
    continues = None if continues is None else continues.contiguous()
    result = torch.empty_like(reward)
    if chosen == "triton":
        td_lambda_returns(reward, next_value, continues, result, gamma, lam)
        return result
    backends.native.td_lambda(
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
