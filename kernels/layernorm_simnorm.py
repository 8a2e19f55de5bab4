"""y = simnorm(layernorm(x) * w + b): the last layer of the world model's encoder and dynamics.

SimNorm (Lavoie et al. 2022) is a softmax within each group of 8 neighbouring columns: latents are points on simplices.
Rows x [G, R, N], w and b [G, N]. `layernorm_simnorm` is the definition; `forward` and `backward` are the explicit pair
that extraction calls; `apply` is their autograd front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pwm_fast.kernels.dispatch import native_for
from pwm_fast.kernels.layernorm import layernorm, normalise, normalise_backward, renormalise
from pwm_fast.kernels.rows import Backward, Forward, check_rows, into, native_backward, native_forward


def simnorm(x: Tensor, group: int = 8) -> Tensor:
    """Softmax within each group of `group` neighbouring columns; raises ValueError if they do not divide the row."""
    if group < 1 or x.shape[-1] % group:
        raise ValueError(f"rows must be a multiple of the simnorm group {group}, got {x.shape[-1]} columns")
    return torch.softmax(x.unflatten(-1, (-1, group)), -1).flatten(-2)


def layernorm_simnorm(x: Tensor, w: Tensor, b: Tensor, group: int = 8, eps: float = 1e-5) -> Tensor:
    """The definition."""
    return simnorm(layernorm(x, w, b, eps), group)


def forward_torch(x: Tensor, w: Tensor, b: Tensor, group: int = 8, eps: float = 1e-5) -> Forward:
    """`forward` in plain torch."""
    normalised, mean, rstd = normalise(x, eps)
    return simnorm(torch.addcmul(b[:, None], normalised, w[:, None]), group), mean, rstd


def backward_torch(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor,
    b: Tensor,
    need_weight_grad: bool = True,
    group: int = 8,
) -> Backward:
    """`backward` in plain torch."""
    normalised = renormalise(x, mean, rstd)
    weighted = dy * y
    share = weighted.unflatten(-1, (-1, group)).sum(-1).repeat_interleave(group, -1)
    du = weighted - y * share
    dx = normalise_backward(du * w[:, None], normalised, rstd)
    if not need_weight_grad:
        return dx, None, None
    return dx, (du * normalised).sum(1), du.sum(1)


def forward(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    group: int = 8,
    eps: float = 1e-5,
    backend: str | None = None,
    out: Forward | None = None,
) -> Forward:
    """y [G, R, N], and the mean and reciprocal standard deviation [G, R] that `backward` needs. No autograd graph.

    `out` holds tensors for these three, where given. The native kernel knows groups of 8; others run in torch.
    """
    check_rows(x, w, b)
    native = native_for(backend, x, w, b)
    if native is None or group != 8 or x.shape[2] % 8:
        with torch.no_grad():
            return into(out, forward_torch(x, w, b, group, eps))
    return native_forward(native.layernorm_simnorm_forward, x, w, b, eps, out)


def backward(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor,
    b: Tensor,
    need_weight_grad: bool = True,
    group: int = 8,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Backward:
    """dx [G, R, N]; dw and db [G, N], or None where `need_weight_grad` is off (frozen weights). y is `forward`'s.

    `out`, where given, receives dx; it may be dy itself.
    """
    check_rows(x, w, b, (dy, y), (mean, rstd))
    native = native_for(backend, dy, y, x, mean, rstd, w)
    if native is None or group != 8 or x.shape[2] % 8:
        with torch.no_grad():
            dx, dw, db = backward_torch(dy, y, x, mean, rstd, w, b, need_weight_grad, group)
            return into((out,), (dx,))[0], dw, db
    return native_backward(native.layernorm_simnorm_backward, (dy, y, x, mean, rstd, w), w, need_weight_grad, out)


class _LayerNormSimNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, group: int, eps: float) -> Tensor:
        y, mean, rstd = forward(x, w, b, group, eps)
        ctx.save_for_backward(y, x, mean, rstd, w, b)
        ctx.group = group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, x, mean, rstd, w, b = ctx.saved_tensors
        weight_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        return (*backward(dy, y, x, mean, rstd, w, b, weight_grad, ctx.group), None, None)


def apply(x: Tensor, w: Tensor, b: Tensor, group: int = 8, eps: float = 1e-5) -> Tensor:
    """`layernorm_simnorm` under autograd."""
    return _LayerNormSimNorm.apply(x, w, b, group, eps)
