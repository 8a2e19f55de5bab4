"""How gradient steps are executed: one switch for each ingredient of their speed, so that each can be measured alone.

None of them changes what a step computes, but for `precision`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pwm_fast import backend
from pwm_fast.learning.configuration import PRECISIONS


@dataclass(frozen=True)
class ExecutionConfig:
    """Switches, each useful on top of those before it. Raises ValueError for combinations that cannot be."""

    frozen_batched: bool = True  # explicit backward, no gradients of frozen weights, one batch for all policies
    fused_kernels: bool = True  # the fastest kernels there are; off: plain torch operations
    graph: bool = True  # on CUDA one captured graph per step (elsewhere the same step, operation by operation)
    overlap: bool = True  # the next step's rollout beside this step's critics, on a second stream
    persistent: bool = False  # whole rollouts and critic epochs in one kernel each
    precision: str = "fp32"  # what the `Extraction` was made with; see there and `pwm_fast.learning.precision`

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.persistent and not self.fused_kernels:
            raise ValueError("persistent kernels are fused ones: fused_kernels must be on with persistent")

    def check(self) -> None:
        """Raises RuntimeError for what the package cannot run."""
        if not self.frozen_batched:
            raise RuntimeError(
                "frozen_batched=False is the plain autograd step, which the package does not ship: "
                "it is tests/learning/naive.py, and bench/gpu.py measures it"
            )

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Inside, ops run on the backend that `fused_kernels` means; one that the user forces stays forced."""
        before = os.environ.get(backend.VARIABLE)
        if not self.fused_kernels:
            os.environ[backend.VARIABLE] = "torch"
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(backend.VARIABLE, None)
            else:
                os.environ[backend.VARIABLE] = before


_PLAIN = ExecutionConfig(frozen_batched=False, fused_kernels=False, graph=False, overlap=False)
LADDER = {
    "eager torch": _PLAIN,
    "frozen and batched": replace(_PLAIN, frozen_batched=True),
    "fused kernels": replace(_PLAIN, frozen_batched=True, fused_kernels=True),
    "graph": replace(_PLAIN, frozen_batched=True, fused_kernels=True, graph=True),
    "overlap": ExecutionConfig(),
    "persistent kernels": ExecutionConfig(persistent=True),
}
