"""y = layernorm(mish(x)) * w + b: every hidden layer of PWM's actor and critic (the other order than the world model).

Rows x [G, R, N], w and b [G, N]. `mish_layernorm` is the definition; `forward` and `backward` are the explicit pair
that extraction calls; `apply` is their autograd front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pwm_fast.kernels.dispatch import native_for
from pwm_fast.kernels.layernorm import layernorm, normalise, normalise_backward, renormalise
from pwm_fast.kernels.mish import mish, mish_forward, mish_slope
from pwm_fast.kernels.rows import Backward, Forward, check_rows, into, native_backward, native_forward


def mish_layernorm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition."""
    return layernorm(mish(x), w, b, eps)


def forward_torch(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Forward:
    """`forward` in plain torch."""
    normalised, mean, rstd = normalise(mish_forward(x), eps)
    return torch.addcmul(b[:, None], normalised, w[:, None]), mean, rstd


def backward_torch(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor,
    b: Tensor,
    need_weight_grad: bool = True,
) -> Backward:
    """`backward` in plain torch."""
    normalised = renormalise(mish_forward(x), mean, rstd)
    dx = normalise_backward(dy * w[:, None], normalised, rstd) * mish_slope(x)
    if not need_weight_grad:
        return dx, None, None
    return dx, (dy * normalised).sum(1), dy.sum(1)


def forward(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    eps: float = 1e-5,
    backend: str | None = None,
    out: Forward | None = None,
) -> Forward:
    """y [G, R, N], and mean and reciprocal standard deviation [G, R] of mish(x) for `backward`. No autograd graph.

    `out` holds tensors for these three, where given.
    """
    check_rows(x, w, b)
    native = native_for(backend, x, w, b)
    if native is None:
        with torch.no_grad():
            return into(out, forward_torch(x, w, b, eps))
    return native_forward(native.mish_layernorm_forward, x, w, b, eps, out)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor,
    b: Tensor,
    need_weight_grad: bool = True,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Backward:
    """dx [G, R, N]; dw and db [G, N], or None where `need_weight_grad` is off (frozen weights).

    `out`, where given, receives dx; it may be dy itself.
    """
    check_rows(x, w, b, (dy,), (mean, rstd))
    native = native_for(backend, dy, x, mean, rstd, w)
    if native is None:
        with torch.no_grad():
            dx, dw, db = backward_torch(dy, x, mean, rstd, w, b, need_weight_grad)
            return into((out,), (dx,))[0], dw, db
    return native_backward(native.mish_layernorm_backward, (dy, x, mean, rstd, w), w, need_weight_grad, out)


class _MishLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        y, mean, rstd = forward(x, w, b, eps)
        ctx.save_for_backward(x, mean, rstd, w, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, w, b = ctx.saved_tensors
        weight_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        return (*backward(dy, x, mean, rstd, w, b, weight_grad), None)


def apply(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """`mish_layernorm` under autograd."""
    return _MishLayerNorm.apply(x, w, b, eps)
