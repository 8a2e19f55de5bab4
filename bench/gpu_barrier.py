"""How long a barrier across the GPU takes, by the number of multiprocessors: what persistent kernels pay per layer.

One program per multiprocessor; all add to a counter and wait until it shows that the others have.
"""

from __future__ import annotations

import torch
from gpu_timing import Run

from pwm_fast.kernels.triton_support import jit, refusal, tl

ROUNDS = 1000


@jit
def barrier_kernel(counter, rounds, programs):
    for i in range(rounds):
        tl.atomic_add(counter, 1, sem="release", scope="gpu")
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while seen < (i + 1) * programs:
            seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")


def barriers(run: Run) -> None:
    """Latency of one barrier for 1, 2, 4, ... multiprocessors and all of them."""
    reason = refusal(torch.empty(1, device=run.device))
    if run.device.type != "cuda" or reason is not None:
        print(f"  barrier: not measured ({reason or 'it needs a GPU'})")
        return
    most = torch.cuda.get_device_properties(run.device).multi_processor_count
    for programs in sorted({*(2**i for i in range(12) if 2**i < most), most}):
        counter = torch.zeros((), dtype=torch.int32, device=run.device)

        def launch(counter: torch.Tensor = counter, programs: int = programs) -> None:
            counter.zero_()
            barrier_kernel[(programs,)](counter, ROUNDS, programs, num_warps=1)

        seconds = run.seconds(launch, budget=0.2)
        run.require(int(counter) == ROUNDS * programs, f"barrier of {programs}: {int(counter)} arrivals")
        run.record(f"barrier/{programs} multiprocessors", seconds / ROUNDS * 1e6, "us")
