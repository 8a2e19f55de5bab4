"""y = layernorm(mish(x)) * w + b: every hidden layer of PWM's actor and critic (the other order than the world model).

Rows x [G, R, N], w and b [G, N]. `mish_layernorm` is the definition; `forward` and `backward` are the explicit pair
that extraction calls; `apply` is their autograd front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pwm_fast.kernels.dispatch import check_rows, native_for
from pwm_fast.kernels.layernorm import layernorm, normalise, normalise_backward, renormalise
from pwm_fast.kernels.mish import mish, mish_forward, mish_slope


def mish_layernorm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition."""
    return layernorm(mish(x), w, b, eps)


def forward_torch(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` in plain torch."""
    normalised, mean, rstd = normalise(mish_forward(x), eps)
    return torch.addcmul(b[:, None], normalised, w[:, None]), mean, rstd


def backward_torch(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, b: Tensor, need_weight_grad: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`backward` in plain torch."""
    normalised = renormalise(mish_forward(x), mean, rstd)
    dx = normalise_backward(dy * w[:, None], normalised, rstd) * mish_slope(x)
    if not need_weight_grad:
        return dx, None, None
    return dx, (dy * normalised).sum(1), dy.sum(1)


@torch.no_grad()
def forward(
    x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y [G, R, N]; mean and reciprocal standard deviation [G, R] of mish(x) for `backward`. No autograd graph."""
    groups, rows, columns = check_rows(x, w, b)
    native = native_for(backend, x, w, b)
    if native is None:
        return forward_torch(x, w, b, eps)
    x, w, b = x.contiguous(), w.contiguous(), b.contiguous()
    y, mean, rstd = torch.empty_like(x), x.new_empty(groups, rows), x.new_empty(groups, rows)
    native.mish_layernorm_forward(
        *(t.data_ptr() for t in (x, w, b, y, mean, rstd)), groups, rows, columns, eps, torch.get_num_threads()
    )
    return y, mean, rstd


@torch.no_grad()
def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor,
    b: Tensor,
    need_weight_grad: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx [G, R, N]; dw and db [G, N], or None where `need_weight_grad` is off (frozen weights)."""
    groups, rows, columns = check_rows(x, w, b)
    native = native_for(backend, dy, x, mean, rstd, w, b)
    if native is None:
        return backward_torch(dy, x, mean, rstd, w, b, need_weight_grad)
    dy, x, mean, rstd, w, b = (t.contiguous() for t in (dy, x, mean, rstd, w, b))
    dx = torch.empty_like(x)
    dw, db = (torch.empty_like(w), torch.empty_like(b)) if need_weight_grad else (None, None)
    native.mish_layernorm_backward(
        *(t.data_ptr() for t in (dy, x, mean, rstd, w, b, dx)),
        0 if dw is None else dw.data_ptr(),
        0 if db is None else db.data_ptr(),
        groups,
        rows,
        columns,
        torch.get_num_threads(),
    )
    return dx, dw, db


class _MishLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        y, mean, rstd = forward(x, w, b, eps)
        ctx.save_for_backward(x, mean, rstd, w, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        x, mean, rstd, w, b = ctx.saved_tensors
        return (*backward(dy, x, mean, rstd, w, b, weight_grad), None)


def apply(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """`mish_layernorm` under autograd."""
    return _MishLayerNorm.apply(x, w, b, eps)
