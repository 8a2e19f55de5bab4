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

from pwm_fast import backend as backends
from pwm_fast.kernels.dispatch import backend_for
from pwm_fast.kernels.layernorm import (
    layernorm,
    normalise,
    normalise_backward,
    normalise_backward_tile,
    renormalise,
    renormalise_tile,
    row_statistics_tile,
)
from pwm_fast.kernels.row_tiles import (
    launch_backward,
    launch_forward,
    load_row,
    load_tile,
    place_tile,
    row_compilations,
    store_strip,
)
from pwm_fast.kernels.rows import (
    Backward,
    Forward,
    check_rows,
    into,
    native_backward,
    native_forward,
    triton_backward,
    triton_forward,
)
from pwm_fast.kernels.triton_support import jit, operator, tl


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


@jit
def simnorm_tile(x, WIDTH: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """`simnorm` of a tile [ROWS, WIDTH]. No group is partly beyond the end of the row."""
    groups = tl.reshape(x, [ROWS, WIDTH // GROUP, GROUP])
    share = tl.exp(groups - tl.max(groups, 2)[:, :, None])
    return tl.reshape(share / tl.sum(share, 2)[:, :, None], [ROWS, WIDTH])


@jit
def layernorm_simnorm_forward_kernel(
    x, w, b, y, mean, rstd, R, eps, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr
):
    first = tl.program_id(0) * ROWS
    row, exists, start, offsets, inside = place_tile(first, R, N, WIDTH, ROWS)
    gain = load_row(w, N, WIDTH)
    shift = load_row(b, N, WIDTH)
    value = load_tile(x, start, offsets, inside)
    centre, scale = row_statistics_tile(value, inside, N, eps)
    normalised = (value - centre[:, None]) * scale[:, None]
    share = simnorm_tile(normalised * gain + shift, WIDTH, ROWS, GROUP)
    tl.store(y + start + offsets, share, mask=inside)
    tl.store(mean + row, centre, mask=exists)
    tl.store(rstd + row, scale, mask=exists)


@jit
def layernorm_simnorm_backward_kernel(
    dy, x, mean, rstd, w, b, dx, sums, R,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr, STRIP: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    gain = load_row(w, N, WIDTH)
    shift = load_row(b, N, WIDTH)
    dw = tl.zeros([WIDTH], tl.float32)
    db = tl.zeros([WIDTH], tl.float32)
    for tile in range(0, STRIP, ROWS):
        first = tl.program_id(0) * STRIP + tile
        row, exists, start, offsets, inside = place_tile(first, R, N, WIDTH, ROWS)
        scale = tl.load(rstd + row, mask=exists, other=0.0).to(tl.float32)
        centre = tl.load(mean + row, mask=exists, other=0.0).to(tl.float32)
        normalised = renormalise_tile(load_tile(x, start, offsets, inside), inside, centre, scale)
        share = simnorm_tile(normalised * gain + shift, WIDTH, ROWS, GROUP)
        weighted = load_tile(dy, start, offsets, inside) * share
        total = tl.sum(tl.reshape(weighted, [ROWS, WIDTH // GROUP, GROUP]), 2)[:, :, None]
        total = tl.reshape(tl.broadcast_to(total, [ROWS, WIDTH // GROUP, GROUP]), [ROWS, WIDTH])
        du = weighted - share * total
        dvalue = normalise_backward_tile(du * gain, normalised, scale, N)
        tl.store(dx + start + offsets, dvalue, mask=inside)
        if WEIGHTS:
            dw += tl.sum(du * normalised, 0)
            db += tl.sum(du, 0)
    if WEIGHTS:
        store_strip(sums, dw, db, N, WIDTH)


@operator("y", "mean", "rstd")
def layernorm_simnorm_forward(
    x: Tensor, w: Tensor, b: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, group: int, eps: float
) -> None:
    """`forward` in Triton on contiguous tensors: reads x once and writes y once, 8 bytes per float32 element."""
    launch_forward(layernorm_simnorm_forward_kernel, x, w, b, y, mean, rstd, eps, GROUP=group)


@operator("dx", "dw", "db")
def layernorm_simnorm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor,
    b: Tensor,
    dx: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
    group: int,
) -> None:
    """`backward` in Triton on contiguous tensors: reads dy and x and writes dx once, 12 bytes per float32 element.

    The softmax is made again: it is cheaper than reading y, and does not carry the rounding of a bfloat16 y.
    dw and db come together or not at all; dx may be dy.
    """
    launch_backward(layernorm_simnorm_backward_kernel, (dy, x, mean, rstd, w, b), dx, dw, db, GROUP=group)


COMPILATIONS = row_compilations(
    layernorm_simnorm_forward_kernel,
    layernorm_simnorm_backward_kernel,
    "x w b y mean rstd R eps",
    "dy x mean rstd w b dx sums R",
    [("bf16", 200), ("fp32", 400), ("fp32", 1024), ("fp32", 1792)],  # 512 has the tile of 400
    GROUP=8,
)


def _backend(choice: str | None, group: int, *tensors: Tensor) -> str:
    """As `backend_for`, and torch for the groups that kernels do not know."""
    chosen = backend_for(choice, *tensors)
    columns = tensors[0].shape[-1]
    fits = group == 8 if chosen == "native" else group > 0 and group & (group - 1) == 0
    if chosen == "torch" or (fits and columns % group == 0):
        return chosen
    if choice == "triton":
        raise ValueError(f"triton's simnorm needs groups of a power of two that divide the row, got {group}, {columns}")
    return "torch"


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

    `out` holds tensors for these three, where given. The native kernel knows groups of 8, Triton's powers of
    two; others run in torch.
    """
    check_rows(x, w, b)
    chosen = _backend(backend, group, x, w, b)
    if chosen == "native":
        return native_forward(backends.native.layernorm_simnorm_forward, x, w, b, eps, out)
    if chosen == "triton":
        return triton_forward(layernorm_simnorm_forward, x, w, b, group, eps, out=out)
    with torch.no_grad():
        return into(out, forward_torch(x, w, b, group, eps))


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
    chosen = _backend(backend, group, dy, y, x, mean, rstd, w)
    if chosen == "native":
        inputs = (dy, y, x, mean, rstd, w)
        return native_backward(backends.native.layernorm_simnorm_backward, inputs, w, need_weight_grad, out)
    if chosen == "triton":
        inputs = (dy, x, mean, rstd, w, b)
        return triton_backward(layernorm_simnorm_backward, inputs, w, need_weight_grad, group, out=out)
    with torch.no_grad():
        dx, dw, db = backward_torch(dy, y, x, mean, rstd, w, b, need_weight_grad, group)
        return into((out,), (dx,))[0], dw, db


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
