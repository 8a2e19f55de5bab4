"""The Triton kernels of two_hot.py. A program takes a few rows of logits, padded to a power of two; statistics stay in
registers, and nothing is saved between forward and backward but the logits themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pwm_fast.kernels.ahead_of_time import Compilation, signature
from pwm_fast.kernels.row_tiles import RowTile, load_tile, place_tile
from pwm_fast.kernels.triton_support import jit, operator, tl, triton


@jit
def load_logits(logits, start, offsets, inside, N: tl.constexpr, WIDTH: tl.constexpr):
    """Logits less the largest of their row, so that no exponential overflows; -inf beyond the bins."""
    value = load_tile(logits, start, offsets, inside)
    value = tl.where((tl.arange(0, WIDTH) < N)[None, :], value, float("-inf"))
    return value - tl.max(value, 1)[:, None]


@jit
def two_hot_tile(x, N: tl.constexpr, WIDTH: tl.constexpr, vmin, vmax, per_unit):
    """`encode` of x [ROWS] as a tile. minimum and maximum lose NaN: it is put back, on the first two bins."""
    place = (tl.minimum(tl.maximum(x, vmin), vmax) - vmin) * per_unit
    lower = tl.where(x == x, tl.minimum(tl.floor(place), N - 2.0), 0.0)
    above = tl.where(x == x, place - lower, x)[:, None]
    lower = lower[:, None]
    bins = tl.arange(0, WIDTH).to(tl.float32)[None, :]
    return tl.where(bins == lower, 1 - above, tl.where(bins == lower + 1, above, 0.0))


@jit
def expm1_of_positive(x):
    """exp(x) - 1 for x >= 0, from its series where the difference would lose digits."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x < 0.4, series, tl.exp(x) - 1)


@jit
def expectation_forward_kernel(
    logits, value, R, vmin, width, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LOG_SCALE: tl.constexpr
):
    row, exists, start, offsets, inside = place_tile(tl.program_id(0) * ROWS, R, N, WIDTH, ROWS)
    p = tl.exp(load_logits(logits, start, offsets, inside, N, WIDTH))
    bins = vmin + tl.arange(0, WIDTH).to(tl.float32)[None, :] * width
    result = tl.sum(p * bins, 1) / tl.sum(p, 1)
    if LOG_SCALE:
        size = expm1_of_positive(tl.abs(result))
        result = tl.where(result < 0, -size, size)
    tl.store(value + row, result, mask=exists)


@jit
def expectation_backward_kernel(
    dvalue, logits, dlogits, R, vmin, width,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LOG_SCALE: tl.constexpr,
):  # fmt: skip
    row, exists, start, offsets, inside = place_tile(tl.program_id(0) * ROWS, R, N, WIDTH, ROWS)
    p = tl.exp(load_logits(logits, start, offsets, inside, N, WIDTH))
    p = p / tl.sum(p, 1)[:, None]
    bins = vmin + tl.arange(0, WIDTH).to(tl.float32)[None, :] * width
    value = tl.sum(p * bins, 1)
    d = tl.load(dvalue + row, mask=exists, other=0.0).to(tl.float32)
    if LOG_SCALE:
        d = d * tl.exp(tl.abs(value))
    tl.store(dlogits + start + offsets, d[:, None] * p * (bins - value[:, None]), mask=inside)


@jit
def cross_entropy_forward_kernel(
    logits, x, loss, R, vmin, vmax, per_unit, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    row, exists, start, offsets, inside = place_tile(tl.program_id(0) * ROWS, R, N, WIDTH, ROWS)
    shifted = load_logits(logits, start, offsets, inside, N, WIDTH)
    target = tl.load(x + row, mask=exists, other=0.0).to(tl.float32)
    hot = two_hot_tile(target, N, WIDTH, vmin, vmax, per_unit)
    likely = tl.sum(tl.where(hot == 0, 0.0, hot * shifted), 1)  # 0 * -inf beyond the bins would be NaN
    tl.store(loss + row, tl.log(tl.sum(tl.exp(shifted), 1)) - likely, mask=exists)


@jit
def cross_entropy_backward_kernel(
    dloss, logits, x, dlogits, R, vmin, vmax, per_unit, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    row, exists, start, offsets, inside = place_tile(tl.program_id(0) * ROWS, R, N, WIDTH, ROWS)
    p = tl.exp(load_logits(logits, start, offsets, inside, N, WIDTH))
    target = tl.load(x + row, mask=exists, other=0.0).to(tl.float32)
    hot = two_hot_tile(target, N, WIDTH, vmin, vmax, per_unit)
    d = tl.load(dloss + row, mask=exists, other=0.0).to(tl.float32)
    tl.store(dlogits + start + offsets, d[:, None] * (p / tl.sum(p, 1)[:, None] - hot), mask=inside)


@jit
def encode_kernel(x, rows, R, vmin, vmax, per_unit, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row, exists, start, offsets, inside = place_tile(tl.program_id(0) * ROWS, R, N, WIDTH, ROWS)
    target = tl.load(x + row, mask=exists, other=0.0).to(tl.float32)
    tl.store(rows + start + offsets, two_hot_tile(target, N, WIDTH, vmin, vmax, per_unit), mask=inside)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], rows: Tensor, *scalars: float, **constants: bool) -> None:
    """`kernel` over the rows of logits [..., N], or of what has their shape."""
    if rows.numel() == 0:
        return
    columns = rows.shape[-1]
    count, tile = rows.numel() // columns, RowTile.of(columns)
    kernel[(triton.cdiv(count, tile.rows),)](
        *tensors, count, *scalars, N=columns, **tile.constants, **constants, num_warps=tile.warps
    )


@operator("value")
def two_hot_expectation_forward(logits: Tensor, value: Tensor, vmin: float, vmax: float, log_scale: bool) -> None:
    """Reads the logits once: 4 bytes per float32 logit."""
    width = (vmax - vmin) / (logits.shape[-1] - 1)
    _launch(expectation_forward_kernel, (logits, value), logits, vmin, width, LOG_SCALE=log_scale)


@operator("dlogits")
def two_hot_expectation_backward(
    dvalue: Tensor, logits: Tensor, dlogits: Tensor, vmin: float, vmax: float, log_scale: bool
) -> None:
    """Reads the logits and writes their gradient once: 8 bytes per float32 logit."""
    width = (vmax - vmin) / (logits.shape[-1] - 1)
    _launch(expectation_backward_kernel, (dvalue, logits, dlogits), logits, vmin, width, LOG_SCALE=log_scale)


@operator("loss")
def two_hot_cross_entropy_forward(logits: Tensor, x: Tensor, loss: Tensor, vmin: float, vmax: float) -> None:
    """Reads the logits once: 4 bytes per float32 logit."""
    per_unit = (logits.shape[-1] - 1) / (vmax - vmin)
    _launch(cross_entropy_forward_kernel, (logits, x, loss), logits, vmin, vmax, per_unit)


@operator("dlogits")
def two_hot_cross_entropy_backward(
    dloss: Tensor, logits: Tensor, x: Tensor, dlogits: Tensor, vmin: float, vmax: float
) -> None:
    """Reads the logits and writes their gradient once: 8 bytes per float32 logit."""
    per_unit = (logits.shape[-1] - 1) / (vmax - vmin)
    _launch(cross_entropy_backward_kernel, (dloss, logits, x, dlogits), logits, vmin, vmax, per_unit)


@operator("rows")
def two_hot_encode(x: Tensor, rows: Tensor, vmin: float, vmax: float) -> None:
    """Writes the rows once: 4 bytes per float32 weight."""
    per_unit = (rows.shape[-1] - 1) / (vmax - vmin)
    _launch(encode_kernel, (x, rows), rows, vmin, vmax, per_unit)


_TILE = RowTile.of(101)
_FIXED = {"N": 101, **_TILE.constants}
COMPILATIONS = [
    Compilation(
        f"two_hot {kernel.__name__} {dtype}{' log scale' if extra.get('LOG_SCALE') else ''}",
        kernel,
        signature({f"*{dtype}": pointers, "i32": "R", "fp32": scalars}),
        _FIXED | extra,
        _TILE.warps,
    )
    for dtype in ("fp32", "bf16")
    for kernel, pointers, scalars, extra in (
        (expectation_forward_kernel, "logits value", "vmin width", {"LOG_SCALE": True}),
        (expectation_backward_kernel, "dvalue logits dlogits", "vmin width", {"LOG_SCALE": True}),
        (cross_entropy_forward_kernel, "logits x loss", "vmin vmax per_unit", {}),
        (cross_entropy_backward_kernel, "dloss logits x dlogits", "vmin vmax per_unit", {}),
        (encode_kernel, "x rows", "vmin vmax per_unit", {}),
    )
]
