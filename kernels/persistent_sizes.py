"""Compilations of the persistent kernels and `normed_linear` at the sizes they are made for, without a GPU.

PWM's actors (400, 200, 100) and critics (3 x 400, 200), 64 states, 16 steps, on TD-MPC2's 5M and 48M.

The whole rollout or critic step is one function, so the compiler keeps a few values that never change (addresses) on
the stack: they are stored once at the start and read back once per tile, none within a product's loop (seen in the
sm_90 assembly of the critics in bfloat16). That is what `MAY_SPILL` tolerates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch

from pwm_fast.kernels import critic_epoch, normed_linear, rollout_backward, rollout_forward
from pwm_fast.kernels.ahead_of_time import Compilation
from pwm_fast.kernels.critic_tiles import plan_critics
from pwm_fast.kernels.grid_barrier import WARPS
from pwm_fast.kernels.normed_linear import EPS, dot_options, tile_shape
from pwm_fast.kernels.normed_tiles import KINDS
from pwm_fast.kernels.rollout_layers import FrozenRow, plan_rollout
from pwm_fast.kernels.triton_support import tl

PROGRAMS, HORIZON, BATCH, ACTION = 132, 16, 64, 6
ACTOR, CRITIC = (400, 200, 100), (400, 200)
SIZES = {"5M": (512, 512), "48M": (768, 1792)}  # latent, width of the dynamics' hidden layers
MAY_SPILL = 64
POINTERS = {"fp32": "*fp32", "bf16": "*bf16"}


def flat_layout(widths: tuple[int, ...]) -> tuple[Callable[[str], int], int]:
    """Offsets by name and length of a row of parameters whose tensors begin on multiples of 16."""
    starts, size = {}, 0
    for i, (k, n) in enumerate(pairwise(widths)):
        for name, count in (("weight", n * k), ("bias", n), ("ln.weight", n), ("ln.bias", n)):
            starts[f"{i}.{name}"] = size
            size += -(-count // 16) * 16
    starts["log_std"] = size
    return starts.__getitem__, size + 16


def _signature(kernel: Any, pointers: dict[str, str]) -> dict[str, str]:
    """Triton's type of every argument: upper-case ones are constants, phases integers, the others pointers."""
    types = {}
    for name in kernel.arg_names:
        types[name] = "constexpr" if name.isupper() else "i32" if name.endswith("_phase") else "*fp32"
    return types | {name: value for name, value in pointers.items() if name in types}


def _rollouts(size: str, policies: int, precision: str) -> Iterator[Compilation]:
    latent, width = SIZES[size]
    offset, stride = flat_layout((latent, *ACTOR, ACTION))
    shapes = [(latent + ACTION, width, "layernorm_mish"), (width, width, "layernorm_mish")]
    rows, start = [], 0
    for k, n, kind in [*shapes, (width, latent, "layernorm_simnorm")]:
        rows.append(FrozenRow(k, n, kind, (start, 0, n if policies > 1 else 0, 0, n)))
        start += k * n
    plan = plan_rollout((latent, *ACTOR, ACTION), offset, stride, rows, policies, HORIZON, BATCH, PROGRAMS)
    shared = {
        "ACTOR": tuple(map(tuple, plan.actor)), "DYNAMICS": tuple(map(tuple, plan.dynamics)), "P": policies,
        "H": HORIZON, "B": BATCH, "Z": latent, "A": ACTION, "GROUP": 8, "EPS": EPS,
        **dot_options(torch.float32, precision),
    }  # fmt: skip
    pointers = {"counter": "*i64", "world": POINTERS[precision], "pre": POINTERS[precision]}
    own = {"forward": {"LOG_STD": offset("log_std")}, "backward": {"DZ": plan.dz, "DETACH": True}}
    kernels = {"forward": rollout_forward.rollout_forward_kernel, "backward": rollout_backward.rollout_backward_kernel}
    for name, kernel in kernels.items():
        signature = _signature(kernel, pointers)
        title = f"rollout {name} {size} P={policies} {precision}"
        yield Compilation(
            title, kernel, signature, shared | own[name], num_warps=WARPS, may_spill=MAY_SPILL,
            slow=(size, policies, precision) != CASES[0],
        )  # fmt: skip


def _critics(size: str, policies: int, precision: str) -> Compilation:
    latent = SIZES[size][0]
    widths, rows, critics = (latent, *CRITIC, 1), HORIZON * BATCH, 3
    offset, stride = flat_layout(widths)
    _, slots, layers = plan_critics(widths, offset, policies * critics, rows // 4, PROGRAMS)
    constants = {
        "LAYERS": tuple(map(tuple, layers)), "P": policies, "KC": critics, "ROWS": rows, "EPOCHS": 8, "MINIBATCHES": 4,
        "X_ROWS": rows + BATCH, "STRIDE": stride, "SLOTS": slots,
        **critic_epoch.step_constants(100.0, (0.7, 0.95), 1e-8), **dot_options(torch.float32, precision),
    }  # fmt: skip
    pointers = {"counter": "*i64", "order": "*i64", "steps": "*i64", "alive": "*i32"}
    kernel = critic_epoch.critic_epoch_kernel
    signature = _signature(kernel, pointers)
    return Compilation(
        f"critic epoch {size} P={policies} {precision}",
        kernel,
        signature,
        constants,
        num_warps=WARPS,
        may_spill=MAY_SPILL,
        slow=(size, policies, precision) != CASES[0],
    )


def _layers(size: str, precision: str) -> Iterator[Compilation]:
    width, rows = SIZES[size][1], BATCH
    bm, bn = tile_shape(rows, width, 1, PROGRAMS)
    kinds = {"KIND": KINDS["layernorm_mish"], "NEXT": KINDS["layernorm_mish"], "PREVIOUS": KINDS["layernorm_mish"]}
    every = {
        "MEMBERS": 1, "SHARE": 1, "NORM_SHARE": 1, "ROWS": rows, "K": width, "N": width, **kinds, "GROUP": 8,
        "TILE": bn, "TILE_IN": bn, "TILE_SUMS": bn, "EPS": EPS, "BM": bm, "BN": bn,
        **dot_options(torch.float32, precision),
    }  # fmt: skip
    pointers = dict.fromkeys(("x", "w", "y", "d", "pre", "previous", "out"), POINTERS[precision])
    for kernel in (normed_linear.forward_kernel, normed_linear.gradient_kernel):
        signature = _signature(kernel, pointers)
        constants = {name: every[name] for name, kind in signature.items() if kind == "constexpr"}
        yield Compilation(f"normed_linear {kernel.__name__} {size} {precision}", kernel, signature, constants)


CASES = [*((size, p, "bf16") for size in SIZES for p in (1, 4)), ("5M", 1, "fp32"), ("48M", 4, "fp32")]
COMPILATIONS = [] if tl is None else [
    *(c for precision in POINTERS for size in SIZES for c in _layers(size, precision)),
    *(c for case in CASES for c in _rollouts(*case)),
    *(_critics(*case) for case in CASES),
]  # fmt: skip
