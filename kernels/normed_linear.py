"""y = act(norm(x)) W^T + b on pre-norm rows x: a linear layer that normalises its input as it reads it.

The layer norm inside a product's own epilogue would give one program a whole row of columns; here the epilogue stores
the pre-norm tile with that tile's row statistics, and the next layer's prologue merges them (`normed_tiles`). Inputs
x [g, R, in] are shared by G / g neighbouring members of W [G, out, in]: G = 1 for the frozen world model, P for actors,
P x K for critics. `normed_linear` is the definition; `forward` and `input_gradient` are the Triton pair.

Cost model (on paper, unmeasured): a program reads (BM + BN) K operands, so of the tiles that occupy all multiprocessors
the squarest are cheapest: 64 rows of 1792 x 1792 in bfloat16 are 112 tiles of 32 x 32 that read 230 KB each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.kernels.layernorm_mish import layernorm_mish
from pwm_fast.kernels.layernorm_simnorm import layernorm_simnorm
from pwm_fast.kernels.mish_layernorm import mish_layernorm
from pwm_fast.kernels.normed_tiles import (
    KINDS,
    MISH_LAYERNORM,
    NONE,
    forward_product,
    gradient_product,
    load_statistics,
    load_sums,
    mish,
    normalised,
    output_gradient,
    store_statistics,
    store_sums,
)
from pwm_fast.kernels.triton_support import jit, refusal, tl

EPS = 1e-5
PRECISIONS = ("fp32", "tf32", "bf16")


class Statistics(NamedTuple):
    """Per-tile row statistics of N columns: the tile's mean and squared deviations, or sums of d and d n."""

    tiles: Tensor  # [2, G, R, T]
    width: int  # columns of a tile

    def merged(self, columns: int, eps: float = EPS) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal standard deviation [G, R] of rows of `columns`."""
        means, squares = self.tiles
        starts = torch.arange(means.shape[-1], device=means.device) * self.width
        count = (columns - starts).clamp(max=self.width).to(means.dtype)
        mean = (means * count).sum(-1) / columns
        variance = (squares + count * (means - mean[..., None]).square()).sum(-1) / columns
        return mean, torch.rsqrt(variance + eps)


class Norm(NamedTuple):
    """How pre-norm rows are normalised: "layernorm_mish", "mish_layernorm" or "layernorm_simnorm", and affine part."""

    kind: str
    gain: Tensor  # [g or G, N]
    shift: Tensor


def normed_linear(x: Tensor, weight: Tensor, bias: Tensor, norm: Norm | None = None, group: int = 8) -> Tensor:
    """The definition: y [G, R, out] for x [g, R, in] with g a divisor of G, W [G, out, in], b [G, out].

    `norm`, if given, is applied to x first; its gain and shift are [g, in].
    """
    if norm is not None:
        x = activate(x, norm, group)
    return torch.einsum("gri,goi->gro", x.repeat_interleave(len(weight) // len(x), 0), weight) + bias[:, None]


def activate(x: Tensor, norm: Norm, group: int = 8) -> Tensor:
    """Normalised and activated rows [g, R, N], in plain torch."""
    if norm.kind == "layernorm_simnorm":
        return layernorm_simnorm(x, norm.gain, norm.shift, group)
    return {"layernorm_mish": layernorm_mish, "mish_layernorm": mish_layernorm}[norm.kind](x, norm.gain, norm.shift)


def tile_shape(rows: int, columns: int, groups: int, programs: int) -> tuple[int, int]:
    """(BM, BN) with the least operands read in sequence by one program: ceil(tiles / programs) (BM + BN)."""

    def cost(shape: tuple[int, int]) -> tuple[int, int]:
        tiles = groups * -(-rows // shape[0]) * -(-columns // shape[1])
        return -(-tiles // programs) * sum(shape), tiles

    return min(((m, n) for m in (16, 32, 64) for n in (16, 32, 64)), key=cost)


def dot_options(dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """The constants ACC, DOT, PRECISION and BK of products on `dtype` buffers.

    Raises ValueError for an unknown precision. Statistics and sums are float32, float64 on float64 buffers.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if dtype is torch.float64:
        return {"ACC": tl.float64, "DOT": tl.float64, "PRECISION": "ieee", "BK": 32}
    if dtype is torch.bfloat16 or precision == "bf16":  # the rollout spills 256 bytes a thread at 64
        return {"ACC": tl.float32, "DOT": tl.bfloat16, "PRECISION": "ieee", "BK": 32}
    if precision == "tf32":
        return {"ACC": tl.float32, "DOT": tl.float32, "PRECISION": "tf32", "BK": 32}
    # Without tensor cores a thread holds its operands for all of BK in registers: 32 spills at 64 x 64.
    return {"ACC": tl.float32, "DOT": tl.float32, "PRECISION": "ieee", "BK": 16}


@jit
def forward_kernel(
    x, stats_in, gain, shift, w, bias, y, stats_out, MEMBERS: tl.constexpr,
    SHARE: tl.constexpr, NORM_SHARE: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    KIND: tl.constexpr, NEXT: tl.constexpr, GROUP: tl.constexpr, TILE_IN: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    TILES_M: tl.constexpr = (ROWS + BM - 1) // BM
    TILES_N: tl.constexpr = (N + BN - 1) // BN
    tile = tl.program_id(0)
    member, m, n = tile // (TILES_M * TILES_N), tile // TILES_N % TILES_M, tile % TILES_N
    r = m * BM + tl.arange(0, BM)
    mask = r < ROWS
    rows = (member // SHARE) * ROWS + r
    cols = n * BN + tl.arange(0, BN)
    mean, rstd = 0.0, 1.0
    if KIND != NONE:
        PLANE: tl.constexpr = MEMBERS // SHARE * ROWS * ((K + TILE_IN - 1) // TILE_IN)
        mean, rstd = load_statistics(stats_in, rows, mask, PLANE, K, TILE_IN, EPS)
    affine = member // NORM_SHARE * K
    acc = forward_product(
        x, rows, mask, mean, rstd, gain + affine, shift + affine, w + member.to(tl.int64) * N * K, cols,
        K, K, N, K, KIND, GROUP, ACC, DOT, PRECISION, BK,
    )  # fmt: skip
    acc += tl.load(bias + member * N + cols, cols < N, other=0.0).to(ACC)[None, :]
    out = member * ROWS + r
    tl.store(y + out[:, None] * N + cols[None, :], acc.to(y.dtype.element_ty), mask[:, None] & (cols < N)[None, :])
    if NEXT != NONE:
        if NEXT == MISH_LAYERNORM:
            acc = mish(acc)
        store_statistics(stats_out, out, mask, n, acc, MEMBERS * ROWS * TILES_N, N, BN)


def _members(x: Tensor, weight: Tensor, columns: int, name: str) -> int:
    if x.dim() != 3 or weight.dim() != 3 or x.shape[2] != weight.shape[columns] or len(weight) % max(len(x), 1):
        raise ValueError(
            f"{name} must be [G or a divisor of G, R, {weight.shape[columns]}] for weights {tuple(weight.shape)}, "
            f"got {tuple(x.shape)}"
        )
    return len(weight)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm | None = None,
    statistics: Statistics | None = None,
    next_kind: str = "none",
    precision: str = "fp32",
    group: int = 8,
    programs: int = 132,
) -> tuple[Tensor, Statistics | None]:
    """y [G, R, out] of `normed_linear`, and its row statistics for the layer norm `next_kind` that reads it.

    x [g, R, in] are pre-norm rows with the `statistics` of the layer that made them where `norm` is given, with gain
    and shift [g or G, in], else plain inputs. W [G, out, in] and b [G, out] may be of another dtype than x; y has x's.
    Products are of float32 ("fp32"; "tf32" and "bf16" round their operands), of bfloat16 where x is. `programs` is the
    number of multiprocessors that the tiles should occupy. Raises ValueError on shapes that do not fit, RuntimeError
    where Triton cannot run.
    """
    members = _members(x, weight, 2, "x")
    if reason := refusal(x, weight, bias, float64=True):
        raise RuntimeError(reason)
    if (norm is None) != (statistics is None):
        raise ValueError("norm and statistics come together: the statistics are those of the rows that norm reads")
    shared, rows, inputs = x.shape
    outputs = weight.shape[1]
    if bias.shape != (members, outputs):
        raise ValueError(f"bias must be {(members, outputs)}, got {tuple(bias.shape)}")
    bm, bn = tile_shape(rows, outputs, members, programs)
    options = dot_options(x.dtype, precision)
    y = x.new_empty(members, rows, outputs)
    sums_dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    tiles = -(-outputs // bn)
    stats = y.new_empty(2, members, rows, tiles, dtype=sums_dtype) if next_kind != "none" else None
    kind, gain, shift = ("none", bias, bias) if norm is None else norm
    forward_kernel[(members * -(-rows // bm) * tiles,)](
        x.contiguous(), stats if statistics is None else statistics.tiles, gain.contiguous(), shift.contiguous(),
        weight.contiguous(), bias.contiguous(), y, stats, members, members // shared, members // len(gain), rows,
        inputs, outputs, KINDS[kind], KINDS[next_kind], group, 1 if statistics is None else statistics.width, EPS,
        BM=bm, BN=bn, **options,
    )  # fmt: skip
    return y, None if stats is None else Statistics(stats, bn)


@jit
def gradient_kernel(
    d, pre, stats, sums, w, previous, stats_in, gain, shift, out,
    sums_out, MEMBERS: tl.constexpr, NORM_SHARE: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    N: tl.constexpr, KIND: tl.constexpr, PREVIOUS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    TILE_SUMS: tl.constexpr, TILE_IN: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    TILES_M: tl.constexpr = (ROWS + BM - 1) // BM
    TILES_N: tl.constexpr = (K + BN - 1) // BN
    ALL: tl.constexpr = MEMBERS * ROWS
    tile = tl.program_id(0)
    member, m, n = tile // (TILES_M * TILES_N), tile // TILES_N % TILES_M, tile % TILES_N
    r = m * BM + tl.arange(0, BM)
    mask = r < ROWS
    rows = member * ROWS + r
    cols = n * BN + tl.arange(0, BN)
    mean, rstd, mean_d, mean_dn = 0.0, 1.0, 0.0, 0.0
    if KIND != NONE:
        mean, rstd = load_statistics(stats, rows, mask, ALL * ((N + TILE - 1) // TILE), N, TILE, EPS)
        mean_d, mean_dn = load_sums(sums, rows, mask, ALL * ((N + TILE_SUMS - 1) // TILE_SUMS), N, TILE_SUMS)
    g = gradient_product(
        d, rows, pre, rows, mask, mean, rstd, mean_d, mean_dn, w + member.to(tl.int64) * N * K, cols,
        N, K, K, KIND, ACC, DOT, PRECISION, BK,
    )  # fmt: skip
    at, inside = rows[:, None] * K + cols[None, :], mask[:, None] & (cols < K)[None, :]
    if PREVIOUS != NONE:
        mean, rstd = load_statistics(stats_in, rows, mask, ALL * ((K + TILE_IN - 1) // TILE_IN), K, TILE_IN, EPS)
        x = tl.load(previous + at, inside, other=0.0).to(ACC)
        affine = member // NORM_SHARE * K + cols
        scale = tl.load(gain + affine, cols < K, other=0.0).to(ACC)
        x = normalised(x, mean, rstd, PREVIOUS)
        g = output_gradient(g, x, scale, tl.load(shift + affine, cols < K, other=0.0).to(ACC), PREVIOUS, GROUP)
        g = g * scale[None, :]
        store_sums(sums_out, rows, mask, n, g, x, ALL * TILES_N, TILES_N)
    tl.store(out + at, g.to(out.dtype.element_ty), inside)


class RowGradient(NamedTuple):
    """The gradient d at normalised rows with the tile sums of d and d n; at plain rows, without sums."""

    d: Tensor  # [G, R, N]
    sums: Statistics | None = None


class SavedRows(NamedTuple):
    """Pre-norm rows as `forward` made them, and the norm that reads them."""

    pre: Tensor  # [G, R, N]
    statistics: Statistics
    norm: Norm


def input_gradient(
    gradient: RowGradient,
    weight: Tensor,
    own: SavedRows | None,
    previous: SavedRows | None,
    precision: str = "fp32",
    group: int = 8,
    programs: int = 132,
) -> RowGradient:
    """The gradient at a frozen layer's input from that at its output, norms and activations folded into one product.

    `gradient` is at the normalised rows of the layer's `own` norm [G, R, out], at its plain output where that is None.
    The result is at the normalised rows of the `previous` layer [G, R, in], or, where that is None, the plain input's.
    W [G, out, in]. Raises ValueError on shapes that do not fit, RuntimeError where Triton cannot run.
    """
    d = gradient.d
    members = _members(d, weight, 1, "d")
    if len(d) != members:
        raise ValueError(f"d must have a group for each of the {members} weights, got {len(d)}")
    if reason := refusal(d, weight, float64=True):
        raise RuntimeError(reason)
    if (own is None) != (gradient.sums is None):
        raise ValueError("the sums of d and d n belong to a gradient at normalised rows, and only there")
    rows, inputs = d.shape[1], weight.shape[2]
    bm, bn = tile_shape(rows, inputs, members, programs)
    out = d.new_empty(members, rows, inputs)
    sums_dtype = torch.float64 if d.dtype is torch.float64 else torch.float32
    sums = None if previous is None else out.new_empty(2, members, rows, -(-inputs // bn), dtype=sums_dtype)
    pre, stats, norm = own or (d, None, None)
    x, stats_in, norm_in = previous or (d, None, None)
    gradient_kernel[(members * -(-rows // bm) * -(-inputs // bn),)](
        d.contiguous(), pre, None if stats is None else stats.tiles, gradient.sums and gradient.sums.tiles,
        weight.contiguous(), x, None if stats_in is None else stats_in.tiles,
        *((d, d) if norm_in is None else (norm_in.gain.contiguous(), norm_in.shift.contiguous())), out, sums, members,
        1 if norm_in is None else members // len(norm_in.gain), rows, inputs, weight.shape[1],
        KINDS["none" if norm is None else norm.kind], KINDS["none" if norm_in is None else norm_in.kind], group,
        1 if stats is None else stats.width, 1 if gradient.sums is None else gradient.sums.width,
        1 if stats_in is None else stats_in.width, EPS, BM=bm, BN=bn, **dot_options(d.dtype, precision),
    )  # fmt: skip
    return RowGradient(out, None if sums is None else Statistics(sums, bn))


def row_gradient(dy: Tensor, saved: SavedRows, group: int = 8) -> RowGradient:
    """Where a chain of `input_gradient` begins: dy [G, R, N] at the output of `saved`, in plain torch."""
    mean, rstd = saved.statistics.merged(saved.pre.shape[-1])
    kind, gain, shift = saved.norm
    x = saved.pre.to(mean.dtype)
    n = ((torch.nn.functional.mish(x) if kind == "mish_layernorm" else x) - mean[..., None]) * rstd[..., None]
    u = (n * gain[:, None] + shift[:, None]).detach().requires_grad_()
    with torch.enable_grad():
        if kind == "layernorm_simnorm":
            y = torch.softmax(u.unflatten(-1, (-1, group)), -1).flatten(-2)
        else:
            y = torch.nn.functional.mish(u) if kind == "layernorm_mish" else u * 1
        (du,) = torch.autograd.grad(y, u, dy.to(u.dtype))
    d = du * gain[:, None]
    return RowGradient(d.to(dy.dtype), Statistics(torch.stack([d.sum(-1), (d * n).sum(-1)])[..., None], d.shape[-1]))
