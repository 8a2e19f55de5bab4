"""Times on a GPU (CUDA events) or, in a dry run, on the CPU (CPU seconds), and what the machine can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

L2_BYTES = 256 * 2**20  # more than any GPU's cache: buffers that rotate through this much come from memory


@dataclass
class Run:
    """What one call of the benchmark knows and has found so far."""

    device: torch.device
    dry: bool
    deadline: float  # of the whole run, by time.monotonic
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)

    def record(self, name: str, value: float, unit: str, better: str = "lower", **notes: Any) -> None:
        """Keep and print one figure; `better` is "lower" or "higher"."""
        self.results[name] = {"value": value, "unit": unit, "better": better, **notes}
        rest = "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in notes.items())
        print(f"  {name:58s} {value:12.4g} {unit:8s} {rest}", flush=True)

    def require(self, holds: bool, what: str) -> None:
        """A speed counts only where the numbers are right: note what is not."""
        if not holds:
            self.failures.append(what)
            print(f"  WRONG: {what}", flush=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def seconds(self, call: Callable[[], object], budget: float = 0.3, least: int = 3) -> float:
        """Median seconds of one call, repeated within `budget` seconds and at least `least` times, after a warm-up."""
        call()
        if self.device.type != "cuda":
            times = []
            while len(times) < (1 if self.dry else least):
                begun = time.process_time()
                call()
                times.append(time.process_time() - begun)
            return max(median(times), 1e-9)
        torch.cuda.synchronize()
        times, begun = [], time.monotonic()
        while len(times) < least or time.monotonic() - begun < budget:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        return median(times)

    def rotating(self, make: Callable[[], tuple[Tensor, ...]], call: Callable[..., object]) -> float:
        """Seconds of `call(*buffers)` with buffers that are not in the cache, launches queued one after another."""
        first = make()
        size = sum(t.nbytes for t in first)
        sets = [first] + [make() for _ in range(0 if self.dry else min(L2_BYTES // max(size, 1), 63))]

        def all_sets() -> None:
            for buffers in sets:
                call(*buffers)

        return self.seconds(all_sets) / len(sets)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    found: dict[str, Any] = {"device": str(device), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {"name": p.name, "multiprocessors": p.multi_processor_count, "memory_GB": round(p.total_memory / 1e9),
                  "capability": f"{p.major}.{p.minor}", "cuda": torch.version.cuda}  # fmt: skip
    return found


def ceilings(run: Run) -> None:
    """Copy bandwidth and matrix products in each precision, as measured here: what other figures are fractions of."""
    n = 2**16 if run.dry else 2**28
    source = torch.empty(n, device=run.device)
    target = torch.empty_like(source)
    run.ceilings["copy"] = 2 * source.nbytes / run.seconds(lambda: target.copy_(source)) / 1e9
    run.record("ceiling/copy", run.ceilings["copy"], "GB/s", "higher")
    size = 64 if run.dry else 8192
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        a, b = (torch.randn(size, size, device=run.device, dtype=dtype) for _ in range(2))
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            run.ceilings[name] = 2 * size**3 / run.seconds(lambda a=a, b=b: a @ b) / 1e12
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        run.record(f"ceiling/matmul {name}", run.ceilings[name], "TFLOP/s", "higher")
