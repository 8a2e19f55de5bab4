"""Backward device code of `dynamics_rollout`: gradients with respect to inputs alone, for the world model is frozen.

Every gradient is stored where a layer norm reads it: at the normalised rows, with the tile sums that the norm's own
gradient needs. One product per phase; phases as in the forward kernel, from the last step to the first.
"""

from __future__ import annotations

from typing import Any

from pwm_fast.kernels.grid_barrier import grid_barrier, phase_kernel
from pwm_fast.kernels.normed_tiles import (
    NONE,
    gradient_product,
    load_statistics,
    load_sums,
    normalised,
    output_gradient,
    store_sums,
)
from pwm_fast.kernels.rollout_layers import (
    DOWN,
    DOWN_BM,
    DOWN_BN,
    GAIN,
    KIND,
    MEMBER_STRIDE,
    PRE,
    SHIFT,
    STATS,
    SUMS,
    SUMS_TILE,
    TILE,
    K,
    N,
    W,
    place,
)
from pwm_fast.kernels.triton_support import jit, tl

_constant: Any = int if tl is None else tl.constexpr
# What a tile becomes: the gradient at the layer below, at the dynamics' input (z, a), at the actor's input z.
BELOW, STATE_AND_ACTION, STATE = (_constant(i) for i in range(3))


@jit
def store_row_gradient(
    g, cols, col_mask, n, mask, at, kept, member, grads, sums,
    pre, stats, norm, LAYER: tl.constexpr, ALL: tl.constexpr, HERE: tl.constexpr, GROUP: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store the gradient g [BM, BN] at LAYER's output: rows `at` of HERE gradients, `kept` of ALL saved ones."""
    inside = mask[:, None] & col_mask[None, :]
    if LAYER[KIND] != NONE:
        OWN_TILES: tl.constexpr = (LAYER[N] + LAYER[TILE] - 1) // LAYER[TILE]
        SUMS_TILES: tl.constexpr = (LAYER[N] + LAYER[SUMS_TILE] - 1) // LAYER[SUMS_TILE]
        mean, rstd = load_statistics(stats + LAYER[STATS], kept, mask, ALL * OWN_TILES, LAYER[N], LAYER[TILE], EPS)
        x = tl.load(pre + LAYER[PRE] + kept[:, None] * LAYER[N] + cols[None, :], inside, other=0.0).to(ACC)
        affine = norm + member * LAYER[MEMBER_STRIDE] + cols
        gain = tl.load(affine + LAYER[GAIN], col_mask, other=0.0).to(ACC)
        shift = tl.load(affine + LAYER[SHIFT], col_mask, other=0.0).to(ACC)
        x = normalised(x, mean, rstd, LAYER[KIND])
        g = output_gradient(g, x, gain, shift, LAYER[KIND], GROUP) * gain[None, :]
        g = tl.where(col_mask[None, :], g, 0.0)
        if n < SUMS_TILES:  # a tile that lies wholly among the actions has no state columns
            store_sums(sums + LAYER[SUMS], at, mask, n, g, x, HERE * SUMS_TILES, SUMS_TILES)
    to = grads + LAYER[DOWN] + at[:, None] * LAYER[N] + cols[None, :]
    tl.store(to, g.to(grads.dtype.element_ty), inside)


@jit
def gradient_phase(
    w, below_norm, grads, sums, pre, stats, d_inputs, inputs,
    d_action, step, OUT: tl.constexpr, SELF: tl.constexpr, BELOW_LAYER: tl.constexpr, LAST: tl.constexpr,
    MLP_DOWN: tl.constexpr, DZ: tl.constexpr, DETACH: tl.constexpr, OWN_OUTER: tl.constexpr, own_base,
    MEMBERS: tl.constexpr, P: tl.constexpr, H: tl.constexpr, B: tl.constexpr, Z: tl.constexpr, A: tl.constexpr,
    GROUP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """All tiles of the gradient at the input of layer SELF; `below_norm` holds gain and shift of the layer below."""
    ROWS: tl.constexpr = P * B // MEMBERS
    ALL: tl.constexpr = P * H * B
    TM: tl.constexpr = SELF[DOWN_BM]
    TN: tl.constexpr = SELF[DOWN_BN]
    TILES_N: tl.constexpr = (SELF[K] + TN - 1) // TN
    TILES: tl.constexpr = MEMBERS * ((ROWS + TM - 1) // TM) * TILES_N
    tile = tl.program_id(0)
    while tile < TILES:
        member, n, mask, policy, b = place(tile, TILES_N, ROWS, B, TM)
        at = policy * B + b
        kept = policy * OWN_OUTER + b + own_base
        mean, rstd, mean_d, mean_dn = 0.0, 1.0, 0.0, 0.0
        if SELF[KIND] != NONE:
            OWN_TILES: tl.constexpr = (SELF[N] + SELF[TILE] - 1) // SELF[TILE]
            SUMS_TILES: tl.constexpr = (SELF[N] + SELF[SUMS_TILE] - 1) // SELF[SUMS_TILE]
            mean, rstd = load_statistics(stats + SELF[STATS], kept, mask, ALL * OWN_TILES, SELF[N], SELF[TILE], EPS)
            mean_d, mean_dn = load_sums(sums + SELF[SUMS], at, mask, P * B * SUMS_TILES, SELF[N], SELF[SUMS_TILE])
        cols = n * TN + tl.arange(0, TN)
        g = gradient_product(
            grads + SELF[DOWN], at, pre + SELF[PRE], kept, mask, mean, rstd, mean_d, mean_dn,
            w + member * SELF[MEMBER_STRIDE] + SELF[W], cols, SELF[N], SELF[K], SELF[K], SELF[KIND], ACC, DOT,
            PRECISION, BK,
        )  # fmt: skip
        state = cols < (Z if OUT != BELOW else SELF[K])
        inside = mask[:, None] & state[None, :]
        if OUT == BELOW:
            store_row_gradient(
                g, cols, state, n, mask, at, kept, member, grads, sums, pre, stats, below_norm, BELOW_LAYER, ALL,
                P * B, GROUP, EPS, ACC,
            )  # fmt: skip
        else:
            before = (step - 1) * P * B + at  # the dynamics' rows that became this step's z
            if OUT == STATE_AND_ACTION:
                whole = mask[:, None] & (cols < Z + A)[None, :]
                row = (step * P * B + at)[:, None] * (Z + A) + cols[None, :]
                g += tl.load(d_inputs + row, whole, other=0.0).to(ACC)
                column = (cols - Z)[None, :]
                acts = whole & (column >= 0)
                to = d_action + (policy * H * B + step * B + b)[:, None] * A + column
                tl.store(to, g.to(d_action.dtype.element_ty), acts)
                if not DETACH:
                    a = tl.load(inputs + row, acts, other=0.0).to(ACC)
                    mlp = grads + MLP_DOWN + at[:, None] * A + column
                    tl.store(mlp, (g * (1 - a * a)).to(grads.dtype.element_ty), acts)
                if LAST[KIND] == NONE:  # z' = z + change: z' hands its own gradient on
                    g += tl.load(grads + LAST[DOWN] + at[:, None] * Z + cols[None, :], inside, other=0.0).to(ACC)
            else:
                g += tl.load(grads + DZ + at[:, None] * Z + cols[None, :], inside, other=0.0).to(ACC)
            if OUT == STATE_AND_ACTION and not DETACH:
                tl.store(grads + DZ + at[:, None] * Z + cols[None, :], g.to(grads.dtype.element_ty), inside)
            else:
                if step > 0:
                    store_row_gradient(
                        g, cols, state, n, mask, at, before, 0, grads, sums, pre, stats, below_norm, LAST, ALL, P * B,
                        GROUP, EPS, ACC,
                    )  # fmt: skip
        tile += tl.num_programs(0)


@jit
def start_phase(
    d_last, grads, sums, pre, stats, norm, LAST: tl.constexpr, P: tl.constexpr,
    H: tl.constexpr, B: tl.constexpr, Z: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient at z_H, brought to where the dynamics' last norm reads it."""
    TM: tl.constexpr = 16
    TN: tl.constexpr = LAST[SUMS_TILE]
    TILES_N: tl.constexpr = (Z + TN - 1) // TN
    tile = tl.program_id(0)
    while tile < (P * B + TM - 1) // TM * TILES_N:
        _, n, mask, policy, b = place(tile, TILES_N, P * B, B, TM)
        at = policy * B + b
        cols = n * TN + tl.arange(0, TN)
        g = tl.load(d_last + at[:, None] * Z + cols[None, :], mask[:, None] & (cols < Z)[None, :], other=0.0).to(ACC)
        store_row_gradient(
            g, cols, cols < Z, n, mask, at, (H - 1) * P * B + at, 0, grads, sums, pre, stats, norm, LAST, P * H * B,
            P * B, GROUP, EPS, ACC,
        )  # fmt: skip
        tile += tl.num_programs(0)


@phase_kernel
def rollout_backward_kernel(
    d_inputs, d_last, d_action, inputs, actor, world, vectors, pre,
    stats, grads, sums, counter, first_phase, last_phase, ACTOR: tl.constexpr,
    DYNAMICS: tl.constexpr, DZ: tl.constexpr, DETACH: tl.constexpr, P: tl.constexpr, H: tl.constexpr,
    B: tl.constexpr, Z: tl.constexpr, A: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Phase 0 places the gradient at z_H; then per step, from the last, the dynamics' layers (and the actors')."""
    NA: tl.constexpr = len(ACTOR)
    ND: tl.constexpr = len(DYNAMICS)
    PER: tl.constexpr = ND if DETACH else ND + NA
    LAST: tl.constexpr = DYNAMICS[ND - 1]
    MLP: tl.constexpr = ACTOR[NA - 1]
    if first_phase == 0:
        start_phase(d_last, grads, sums, pre, stats, vectors, LAST, P, H, B, Z, GROUP, EPS, ACC)
        if last_phase > 1:
            grid_barrier(counter)
    back = tl.maximum(first_phase - 1, 0) // PER
    while back * PER + 1 < last_phase:
        step = H - 1 - back
        phase = back * PER + 1
        for i in tl.static_range(PER):
            if (phase + i >= first_phase) & (phase + i < last_phase):
                if i < ND - 1:
                    gradient_phase(
                        world, vectors, grads, sums, pre, stats, d_inputs, inputs, d_action, step, BELOW,
                        tl.constexpr(DYNAMICS[ND - 1 - i]), tl.constexpr(DYNAMICS[ND - 2 - i]), LAST, MLP[DOWN], DZ,
                        DETACH, B, step * P * B, 1, P, H, B, Z, A, GROUP, EPS, ACC, DOT, PRECISION, BK,
                    )  # fmt: skip
                elif i == ND - 1:
                    gradient_phase(
                        world, vectors, grads, sums, pre, stats, d_inputs, inputs, d_action, step, STATE_AND_ACTION,
                        tl.constexpr(DYNAMICS[0]), LAST, LAST, MLP[DOWN], DZ, DETACH, B, step * P * B, 1, P, H, B, Z,
                        A, GROUP, EPS, ACC, DOT, PRECISION, BK,
                    )  # fmt: skip
                elif step > 0:
                    if i < PER - 1:
                        gradient_phase(
                            actor, actor, grads, sums, pre, stats, d_inputs, inputs, d_action, step, BELOW,
                            tl.constexpr(ACTOR[PER - 1 - i]), tl.constexpr(ACTOR[PER - 2 - i]), LAST, MLP[DOWN], DZ,
                            DETACH, H * B, step * B, P, P, H, B, Z, A, GROUP, EPS, ACC, DOT, PRECISION, BK,
                        )  # fmt: skip
                    else:
                        gradient_phase(
                            actor, vectors, grads, sums, pre, stats, d_inputs, inputs, d_action, step, STATE,
                            tl.constexpr(ACTOR[0]), LAST, LAST, MLP[DOWN], DZ, DETACH, H * B, step * B, P, P, H, B, Z,
                            A, GROUP, EPS, ACC, DOT, PRECISION, BK,
                        )  # fmt: skip
                if phase + i + 1 < last_phase:
                    grid_barrier(counter)
        back += 1
