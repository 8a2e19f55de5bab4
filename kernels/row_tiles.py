"""How rows are spread over Triton programs, and how the row kernels are launched.

A program takes a few whole rows, padded to a power of two: statistics need no memory and no second program, and every
element is read and written once. Weight gradients are sums over rows: each program adds up a strip of them, a second
kernel adds the strips in order. So results are the same each time, and a group's do not depend on the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.kernels.ahead_of_time import Compilation
from pwm_fast.kernels.triton_support import jit, tl, triton

SHORTEST_STRIP = 16  # rows: least work per program where strips are summed, if there are as many
STRIPS = 128  # at most, about one per multiprocessor of a large GPU


class RowTile(NamedTuple):
    """What one program works on: `rows` x `width` elements, 16 in each thread's registers (fewer in short rows)."""

    width: int
    rows: int
    warps: int

    @staticmethod
    def of(columns: int) -> RowTile:
        """The tile for rows of `columns`: 1024 elements or one row, at most 16 rows."""
        width = 1 << (columns - 1).bit_length()
        rows = min(16, max(1, 1024 // width))
        return RowTile(width, rows, min(16, max(1, rows * width // 512)))

    @property
    def constants(self) -> dict[str, int]:
        return {"WIDTH": self.width, "ROWS": self.rows}


def strip_of(rows: int, tile_rows: int) -> int:
    """Rows per strip: a power of two, so that few kernels are compiled, and a whole number of tiles."""
    longest = max(SHORTEST_STRIP, triton.next_power_of_2(triton.cdiv(rows, STRIPS)))
    return max(tile_rows, min(longest, triton.next_power_of_2(max(rows, 1))))


@jit
def place_tile(first, R, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The rows from `first` of this program's group: their numbers [ROWS] counted over all groups, and which exist;
    where the tile [ROWS, WIDTH] begins in its array, the offsets from there, and which elements exist."""
    local = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    start = tl.program_id(1).to(tl.int64) * R + first
    exist = first + local < R
    offsets = local[:, None] * N + columns[None, :]
    return start + local, exist, start * N, offsets, exist[:, None] & (columns < N)[None, :]


@jit
def load_row(vector, N: tl.constexpr, WIDTH: tl.constexpr):
    """This program's group of weights or biases [G, N], as a float32 tile [1, WIDTH]."""
    columns = tl.arange(0, WIDTH)
    row = tl.load(vector + tl.program_id(1).to(tl.int64) * N + columns, mask=columns < N, other=0.0)
    return row.to(tl.float32)[None, :]


@jit
def load_tile(array, start, offsets, inside):
    """A float32 tile [ROWS, WIDTH], zero outside the rows."""
    return tl.load(array + start + offsets, mask=inside, other=0.0).to(tl.float32)


@jit
def store_strip(sums, dw, db, N: tl.constexpr, WIDTH: tl.constexpr):
    """A strip's sums dw and db [WIDTH] into `sums` [G, strips, 2, N]."""
    columns = tl.arange(0, WIDTH)
    strip = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    place = sums + strip * 2 * N + columns
    tl.store(place, dw, mask=columns < N)
    tl.store(place + N, db, mask=columns < N)


@jit
def add_strips_kernel(
    sums, dw, db, strips, N: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, MOST: tl.constexpr
):
    """dw and db [G, N] from `sums` [G, strips, 2, N], in the order of the strips."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1).to(tl.int64)
    w = tl.zeros([COLUMNS], tl.float32)
    b = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, MOST, TOGETHER):
        strip = first + tl.arange(0, TOGETHER)
        inside = (strip < strips)[:, None] & (columns < N)[None, :]
        place = sums + group * strips * 2 * N + strip[:, None] * (2 * N) + columns[None, :]
        w += tl.sum(tl.load(place, mask=inside, other=0.0), 0)
        b += tl.sum(tl.load(place + N, mask=inside, other=0.0), 0)
    tl.store(dw + group * N + columns, w, mask=columns < N)
    tl.store(db + group * N + columns, b, mask=columns < N)


ADD = {"COLUMNS": 32, "TOGETHER": 32, "MOST": STRIPS}


def launch_forward(
    kernel: Any, x: Tensor, w: Tensor, b: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, eps: float, **constants: int
) -> None:
    """A forward kernel over all rows of x [G, R, N]."""
    if x.numel() == 0:
        return
    groups, rows, columns = x.shape
    tile = RowTile.of(columns)
    kernel[(triton.cdiv(rows, tile.rows), groups)](
        x, w, b, y, mean, rstd, rows, eps, N=columns, **tile.constants, **constants, num_warps=tile.warps
    )


def launch_backward(
    kernel: Any, inputs: tuple[Tensor, ...], dx: Tensor, dw: Tensor | None, db: Tensor | None, **constants: int
) -> None:
    """A backward kernel over all rows of dx [G, R, N], and the sum of its strips where dw and db [G, N] are wanted."""
    groups, rows, columns = dx.shape
    if groups * columns == 0:
        return
    tile, weights = RowTile.of(columns), dw is not None
    strip = strip_of(rows, tile.rows) if weights else tile.rows
    strips = max(1, triton.cdiv(rows, strip))  # one empty strip gives the zero sum of no rows
    sums = dx.new_empty(groups, strips, 2, columns, dtype=torch.float32) if weights else dx
    constants |= {"WEIGHTS": weights, "STRIP": strip}
    kernel[(strips, groups)](*inputs, dx, sums, rows, N=columns, **tile.constants, **constants, num_warps=tile.warps)
    if weights:
        add_strips_kernel[(triton.cdiv(columns, ADD["COLUMNS"]), groups)](sums, dw, db, strips, N=columns, **ADD)


def row_compilations(
    forward: Any, backward: Any, arguments: str, backward_arguments: str, sizes: list[tuple[str, int]], **constants: int
) -> list[Compilation]:
    """Forward, and backward without and with weights, at each of `sizes` ("fp32" or "bf16", columns).

    The kernels' arguments before N are scalars "R" and "eps", float32 pointers "mean", "rstd" and "sums", and pointers
    to the rows' type.
    """
    known = {"R": "i32", "eps": "fp32"} | dict.fromkeys(("mean", "rstd", "sums"), "*fp32")
    variants: list[tuple[Any, str, dict[str, int]]] = [(forward, arguments, {})]
    variants += [(backward, backward_arguments, {"WEIGHTS": weights}) for weights in (False, True)]
    found = []
    for dtype, columns in sizes:
        tile = RowTile.of(columns)
        for kernel, names, choice in variants:
            fixed: dict[str, Any] = {"N": columns, **tile.constants, **choice, **constants}
            if choice:
                fixed["STRIP"] = SHORTEST_STRIP if choice["WEIGHTS"] else tile.rows
            types = {name: known.get(name, f"*{dtype}") for name in names.split()}
            title = f"{kernel.__name__} {dtype} {columns}{' weights' if choice.get('WEIGHTS') else ''}"
            found.append(Compilation(title, kernel, types, fixed, tile.warps))
    return found


COMPILATIONS = [
    Compilation(
        "add_strips 512",
        add_strips_kernel,
        {"sums": "*fp32", "dw": "*fp32", "db": "*fp32", "strips": "i32"},
        {"N": 512, **ADD},
    )
]
