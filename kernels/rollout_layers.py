"""What the forward and backward kernels of `dynamics_rollout` share: a layer's constants, and where tiles and rows lie.

Rows are (policy p, batch b). A buffer keeps row (p, b) of step h at p OUTER + b + base: [P, H, B] for the actors, whose
backward pass wants a policy's rows together, [H, P, B] for the world model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pwm_fast.kernels.triton_support import jit, tl

_constant: Any = int if tl is None else tl.constexpr


class Layer(NamedTuple):
    """One linear layer as kernels see it. Offsets are in elements from the start of a buffer."""

    k: int  # inputs
    n: int  # outputs
    kind: int  # of the norm that reads its output (`normed_tiles.KINDS`)
    w: int  # offset of W [n, k]
    bias: int
    bias_stride: int  # between policies
    gain: int
    shift: int
    member_stride: int  # between the members' parameters; 0 where all share them
    pre: int  # offset of the pre-norm rows
    stats: int  # and of their statistics [2, rows, tiles]
    tile: int  # columns of a statistics tile: bn
    bm: int  # tile of the forward product
    bn: int
    down: int  # offset of d at the normalised rows of this layer
    sums: int  # and of its sums [2, rows, tiles]
    sums_tile: int  # columns of a sums tile: bn of the gradient product that makes d
    down_bm: int  # tile of the gradient product of this layer, which makes what lies below
    down_bn: int


(
    K, N, KIND, W, BIAS, BIAS_STRIDE, GAIN, SHIFT, MEMBER_STRIDE, PRE, STATS, TILE, BM, BN, DOWN, SUMS, SUMS_TILE,
    DOWN_BM, DOWN_BN,
) = (_constant(i) for i in range(len(Layer._fields)))  # fmt: skip


@jit
def place(
    tile: Any, TILES_N: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, TILE_M: tl.constexpr
) -> Any:
    """Member, column tile, row mask [BM], policy [BM] and batch row [BM] of a tile; members have ROWS each."""
    TILES_M: tl.constexpr = (ROWS + TILE_M - 1) // TILE_M
    member, n = tile // (TILES_M * TILES_N), tile % TILES_N
    r = tile // TILES_N % TILES_M * TILE_M + tl.arange(0, TILE_M)
    row = member * ROWS + r
    return member, n, r < ROWS, row // BATCH, row % BATCH
