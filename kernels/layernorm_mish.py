"""y = mish(layernorm(x) * w + b): every hidden layer of the world model (TD-MPC2's NormedLinear).

Rows x [G, R, N], w and b [G, N]. `layernorm_mish` is the definition; `forward` and `backward` are the explicit pair
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
from pwm_fast.kernels.mish import mish, mish_and_slope_tile, mish_forward, mish_slope, mish_tile
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


def layernorm_mish(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition."""
    return mish(layernorm(x, w, b, eps))


def forward_torch(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Forward:
    """`forward` in plain torch."""
    normalised, mean, rstd = normalise(x, eps)
    return mish_forward(torch.addcmul(b[:, None], normalised, w[:, None])), mean, rstd


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
    normalised = renormalise(x, mean, rstd)
    du = dy * mish_slope(torch.addcmul(b[:, None], normalised, w[:, None]))
    dx = normalise_backward(du * w[:, None], normalised, rstd)
    if not need_weight_grad:
        return dx, None, None
    return dx, (du * normalised).sum(1), du.sum(1)


@jit
def layernorm_mish_forward_kernel(
    x, w, b, y, mean, rstd, R, eps, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    first = tl.program_id(0) * ROWS
    row, exists, start, offsets, inside = place_tile(first, R, N, WIDTH, ROWS)
    gain = load_row(w, N, WIDTH)
    shift = load_row(b, N, WIDTH)
    value = load_tile(x, start, offsets, inside)
    centre, scale = row_statistics_tile(value, inside, N, eps)
    normalised = (value - centre[:, None]) * scale[:, None]
    tl.store(y + start + offsets, mish_tile(normalised * gain + shift), mask=inside)
    tl.store(mean + row, centre, mask=exists)
    tl.store(rstd + row, scale, mask=exists)


@jit
def layernorm_mish_backward_kernel(
    dy, x, mean, rstd, w, b, dx, sums, R,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr, STRIP: tl.constexpr,
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
        _, slope = mish_and_slope_tile(normalised * gain + shift)
        du = load_tile(dy, start, offsets, inside) * slope
        dvalue = normalise_backward_tile(du * gain, normalised, scale, N)
        tl.store(dx + start + offsets, dvalue, mask=inside)
        if WEIGHTS:
            dw += tl.sum(du * normalised, 0)
            db += tl.sum(du, 0)
    if WEIGHTS:
        store_strip(sums, dw, db, N, WIDTH)


@operator("y", "mean", "rstd")
def layernorm_mish_forward(x: Tensor, w: Tensor, b: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> None:
    """`forward` in Triton on contiguous tensors: reads x once and writes y once, 8 bytes per float32 element."""
    launch_forward(layernorm_mish_forward_kernel, x, w, b, y, mean, rstd, eps)


@operator("dx", "dw", "db")
def layernorm_mish_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor,
    b: Tensor,
    dx: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """`backward` in Triton on contiguous tensors: reads dy and x and writes dx once, 12 bytes per float32 element.

    dw and db come together or not at all; dx may be dy.
    """
    launch_backward(layernorm_mish_backward_kernel, (dy, x, mean, rstd, w, b), dx, dw, db)


COMPILATIONS = row_compilations(
    layernorm_mish_forward_kernel,
    layernorm_mish_backward_kernel,
    "x w b y mean rstd R eps",
    "dy x mean rstd w b dx sums R",
    [("bf16", 200), ("fp32", 400), ("fp32", 1024), ("fp32", 1792)],  # 512 has the tile of 400
)


def forward(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    eps: float = 1e-5,
    backend: str | None = None,
    out: Forward | None = None,
) -> Forward:
    """y [G, R, N], and the mean and reciprocal standard deviation [G, R] that `backward` needs. No autograd graph.

    `out` holds tensors for these three, where given.
    """
    check_rows(x, w, b)
    chosen = backend_for(backend, x, w, b)
    if chosen == "native":
        return native_forward(backends.native.layernorm_mish_forward, x, w, b, eps, out)
    if chosen == "triton":
        return triton_forward(layernorm_mish_forward, x, w, b, eps, out=out)
    with torch.no_grad():
        return into(out, forward_torch(x, w, b, eps))


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
    chosen, inputs = backend_for(backend, dy, x, mean, rstd, w), (dy, x, mean, rstd, w, b)
    if chosen == "native":
        return native_backward(backends.native.layernorm_mish_backward, inputs, w, need_weight_grad, out)
    if chosen == "triton":
        return triton_backward(layernorm_mish_backward, inputs, w, need_weight_grad, out=out)
    with torch.no_grad():
        dx, dw, db = backward_torch(dy, x, mean, rstd, w, b, need_weight_grad)
        return into((out,), (dx,))[0], dw, db


class _LayerNormMish(torch.autograd.Function):
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
    """`layernorm_mish` under autograd."""
    return _LayerNormMish.apply(x, w, b, eps)
