"""Device functions of the fused layers: tiles of products whose operands are normalised and activated as they load.

A layer stores its PRE-norm output and, per row and column tile, the tile's mean and sum of squared deviations from it.
Whoever reads the row merges these (Chan et al. 1979), so no pass over memory is spent on normalisation and no digits
are lost as in E[x^2] - E[x]^2. Backward likewise: the gradient d at the normalised rows n is stored with the tile sums
of d and d n, which is all that the layer norm's own gradient needs of the other columns.

Tiles are [BM, BN], statistics [2, rows, tiles]; `rows` are row indices [BM] into a buffer, `cols` column indices [BN].
ACC is the type of sums: float64 where the buffers are, else float32.
"""

from __future__ import annotations

from typing import Any

from pwm_fast.kernels.triton_support import interpreting, jit, tl, triton

KINDS = {"none": 0, "layernorm_mish": 1, "mish_layernorm": 2, "layernorm_simnorm": 3}
_constant: Any = int if tl is None else tl.constexpr
NONE, LAYERNORM_MISH, MISH_LAYERNORM, LAYERNORM_SIMNORM = (_constant(k) for k in KINDS.values())
# Triton 3.6's interpreter multiplies the bits of bfloat16; products of rounded float32 are the same numbers.
WIDEN = _constant(interpreting)


@jit
def dot(a, b, acc, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b with operands rounded to DOT and sums in ACC."""
    a, b = a.to(DOT), b.to(DOT)
    if WIDEN:
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)


@jit
def mish_and_slope(x):
    """Mish and its derivative from one exponential (see mish.py)."""
    LIMIT: tl.constexpr = 40.0 if x.dtype == tl.float64 else 20.0
    e = tl.exp(tl.minimum(x, LIMIT))
    n = e * (e + 2)
    r = 1 / (n + 2)
    return x * (n * r), n * r + x * (4 * e * (e + 1) * r * r)


@jit
def mish(x):
    y, _ = mish_and_slope(x)
    return y


@jit
def simnorm(x, GROUP: tl.constexpr):
    """Softmax within groups of GROUP neighbouring columns of x [M, N]; N is a multiple of GROUP."""
    grouped = tl.reshape(x, (x.shape[0], x.shape[1] // GROUP, GROUP))
    e = tl.exp(grouped - tl.max(grouped, 2)[:, :, None])
    return tl.reshape(e / tl.sum(e, 2)[:, :, None], (x.shape[0], x.shape[1]))


@jit
def group_sums(x, GROUP: tl.constexpr):
    """Every element of x [M, N] replaced by the sum of its group."""
    grouped = tl.reshape(x, (x.shape[0], x.shape[1] // GROUP, GROUP))
    sums = tl.broadcast_to(tl.sum(grouped, 2)[:, :, None], grouped.shape)
    return tl.reshape(sums, (x.shape[0], x.shape[1]))


@jit
def normalised(x, mean, rstd, KIND: tl.constexpr):
    """The normalised rows n of pre-norm x [M, N]."""
    if KIND == MISH_LAYERNORM:
        x = mish(x)
    return (x - mean[:, None]) * rstd[:, None]


@jit
def activated(x, mean, rstd, gain, shift, KIND: tl.constexpr, GROUP: tl.constexpr):
    """The layer's output from its pre-norm x [M, N]; gain, shift [N]."""
    if KIND == NONE:
        return x
    u = normalised(x, mean, rstd, KIND) * gain[None, :] + shift[None, :]
    if KIND == LAYERNORM_MISH:
        u = mish(u)
    if KIND == LAYERNORM_SIMNORM:
        u = simnorm(u, GROUP)
    return u


@jit
def output_gradient(g, n, gain, shift, KIND: tl.constexpr, GROUP: tl.constexpr):
    """The gradient at n gain + shift from that at the layer's output, g [M, N]."""
    if KIND == LAYERNORM_MISH:
        _, slope = mish_and_slope(n * gain[None, :] + shift[None, :])
        g = g * slope
    if KIND == LAYERNORM_SIMNORM:
        y = simnorm(n * gain[None, :] + shift[None, :], GROUP)
        g = y * (g - group_sums(g * y, GROUP))
    return g


@jit
def pre_gradient(d, x, mean, rstd, mean_d, mean_dn, KIND: tl.constexpr):
    """The gradient at pre-norm x from that at its normalised rows: rstd (d - mean(d) - n mean(d n)), mish' beside."""
    if KIND == NONE:
        return d
    if KIND == MISH_LAYERNORM:
        v, slope = mish_and_slope(x)
        n = (v - mean[:, None]) * rstd[:, None]
        return rstd[:, None] * (d - mean_d[:, None] - n * mean_dn[:, None]) * slope
    n = (x - mean[:, None]) * rstd[:, None]
    return rstd[:, None] * (d - mean_d[:, None] - n * mean_dn[:, None])


@jit
def store_statistics(stats, rows, row_mask, tile, v, PLANE: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr):
    """Mean and squared deviations of column tile `tile` of v [BM, TILE], the layer norm's input."""
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    count = tl.minimum(N - tile * TILE, TILE)
    inside = (tl.arange(0, TILE) < count)[None, :]
    mean = tl.sum(tl.where(inside, v, 0.0), 1) / count
    deviation = tl.where(inside, v - mean[:, None], 0.0)
    tl.store(stats + rows * TILES + tile, mean, row_mask)
    tl.store(stats + PLANE + rows * TILES + tile, tl.sum(deviation * deviation, 1), row_mask)


@jit
def load_statistics(stats, rows, row_mask, PLANE: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, EPS: tl.constexpr):
    """Mean and reciprocal standard deviation [BM] of whole rows, merged from their tiles."""
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    t = tl.arange(0, triton.next_power_of_2(TILES))[None, :]
    at, inside = rows[:, None] * TILES + t, row_mask[:, None] & (t < TILES)
    means = tl.load(stats + at, inside, other=0.0)
    squares = tl.load(stats + PLANE + at, inside, other=0.0)
    count = tl.where(t < TILES, tl.minimum(N - t * TILE, TILE), 0).to(means.dtype)
    mean = tl.sum(means * count, 1) / N
    deviation = means - mean[:, None]
    variance = tl.sum(squares + count * deviation * deviation, 1) / N
    return mean, 1 / tl.sqrt(variance + EPS)


@jit
def store_sums(sums, rows, row_mask, tile, d, n, PLANE: tl.constexpr, TILES: tl.constexpr):
    """Sums of d and d n over column tile `tile`; d is zero beyond the last column."""
    tl.store(sums + rows * TILES + tile, tl.sum(d, 1), row_mask)
    tl.store(sums + PLANE + rows * TILES + tile, tl.sum(d * n, 1), row_mask)


@jit
def load_sums(sums, rows, row_mask, PLANE: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr):
    """mean(d) and mean(d n) [BM] over whole rows of N columns."""
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    t = tl.arange(0, triton.next_power_of_2(TILES))[None, :]
    at, inside = rows[:, None] * TILES + t, row_mask[:, None] & (t < TILES)
    first = tl.sum(tl.load(sums + at, inside, other=0.0), 1) / N
    return first, tl.sum(tl.load(sums + PLANE + at, inside, other=0.0), 1) / N


@jit
def forward_product(
    x, rows, row_mask, mean, rstd, gain, shift, w, cols,
    X_WIDTH: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W_WIDTH: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """activated(x) W^T [BM, BN] for rows of x (K of X_WIDTH columns) and W [N, W_WIDTH]; gain, shift point at [K]."""
    acc = tl.zeros((rows.shape[0], cols.shape[0]), ACC)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + rows[:, None] * X_WIDTH + k[None, :], row_mask[:, None] & (k < K)[None, :], other=0.0).to(ACC)
        if KIND != NONE:
            a = activated(
                a, mean, rstd, tl.load(gain + k, k < K, other=0.0), tl.load(shift + k, k < K, other=0.0), KIND, GROUP
            )
        b = tl.load(w + cols[None, :] * W_WIDTH + k[:, None], (cols < N)[None, :] & (k < K)[:, None], other=0.0)
        acc = dot(a, b, acc, ACC, DOT, PRECISION)
    return acc


@jit
def gradient_product(
    d, d_rows, x, x_rows, row_mask, mean, rstd, mean_d, mean_dn, w,
    cols, N: tl.constexpr, K: tl.constexpr, W_WIDTH: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, gain = None, GAINED: tl.constexpr = False,
):  # fmt: skip
    """pre_gradient(d) W [BM, BN] for rows of d and pre-norm x (N columns each) and W [N, W_WIDTH]; cols < K.

    GAINED: d has yet to be multiplied by the norm's `gain` [N].
    """
    acc = tl.zeros((d_rows.shape[0], cols.shape[0]), ACC)
    for start in range(0, N, BK):
        n = start + tl.arange(0, BK)
        inside = row_mask[:, None] & (n < N)[None, :]
        a = tl.load(d + d_rows[:, None] * N + n[None, :], inside, other=0.0).to(ACC)
        if GAINED:
            a *= tl.load(gain + n, n < N, other=0.0).to(ACC)[None, :]
        if KIND != NONE:
            pre = tl.load(x + x_rows[:, None] * N + n[None, :], inside, other=0.0).to(ACC)
            a = pre_gradient(a, pre, mean, rstd, mean_d, mean_dn, KIND)
        b = tl.load(w + n[:, None] * W_WIDTH + cols[None, :], (n < N)[:, None] & (cols < K)[None, :], other=0.0)
        acc = dot(a, b, acc, ACC, DOT, PRECISION)
    return acc
