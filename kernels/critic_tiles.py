"""Device code of `critic_epoch`: what one phase of a minibatch step does, tile by tile.

Members g = p K + k are a policy's K critics. Buffers of rows are [P K, R, .]; a minibatch has `count` <= R rows.
Gradients kept between phases are those at a norm's scaled and shifted output, du, for gain and shift learn here; their
sums are of d = du gain. Every gradient tile also leaves its sum of squares, from which Adam's phase has the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from pwm_fast.kernels.normed_linear import tile_shape
from pwm_fast.kernels.normed_tiles import (
    MISH_LAYERNORM,
    NONE,
    activated,
    dot,
    forward_product,
    gradient_product,
    load_statistics,
    load_sums,
    mish,
    normalised,
    pre_gradient,
    store_statistics,
    store_sums,
)
from pwm_fast.kernels.triton_support import jit, tl, triton

_constant: Any = int if tl is None else tl.constexpr


class CriticLayer(NamedTuple):
    """One hidden layer as kernels see it; offsets in elements, those of parameters from a member's row."""

    k: int  # inputs
    n: int  # outputs
    w: int  # W [n, k]
    bias: int
    gain: int
    shift: int
    pre: int  # pre-norm rows
    stats: int  # their statistics; tiles of bn columns
    du: int  # gradient rows
    sums: int  # sums of d and d n; tiles of sums_tile columns
    sums_tile: int
    bm: int  # tile of the forward product
    bn: int
    down_bm: int  # tile of the gradient product that makes what lies below
    down_bn: int
    w_bm: int  # tile of the weight gradient
    w_bn: int
    squares: int  # first slot of this layer's sums of squares: weight tiles, then vector tiles
    above_w: int  # of the last hidden layer: the output layer's W [1, n] and bias
    above_bias: int


(
    K, N, W, BIAS, GAIN, SHIFT, PRE, STATS, DU, SUMS, SUMS_TILE, BM, BN, DOWN_BM, DOWN_BN, W_BM, W_BN, SQUARES,
    ABOVE_W, ABOVE_BIAS,
) = (_constant(i) for i in range(len(CriticLayer._fields)))  # fmt: skip
VECTOR_COLUMNS = 32  # of a tile of bias, gain and shift
VECTOR = _constant(VECTOR_COLUMNS)
CHUNK = _constant(16)  # rows of a step of the sums over rows


def plan_critics(
    widths: Sequence[int], offset: Callable[[str], int], members: int, rows: int, programs: int
) -> tuple[list[int], int, list[CriticLayer]]:
    """Elements of pre-norm rows, statistics, gradients and sums; slots of squares per member; the hidden layers.

    `widths` are latent, hidden layers, 1; `offset` gives the start of parameters by name within a member's row.
    """
    hidden = list(pairwise(widths[:-1]))
    downs = [tile_shape(rows, k, members, programs) for k, _ in hidden]
    sizes, slots, layers = [0, 0, 0, 0], 0, []
    for i, (k, n) in enumerate(hidden):
        bm, bn = tile_shape(rows, n, members, programs)
        w_bm, w_bn = tile_shape(n, k, members, programs)
        last = i == len(hidden) - 1
        sums_tile = n if last else downs[i + 1][1]
        names = (f"{i}.weight", f"{i}.bias", f"{i}.ln.weight", f"{i}.ln.bias")
        above = (offset(f"{i + 1}.weight"), offset(f"{i + 1}.bias")) if last else (0, 0)
        own = (*map(offset, names), *sizes, sums_tile, bm, bn, *downs[i], w_bm, w_bn, slots, *above)
        layers.append(CriticLayer(k, n, *own))
        slots += -(-n // w_bm) * -(-k // w_bn) + -(-n // VECTOR_COLUMNS)
        per_row = (n, 2 * -(-n // bn), n, 2 * -(-n // sums_tile))
        sizes = [size + members * rows * columns for size, columns in zip(sizes, per_row)]
    return sizes, slots, layers


@jit
def norm_of(stats, rows, mask, LAYER: tl.constexpr, ALL: tl.constexpr, EPS: tl.constexpr):
    TILES: tl.constexpr = (LAYER[N] + LAYER[BN] - 1) // LAYER[BN]
    return load_statistics(stats + LAYER[STATS], rows, mask, ALL * TILES, LAYER[N], LAYER[BN], EPS)


@jit
def sums_of(sums, rows, mask, LAYER: tl.constexpr, ALL: tl.constexpr):
    TILES: tl.constexpr = (LAYER[N] + LAYER[SUMS_TILE] - 1) // LAYER[SUMS_TILE]
    return load_sums(sums + LAYER[SUMS], rows, mask, ALL * TILES, LAYER[N], LAYER[SUMS_TILE])


@jit
def forward_tile(
    tile, x, picks, pre, stats, param, count, FIRST: tl.constexpr,
    SELF: tl.constexpr, PREVIOUS: tl.constexpr, G: tl.constexpr, KC: tl.constexpr, R: tl.constexpr,
    X_ROWS: tl.constexpr, PICKS: tl.constexpr, STRIDE: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pre-norm rows of SELF with their statistics; the FIRST layer gathers its rows of x [P, X_ROWS, k] by `picks`."""
    TM: tl.constexpr = SELF[BM]
    TN: tl.constexpr = SELF[BN]
    TILES_N: tl.constexpr = (SELF[N] + TN - 1) // TN
    TILES_M: tl.constexpr = (R + TM - 1) // TM
    g, n = tile // (TILES_M * TILES_N), tile % TILES_N
    r = tile // TILES_N % TILES_M * TM + tl.arange(0, TM)
    mask = r < count
    own = g * R + r
    cols = n * TN + tl.arange(0, TN)
    mine = param + g * STRIDE
    if FIRST:
        rows = g // KC * X_ROWS + tl.load(picks + g // KC * PICKS + r, mask, other=0).to(tl.int32)
        acc = forward_product(
            x, rows, mask, 0.0, 1.0, mine, mine, mine + SELF[W], cols, SELF[K], SELF[K], SELF[N], SELF[K], NONE, 8,
            ACC, DOT, PRECISION, BK,
        )  # fmt: skip
    else:
        mean, rstd = norm_of(stats, own, mask, PREVIOUS, G * R, EPS)
        acc = forward_product(
            pre + PREVIOUS[PRE], own, mask, mean, rstd, mine + PREVIOUS[GAIN], mine + PREVIOUS[SHIFT], mine + SELF[W],
            cols, SELF[K], SELF[K], SELF[N], SELF[K], MISH_LAYERNORM, 8, ACC, DOT, PRECISION, BK,
        )  # fmt: skip
    acc += tl.load(mine + SELF[BIAS] + cols, cols < SELF[N], other=0.0)[None, :]
    at = pre + SELF[PRE] + own[:, None] * SELF[N] + cols[None, :]
    tl.store(at, acc, mask[:, None] & (cols < SELF[N])[None, :])
    store_statistics(stats + SELF[STATS], own, mask, n, mish(acc), G * R * TILES_N, SELF[N], TN)


@jit
def value_tile(
    tile, targets, picks, pre, stats, grads, sums, errors, losses,
    param, count, SELF: tl.constexpr, G: tl.constexpr, KC: tl.constexpr, R: tl.constexpr,
    T_ROWS: tl.constexpr, PICKS: tl.constexpr, STRIDE: tl.constexpr, EPS: tl.constexpr, TM: tl.constexpr,
):  # fmt: skip
    """Values of whole rows, dL / dv = 2 (v - target) / (K count), squared errors, and du of the last hidden layer."""
    WIDTH: tl.constexpr = triton.next_power_of_2(SELF[N])
    TILES_M: tl.constexpr = (R + TM - 1) // TM
    g = tile // TILES_M
    r = tile % TILES_M * TM + tl.arange(0, TM)
    mask = r < count
    own = g * R + r
    cols = tl.arange(0, WIDTH)
    inside = mask[:, None] & (cols < SELF[N])[None, :]
    mine = param + g * STRIDE
    mean, rstd = norm_of(stats, own, mask, SELF, G * R, EPS)
    x = tl.load(pre + SELF[PRE] + own[:, None] * SELF[N] + cols[None, :], inside, other=0.0)
    gain = tl.load(mine + SELF[GAIN] + cols, cols < SELF[N], other=0.0)
    shift = tl.load(mine + SELF[SHIFT] + cols, cols < SELF[N], other=0.0)
    w = tl.load(mine + SELF[ABOVE_W] + cols, cols < SELF[N], other=0.0)
    n = normalised(x, mean, rstd, MISH_LAYERNORM)
    v = tl.sum((n * gain[None, :] + shift[None, :]) * w[None, :], 1) + tl.load(mine + SELF[ABOVE_BIAS])
    pick = tl.load(picks + g // KC * PICKS + r, mask, other=0)
    error = tl.where(mask, v - tl.load(targets + g // KC * T_ROWS + pick, mask, other=0.0), 0.0)
    tl.store(losses + tile, tl.sum(error * error, 0))
    error = error * (2.0 / (KC * count.to(error.dtype)))
    tl.store(errors + own, error, mask)
    du = error[:, None] * w[None, :]
    tl.store(grads + SELF[DU] + own[:, None] * SELF[N] + cols[None, :], du, inside)
    store_sums(sums + SELF[SUMS], own, mask, 0, du * gain[None, :], n, G * R, 1)


@jit
def down_tile(
    tile, pre, stats, grads, sums, param, count, SELF: tl.constexpr,
    BELOW: tl.constexpr, G: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """du of the layer BELOW, and the sums of its d."""
    TM: tl.constexpr = SELF[DOWN_BM]
    TN: tl.constexpr = SELF[DOWN_BN]
    TILES_N: tl.constexpr = (SELF[K] + TN - 1) // TN
    TILES_M: tl.constexpr = (R + TM - 1) // TM
    g, t = tile // (TILES_M * TILES_N), tile % TILES_N
    r = tile // TILES_N % TILES_M * TM + tl.arange(0, TM)
    mask = r < count
    own = g * R + r
    cols = t * TN + tl.arange(0, TN)
    inside = mask[:, None] & (cols < SELF[K])[None, :]
    mine = param + g * STRIDE
    mean, rstd = norm_of(stats, own, mask, SELF, G * R, EPS)
    mean_d, mean_dn = sums_of(sums, own, mask, SELF, G * R)
    du = gradient_product(
        grads + SELF[DU], own, pre + SELF[PRE], own, mask, mean, rstd, mean_d, mean_dn, mine + SELF[W], cols, SELF[N],
        SELF[K], SELF[K], MISH_LAYERNORM, ACC, DOT, PRECISION, BK, mine + SELF[GAIN], True,
    )  # fmt: skip
    mean, rstd = norm_of(stats, own, mask, BELOW, G * R, EPS)
    at = own[:, None] * SELF[K] + cols[None, :]
    n = normalised(tl.load(pre + BELOW[PRE] + at, inside, other=0.0), mean, rstd, MISH_LAYERNORM)
    gain = tl.load(mine + BELOW[GAIN] + cols, cols < SELF[K], other=0.0)
    tl.store(grads + BELOW[DU] + at, du, inside)
    store_sums(sums + BELOW[SUMS], own, mask, t, du * gain[None, :], n, G * R * TILES_N, TILES_N)


@jit
def weight_tile(
    tile, x, picks, pre, stats, grads, sums, param, grad,
    squares, count, FIRST: tl.constexpr, SELF: tl.constexpr, PREVIOUS: tl.constexpr, G: tl.constexpr,
    KC: tl.constexpr, R: tl.constexpr, X_ROWS: tl.constexpr, PICKS: tl.constexpr, STRIDE: tl.constexpr,
    SLOTS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW [n, k]: the sum over rows of the gradient at SELF's pre-norm rows times its input rows."""
    TM: tl.constexpr = SELF[W_BM]
    TN: tl.constexpr = SELF[W_BN]
    TILES_M: tl.constexpr = (SELF[N] + TM - 1) // TM
    TILES_N: tl.constexpr = (SELF[K] + TN - 1) // TN
    g, t = tile // (TILES_M * TILES_N), tile % (TILES_M * TILES_N)
    outs = t // TILES_N * TM + tl.arange(0, TM)
    ins = t % TILES_N * TN + tl.arange(0, TN)
    mine = param + g * STRIDE
    gain = tl.load(mine + SELF[GAIN] + outs, outs < SELF[N], other=0.0)
    acc = tl.zeros((TM, TN), ACC)
    for start in range(0, R, CHUNK):
        r = start + tl.arange(0, CHUNK)
        mask = r < count
        own = g * R + r
        inside = mask[:, None] & (outs < SELF[N])[None, :]
        at = own[:, None] * SELF[N] + outs[None, :]
        mean, rstd = norm_of(stats, own, mask, SELF, G * R, EPS)
        mean_d, mean_dn = sums_of(sums, own, mask, SELF, G * R)
        d = tl.load(grads + SELF[DU] + at, inside, other=0.0) * gain[None, :]
        d = pre_gradient(
            d, tl.load(pre + SELF[PRE] + at, inside, other=0.0), mean, rstd, mean_d, mean_dn, MISH_LAYERNORM
        )
        d = tl.where(inside, d, 0.0)
        seen = mask[:, None] & (ins < SELF[K])[None, :]
        if FIRST:
            rows = g // KC * X_ROWS + tl.load(picks + g // KC * PICKS + r, mask, other=0).to(tl.int32)
            y = tl.load(x + rows[:, None] * SELF[K] + ins[None, :], seen, other=0.0)
        else:
            mean, rstd = norm_of(stats, own, mask, PREVIOUS, G * R, EPS)
            y = tl.load(pre + PREVIOUS[PRE] + own[:, None] * SELF[K] + ins[None, :], seen, other=0.0)
            scale = tl.load(mine + PREVIOUS[GAIN] + ins, ins < SELF[K], other=0.0)
            shift = tl.load(mine + PREVIOUS[SHIFT] + ins, ins < SELF[K], other=0.0)
            y = activated(y, mean, rstd, scale, shift, MISH_LAYERNORM, 8)
        acc = dot(tl.trans(d), y, acc, ACC, DOT, PRECISION)
    inside = (outs < SELF[N])[:, None] & (ins < SELF[K])[None, :]
    acc = tl.where(inside, acc, 0.0)
    tl.store(grad + g * STRIDE + SELF[W] + outs[:, None] * SELF[K] + ins[None, :], acc, inside)
    tl.store(squares + g * SLOTS + SELF[SQUARES] + t, tl.sum(tl.sum(acc * acc, 1), 0))


@jit
def vector_tile(
    tile, pre, stats, grads, sums, errors, param, grad,
    squares, count, LAST: tl.constexpr, SELF: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    STRIDE: tl.constexpr, SLOTS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of bias, gain and shift; of the LAST hidden layer also those of the output layer that reads it."""
    TILES: tl.constexpr = (SELF[N] + VECTOR - 1) // VECTOR
    g, t = tile // TILES, tile % TILES
    cols = t * VECTOR + tl.arange(0, VECTOR)
    used = cols < SELF[N]
    mine, out = param + g * STRIDE, grad + g * STRIDE
    gain = tl.load(mine + SELF[GAIN] + cols, used, other=0.0)
    shift = tl.load(mine + SELF[SHIFT] + cols, used, other=0.0)
    d_bias = tl.zeros((VECTOR,), ACC)
    d_gain = tl.zeros((VECTOR,), ACC)
    d_shift = tl.zeros((VECTOR,), ACC)
    d_above = tl.zeros((VECTOR,), ACC)
    d_above_bias = tl.zeros((CHUNK,), ACC)
    for start in range(0, R, CHUNK):
        r = start + tl.arange(0, CHUNK)
        mask = r < count
        own = g * R + r
        inside = mask[:, None] & used[None, :]
        at = own[:, None] * SELF[N] + cols[None, :]
        mean, rstd = norm_of(stats, own, mask, SELF, G * R, EPS)
        mean_d, mean_dn = sums_of(sums, own, mask, SELF, G * R)
        x = tl.load(pre + SELF[PRE] + at, inside, other=0.0)
        du = tl.load(grads + SELF[DU] + at, inside, other=0.0)
        d = pre_gradient(du * gain[None, :], x, mean, rstd, mean_d, mean_dn, MISH_LAYERNORM)
        n = normalised(x, mean, rstd, MISH_LAYERNORM)
        d_bias += tl.sum(tl.where(inside, d, 0.0), 0)
        d_gain += tl.sum(du * n, 0)
        d_shift += tl.sum(du, 0)
        if LAST:
            error = tl.load(errors + own, mask, other=0.0)
            d_above += tl.sum(error[:, None] * (n * gain[None, :] + shift[None, :]), 0)
            d_above_bias += error
    tl.store(out + SELF[BIAS] + cols, d_bias, used)
    tl.store(out + SELF[GAIN] + cols, d_gain, used)
    tl.store(out + SELF[SHIFT] + cols, d_shift, used)
    total = tl.sum(d_bias * d_bias + d_gain * d_gain + d_shift * d_shift, 0)
    if LAST:
        tl.store(out + SELF[ABOVE_W] + cols, d_above, used)
        total += tl.sum(d_above * d_above, 0)
        bias = tl.sum(d_above_bias, 0)
        tl.store(out + SELF[ABOVE_BIAS], bias, t == 0)
        total += tl.where(t == 0, bias * bias, 0.0)
    before: tl.constexpr = ((SELF[N] + SELF[W_BM] - 1) // SELF[W_BM]) * ((SELF[K] + SELF[W_BN] - 1) // SELF[W_BN])
    tl.store(squares + g * SLOTS + SELF[SQUARES] + before + t, total)


@jit
def adam_tile(
    tile, param, grad, m, v, squares, lr, steps, alive, norms,
    step, P: tl.constexpr, KC: tl.constexpr, STRIDE: tl.constexpr, SLOTS: tl.constexpr, MAX_NORM: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr,
    ADAM_EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Clip by the policy's norm and update, as `clip_adam`. alive [steps + 1, P] says who is still learning.

    Who is alive has been updated in every earlier step of this launch: `steps` [P] counts those of earlier launches.
    """
    SIZE: tl.constexpr = KC * STRIDE
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    p, t = tile // TILES, tile % TILES
    s = tl.arange(0, triton.next_power_of_2(KC * SLOTS))
    norm = tl.sqrt(tl.sum(tl.load(squares + p * KC * SLOTS + s, s < KC * SLOTS, other=0.0), 0))
    update = (tl.load(alive + step * P + p) != 0) & (norm < float("inf"))
    tl.store(norms + step * P + p, norm, t == 0)
    tl.store(alive + (step + 1) * P + p, update.to(tl.int32), t == 0)
    count = (tl.load(steps + p) + step + 1).to(tl.float64)
    rate = (tl.load(lr + p).to(tl.float64) / (1 - tl.exp2(count * LOG2_BETA1))).to(norm.dtype)
    root = tl.sqrt(1 - tl.exp2(count * LOG2_BETA2)).to(norm.dtype)
    scale = tl.minimum(MAX_NORM / (norm + 1e-6), 1.0)
    i = t * BLOCK + tl.arange(0, BLOCK)
    mask = (i < SIZE) & update
    at = p * SIZE + i
    clipped = tl.load(grad + at, mask, other=0.0) * scale
    old_m, old_v = tl.load(m + at, mask, other=0.0), tl.load(v + at, mask, other=0.0)
    new_m = old_m + (1 - BETA1) * (clipped - old_m)
    new_v = BETA2 * old_v + (1 - BETA2) * clipped * clipped
    tl.store(m + at, new_m, mask)
    tl.store(v + at, new_v, mask)
    tl.store(param + at, tl.load(param + at, mask, other=0.0) - rate * new_m / (tl.sqrt(new_v) / root + ADAM_EPS), mask)
