"""The native matrix products against torch's and against what the core can do, shape by shape of extraction.

    pytest bench/test_native.py -s

The peak is a loop of multiply-adds in registers, timed in turn with the products: on a shared core it moves with them.
Times are CPU seconds of this thread. `best` is the fastest of many calls; `mean`, over all of them, includes what other
work on the core takes from both. Every product is compared with float64 before its speed counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels import gemm, linear

pytestmark = [
    pytest.mark.skipif(backend.native is None, reason=f"no native module: {backend.native_reason}"),
    pytest.mark.timeout(0),
]
CRITICS = [(256, 512, 400), (256, 768, 400), (256, 400, 200)]  # rows, inputs, outputs of three critics at 5M and 48M
FROZEN = [(64, 512, 512), (64, 518, 512), (64, 512, 518), (64, 1792, 1792), (64, 774, 1792), (1024, 512, 512),
          (1024, 512, 101), (1024, 1792, 1792)]  # fmt: skip
ROUNDS = 100_000  # of the peak's loop, some 0.2 ms
SECONDS = 0.4  # of CPU time for all calls of one row of the table


def times(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    """CPU seconds of each call, taken in turn until `SECONDS` are spent."""
    found: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    stop = time.thread_time() + SECONDS
    while time.thread_time() < stop or len(found[0]) < 5:
        for call, mine in zip(calls, found):
            start = time.thread_time()
            call()
            mine.append(time.thread_time() - start)
    return found


def report(name: str, flop: float, native: Callable[[], object], library: Callable[[], object]) -> float:
    """Prints GFLOP/s of both and their share of the core's peak; returns the ratio of the best times."""
    peak_flop = backend.native.gemm_peak(ROUNDS)[0]
    ours, theirs, loop = times([native, library, lambda: backend.native.gemm_peak(ROUNDS)])

    def rates(seconds: list[float], work: float) -> tuple[float, float]:
        return work / min(seconds) / 1e9, work * len(seconds) / sum(seconds) / 1e9

    (best, mean), (torch_best, torch_mean), (peak, peak_mean) = (
        rates(ours, flop),
        rates(theirs, flop),
        rates(loop, peak_flop),
    )
    print(
        f"\n  {name:26s} best {best:6.1f} of {peak:.1f} GFLOP/s ({best / peak:4.0%}), torch {torch_best:6.1f}; "
        f"mean {mean:6.1f} of {peak_mean:.1f} ({mean / peak_mean:4.0%}), torch {torch_mean:6.1f}; "
        f"ratio {best / torch_best:.2f}, {mean / torch_mean:.2f} ({backend.native.isa()})",
        end="",
    )
    return best / torch_best


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("library", ["MKL", "oneDNN"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), CRITICS)
def test_grouped_products(rows: int, inputs: int, outputs: int, library: str, record_property: Callable) -> None:
    """Forward, input gradient and weight gradient of three critics; the first layer's rows are shared."""
    torch.manual_seed(0)
    x, weight, dy = torch.randn(1, rows, inputs), torch.randn(3, outputs, inputs), torch.randn(3, rows, outputs)
    bias, y, dx, dw = (
        torch.randn(3, outputs),
        torch.empty_like(dy),
        torch.empty(3, rows, inputs),
        torch.empty_like(weight),
    )
    wide_x, wide_w, wide_dy = x.double(), weight.double(), dy.double()
    cases = {
        "forward": (
            lambda b: linear.forward(x, weight, bias, out=y, backend=b),
            wide_x @ wide_w.mT + bias.double()[:, None],
        ),
        "input gradient": (lambda b: linear.input_grad(dy, weight, out=dx, backend=b), wide_dy @ wide_w),
        "weight gradient": (lambda b: linear.weight_grad(dy, x, out=dw, backend=b), wide_dy.mT @ wide_x),
    }
    switch = linear.fast_matmul() if library == "oneDNN" else None
    if switch is not None and not switch.active:
        pytest.skip(switch.reason)
    try:
        print(f"\n  3 x {rows} x {inputs} -> {outputs}, torch on {library}", end="")
        for name, (product, exact) in cases.items():
            assert relative_error(product("native"), exact) < 1e-6
            flop, ours, torchs = 6.0 * rows * inputs * outputs, partial(product, "native"), partial(product, "torch")
            ratio = report(name, flop, ours, torchs)
            record_property(f"{name}_{rows}x{inputs}x{outputs}_{library}_ratio", ratio)
    finally:
        if switch is not None:
            switch.restore()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), FROZEN)
def test_packed_weights(rows: int, inputs: int, outputs: int, record_property: Callable) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    y = torch.empty(rows, outputs)
    packed = gemm.pack(weight, backend="native")
    assert packed is not None
    assert relative_error(packed.product(x, bias, out=y), x.double() @ weight.double().T + bias.double()) < 1e-6
    with linear.fast_matmul():
        name, flop = f"packed {rows}x{inputs}->{outputs}", 2.0 * rows * inputs * outputs
        torchs = partial(torch.addmm, bias, x, weight.T, out=y)
        ratio = report(name, flop, partial(packed.product, x, bias, out=y), torchs)
    record_property(f"packed_{rows}x{inputs}x{outputs}_ratio", ratio)
