"""A barrier across all programs of one launch, for kernels whose phases read what other programs wrote.

Every program must be running at once: a grid of at most one program per multiprocessor, launched cooperatively (the
driver then refuses a grid that does not fit, where a plain launch would hang). In Triton's interpreter programs run one
after another, so a grid of several must not get here; phases are launched one by one there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pwm_fast.kernels.triton_support import interpreting, jit, tl, triton

WARPS = 8  # of a persistent program, which has a multiprocessor to itself


def phase_kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` for kernels with arguments first_phase and last_phase: one compilation serves all their values."""
    return function if triton is None else triton.jit(function, do_not_specialize=["first_phase", "last_phase"])


@jit
def grid_barrier(counter):
    """Wait until every program has arrived; writes before are visible after. `counter` *i64, never reset.

    Each arrival adds 1, so the n programs' k-th barrier is complete at k n: the value an arrival finds says which one
    it is, whatever earlier launches left there. One cost in the cost model: about 1 microsecond on paper, unmeasured.
    """
    tl.debug_barrier()  # the release below is one thread's: it must follow the writes of all the program's threads
    programs = tl.num_programs(0)
    arrived = tl.atomic_add(counter, 1, sem="release", scope="gpu")
    complete = (arrived // programs + 1) * programs
    # Adding 0 compiles to a load with acquire, which Triton drops where nothing reads its value.
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < complete:
        pass
    tl.debug_barrier()


def new_counter(device: str | torch.device) -> Tensor:
    """The counter [1] int64 of one kernel's launches; launches that share it must have the same grid."""
    return torch.zeros(1, dtype=torch.int64, device=device)


def resident_programs(device: torch.device) -> int:
    """How many programs of a persistent kernel run at once: one per multiprocessor (1 in the interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_phases(
    kernel: Any, arguments: tuple[Any, ...], phases: int, programs: int, fused: bool, **options: Any
) -> None:
    """Run phases 0 .. `phases` - 1 of a kernel whose arguments end in (first_phase, last_phase) before its constants.

    `fused` is one launch with barriers between phases; otherwise every phase is a launch of its own: no barrier, no
    need for co-residency, the same results. Raises ValueError for a fused grid of several programs in the interpreter.
    """
    if not fused:
        for phase in range(phases):
            kernel[(programs,)](*arguments, phase, phase + 1, **options, num_warps=WARPS)
    elif interpreting:
        if programs > 1:
            raise ValueError(f"the interpreter runs programs in turn: a fused grid must be 1 program, got {programs}")
        kernel[(1,)](*arguments, 0, phases, **options)
    else:
        kernel[(programs,)](*arguments, 0, phases, **options, num_warps=WARPS, launch_cooperative_grid=True)
