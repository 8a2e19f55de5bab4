"""Forward device code of `dynamics_rollout`: H steps of actors and frozen dynamics as a sequence of phases.

A phase is one layer of one step; its tiles are dealt to the programs in turn, and a grid barrier separates phases that
run in one launch.
"""

from __future__ import annotations

from typing import Any

from pwm_fast.kernels.grid_barrier import grid_barrier, phase_kernel
from pwm_fast.kernels.normed_tiles import (
    MISH_LAYERNORM,
    NONE,
    activated,
    forward_product,
    load_statistics,
    mish,
    store_statistics,
)
from pwm_fast.kernels.rollout_layers import (
    BIAS,
    BIAS_STRIDE,
    BM,
    BN,
    GAIN,
    KIND,
    MEMBER_STRIDE,
    PRE,
    SHIFT,
    STATS,
    TILE,
    K,
    N,
    W,
    place,
)
from pwm_fast.kernels.triton_support import jit, tl

_constant: Any = int if tl is None else tl.constexpr
# What a tile becomes: pre-norm rows, actions, or the change of a residual state.
HIDDEN, ACTION, CHANGE = (_constant(i) for i in range(3))


@jit
def layer_phase(
    x, x_base, stats, norm, w, vectors, pre, own_base, inputs,
    latents, noise, step, log_std, OUT: tl.constexpr, SELF: tl.constexpr, PREVIOUS: tl.constexpr,
    KIND_IN: tl.constexpr, X_WIDTH: tl.constexpr, X_OUTER: tl.constexpr, OWN_OUTER: tl.constexpr,
    MEMBERS: tl.constexpr, P: tl.constexpr, H: tl.constexpr, B: tl.constexpr, Z: tl.constexpr, A: tl.constexpr,
    GROUP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """All tiles of one layer. `norm` holds gain and shift of the PREVIOUS layer, whose pre-norm rows x are."""
    ROWS: tl.constexpr = P * B // MEMBERS
    ALL: tl.constexpr = P * H * B
    TN: tl.constexpr = SELF[BN]
    TILES_N: tl.constexpr = (SELF[N] + TN - 1) // TN
    TILES: tl.constexpr = MEMBERS * ((ROWS + SELF[BM] - 1) // SELF[BM]) * TILES_N
    tile = tl.program_id(0)
    while tile < TILES:
        member, n, mask, policy, b = place(tile, TILES_N, ROWS, B, SELF[BM])
        x_rows = policy * X_OUTER + b + x_base
        mean, rstd, gain, shift = 0.0, 1.0, norm, norm
        if KIND_IN != NONE:
            IN_TILES: tl.constexpr = (PREVIOUS[N] + PREVIOUS[TILE] - 1) // PREVIOUS[TILE]
            mean, rstd = load_statistics(
                stats + PREVIOUS[STATS], x_rows, mask, ALL * IN_TILES, PREVIOUS[N], PREVIOUS[TILE], EPS
            )
            gain = norm + member * PREVIOUS[MEMBER_STRIDE] + PREVIOUS[GAIN]
            shift = norm + member * PREVIOUS[MEMBER_STRIDE] + PREVIOUS[SHIFT]
        cols = n * TN + tl.arange(0, TN)
        acc = forward_product(
            x, x_rows, mask, mean, rstd, gain, shift, w + member * SELF[MEMBER_STRIDE] + SELF[W], cols,
            X_WIDTH, SELF[K], SELF[N], SELF[K], KIND_IN, GROUP, ACC, DOT, PRECISION, BK,
        )  # fmt: skip
        inside = mask[:, None] & (cols < SELF[N])[None, :]
        bias = vectors + SELF[BIAS] + policy[:, None] * SELF[BIAS_STRIDE] + cols[None, :]
        acc += tl.load(bias, inside, other=0.0).to(ACC)
        own = policy * OWN_OUTER + b + own_base
        if OUT == HIDDEN:
            tl.store(pre + SELF[PRE] + own[:, None] * SELF[N] + cols[None, :], acc.to(pre.dtype.element_ty), inside)
            if SELF[KIND] == MISH_LAYERNORM:
                acc = mish(acc)
            store_statistics(stats + SELF[STATS], own, mask, n, acc, ALL * TILES_N, SELF[N], TN)
        at = policy * B + b  # row of [P, B]
        if OUT == ACTION:
            std = tl.exp(tl.load(log_std + policy[:, None] * SELF[MEMBER_STRIDE] + cols[None, :], inside, other=0.0))
            eps = tl.load(noise + own[:, None] * A + cols[None, :], inside, other=0.0).to(ACC)
            e = tl.exp(-2 * tl.abs(acc + std.to(ACC) * eps))
            action = tl.where(acc + std.to(ACC) * eps < 0, -1.0, 1.0) * (1 - e) / (1 + e)
            to = inputs + (step * P * B + at)[:, None] * (Z + A) + Z + cols[None, :]
            tl.store(to, action.to(inputs.dtype.element_ty), inside)
        if OUT == CHANGE:
            now = inputs + (step * P * B + at)[:, None] * (Z + A) + cols[None, :]
            z = acc + tl.load(now, inside, other=0.0).to(ACC)
            z = z.to(inputs.dtype.element_ty)
            tl.store(now + P * B * (Z + A), z, inside)
            kept = policy * (H + 1) * B + (step + 1) * B + b
            tl.store(latents + kept[:, None] * Z + cols[None, :], z, inside)
        tile += tl.num_programs(0)


@jit
def latent_phase(
    pre, stats, vectors, inputs, latents, step, LAST: tl.constexpr, P: tl.constexpr,
    H: tl.constexpr, B: tl.constexpr, Z: tl.constexpr, A: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Store z_step, the SimNorm of what the dynamics' LAST layer left in the step before."""
    TM: tl.constexpr = 16
    TN: tl.constexpr = 64
    TILES_N: tl.constexpr = (Z + TN - 1) // TN
    IN_TILES: tl.constexpr = (Z + LAST[TILE] - 1) // LAST[TILE]
    # From the last program down: the first ones have this phase's products to do.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    while tile < (P * B + TM - 1) // TM * TILES_N:
        _, n, mask, policy, b = place(tile, TILES_N, P * B, B, TM)
        rows = (step - 1) * P * B + policy * B + b
        mean, rstd = load_statistics(stats + LAST[STATS], rows, mask, P * H * B * IN_TILES, Z, LAST[TILE], EPS)
        cols = n * TN + tl.arange(0, TN)
        inside = mask[:, None] & (cols < Z)[None, :]
        x = tl.load(pre + LAST[PRE] + rows[:, None] * Z + cols[None, :], inside, other=0.0).to(ACC)
        gain = tl.load(vectors + LAST[GAIN] + cols, cols < Z, other=0.0).to(ACC)
        shift = tl.load(vectors + LAST[SHIFT] + cols, cols < Z, other=0.0).to(ACC)
        z = activated(x, mean, rstd, gain, shift, LAST[KIND], GROUP).to(inputs.dtype.element_ty)
        tl.store(inputs + (rows + P * B)[:, None] * (Z + A) + cols[None, :], z, inside)
        kept = policy * (H + 1) * B + step * B + b
        tl.store(latents + kept[:, None] * Z + cols[None, :], z, inside)
        tile += tl.num_programs(0)


@phase_kernel
def rollout_forward_kernel(
    inputs, latents, noise, actor, world, vectors, pre, stats, counter,
    first_phase, last_phase, ACTOR: tl.constexpr, DYNAMICS: tl.constexpr, LOG_STD: tl.constexpr,
    P: tl.constexpr, H: tl.constexpr, B: tl.constexpr, Z: tl.constexpr, A: tl.constexpr, GROUP: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Phases first_phase .. last_phase - 1 of H (actor layers + dynamics layers), then one to store a SimNorm z_H."""
    NA: tl.constexpr = len(ACTOR)
    ND: tl.constexpr = len(DYNAMICS)
    PER: tl.constexpr = NA + ND
    LAST: tl.constexpr = DYNAMICS[ND - 1]
    step = first_phase // PER
    while step * PER < last_phase:
        phase = step * PER
        state, own, kept = step * P * B, step * B, (step - 1) * P * B
        for i in tl.static_range(PER):
            if (phase + i >= first_phase) & (phase + i < last_phase):
                if i == 0:
                    if LAST[KIND] == NONE:
                        layer_phase(
                            inputs, state, stats, actor, actor, actor, pre, own, inputs, latents, noise, step,
                            actor + LOG_STD, HIDDEN, tl.constexpr(ACTOR[0]), tl.constexpr(ACTOR[0]), NONE, Z + A, B,
                            H * B, P, P, H, B, Z, A, GROUP, EPS, ACC, DOT, PRECISION, BK,
                        )  # fmt: skip
                    else:
                        if step == 0:
                            layer_phase(
                                inputs, state, stats, actor, actor, actor, pre, own, inputs, latents, noise, step,
                                actor + LOG_STD, HIDDEN, tl.constexpr(ACTOR[0]), tl.constexpr(ACTOR[0]), NONE, Z + A,
                                B, H * B, P, P, H, B, Z, A, GROUP, EPS, ACC, DOT, PRECISION, BK,
                            )  # fmt: skip
                        else:
                            if step < H:
                                layer_phase(
                                    pre + LAST[PRE], kept, stats, vectors, actor, actor, pre, own, inputs, latents,
                                    noise, step, actor + LOG_STD, HIDDEN, tl.constexpr(ACTOR[0]), LAST, LAST[KIND], Z,
                                    B, H * B, P, P, H, B, Z, A, GROUP, EPS, ACC, DOT, PRECISION, BK,
                                )  # fmt: skip
                            latent_phase(
                                pre, stats, vectors, inputs, latents, step, LAST, P, H, B, Z, A, GROUP, EPS, ACC
                            )
                elif i < NA:
                    layer_phase(
                        pre + ACTOR[i - 1][PRE], own, stats, actor, actor, actor, pre, own, inputs, latents, noise,
                        step, actor + LOG_STD, ACTION if i == NA - 1 else HIDDEN, tl.constexpr(ACTOR[i]),
                        tl.constexpr(ACTOR[i - 1]), ACTOR[i - 1][KIND], ACTOR[i - 1][N], H * B, H * B, P, P, H, B, Z,
                        A, GROUP, EPS, ACC, DOT, PRECISION, BK,
                    )  # fmt: skip
                elif i == NA:
                    layer_phase(
                        inputs, state, stats, vectors, world, vectors, pre, state, inputs, latents, noise, step, actor,
                        HIDDEN, tl.constexpr(DYNAMICS[0]), tl.constexpr(DYNAMICS[0]), NONE, Z + A, B, B, 1, P, H, B, Z,
                        A, GROUP, EPS, ACC, DOT, PRECISION, BK,
                    )  # fmt: skip
                else:
                    layer_phase(
                        pre + DYNAMICS[i - NA - 1][PRE], state, stats, vectors, world, vectors, pre, state, inputs,
                        latents, noise, step, actor, CHANGE if DYNAMICS[i - NA][KIND] == NONE else HIDDEN,
                        tl.constexpr(DYNAMICS[i - NA]), tl.constexpr(DYNAMICS[i - NA - 1]), DYNAMICS[i - NA - 1][KIND],
                        DYNAMICS[i - NA - 1][N], B, B, 1, P, H, B, Z, A, GROUP, EPS, ACC, DOT, PRECISION, BK,
                    )  # fmt: skip
                if phase + i + 1 < last_phase:
                    grid_barrier(counter)
        step += 1
