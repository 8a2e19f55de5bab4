"""The plan of `dynamics_rollout`: each layer's constants and tiles, and where its rows lie in the buffers.

Rows are (policy p, batch b). A buffer keeps row (p, b) of step h at p OUTER + b + base: [P, H, B] for the actors, whose
backward pass wants a policy's rows together, [H, P, B] for the world model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from pwm_fast.kernels.normed_linear import tile_shape
from pwm_fast.kernels.normed_tiles import KINDS
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
def place(tile, TILES_N: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, TILE_M: tl.constexpr):
    """Member, column tile, row mask [BM], policy [BM] and batch row [BM] of a tile; members have ROWS each."""
    TILES_M: tl.constexpr = (ROWS + TILE_M - 1) // TILE_M
    member, n = tile // (TILES_M * TILES_N), tile % TILES_N
    r = tile // TILES_N % TILES_M * TILE_M + tl.arange(0, TILE_M)
    row = member * ROWS + r
    return member, n, r < ROWS, row // BATCH, row % BATCH


class FrozenRow(NamedTuple):
    """A layer of the world model for `plan_rollout`: W [n, k], and where its parameters begin."""

    k: int
    n: int
    kind: str
    starts: tuple[int, int, int, int, int]  # w, bias, stride between policies' biases, gain, shift


class Plan(NamedTuple):
    """Layers from the first to the last, elements of each buffer, and where the gradient at z is kept among `grads`."""

    actor: list[Layer]
    dynamics: list[Layer]
    sizes: dict[str, int]  # pre, stats, grads, sums
    dz: int


def plan_rollout(
    actor_widths: Sequence[int],
    offset: Callable[[str], int],
    stride: int,
    dynamics: Sequence[FrozenRow],
    policies: int,
    horizon: int,
    batch: int,
    programs: int,
) -> Plan:
    """Tiles for `programs` multiprocessors and places in the buffers.

    `offset` gives the start of the actors' parameters by name within a policy's row, rows being `stride` apart.
    """
    rows = policies * batch
    sizes = {"pre": 0, "stats": 0, "grads": 0, "sums": 0}

    def room(name: str, size: int) -> int:
        start = sizes[name]
        sizes[name] += -(-size // 16) * 16
        return start

    def layer(row: FrozenRow, member_stride: int, sums_tile: int) -> Layer:
        members = policies if member_stride else 1
        k, n, kind, starts = row
        bm, bn = tile_shape(rows // members, n, members, programs)
        hidden = kind != "none"
        return Layer(
            k, n, KINDS[kind], *starts, member_stride,
            room("pre", rows * horizon * n * hidden), room("stats", 2 * rows * horizon * -(-n // bn) * hidden),
            bn, bm, bn, room("grads", rows * n), room("sums", 2 * rows * -(-n // sums_tile)), sums_tile,
            *tile_shape(rows // members, k, members, programs),
        )  # fmt: skip

    def stack(layers: Sequence[FrozenRow], member_stride: int, sums_tile: int) -> list[Layer]:
        out: list[Layer] = []
        for row in reversed(layers):  # a layer's sums come in the tiles of the gradient product of the one above
            out.insert(0, layer(row, member_stride, out[0].down_bn if out else sums_tile))
        return out

    state_tile = tile_shape(rows, dynamics[0].k, 1, programs)[1]
    actors = []
    for i, (k, n) in enumerate(pairwise(actor_widths)):
        hidden = i < len(actor_widths) - 2
        affine = (offset(f"{i}.ln.weight"), offset(f"{i}.ln.bias")) if hidden else (0, 0)
        starts = (offset(f"{i}.weight"), offset(f"{i}.bias"), stride, *affine)
        actors.append(FrozenRow(k, n, "mish_layernorm" if hidden else "none", starts))
    actor = stack(actors, stride, 16)
    actor[0] = actor[0]._replace(down_bn=state_tile)  # it may take the dynamics' place in making the gradient at z
    return Plan(actor, stack(dynamics, 0, state_tile), sizes, room("grads", rows * actor_widths[0]))
