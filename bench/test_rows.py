"""Products of few rows, as policies need them, against torch's, against packing W and multiplying tiles, and against
reading W once.

    pytest bench/test_rows.py -s

Zen 3, AVX2, with other work beside it: of the time of packing and tiles (the kernel that a wish for row sums leads to;
they cost nothing beside it) a single row takes 0.4 to 0.6, 4 rows 0.6 to 0.8, 16 rows 0.8 to 1.0; rows of 39 numbers,
where adding up a vector's lanes is most of the work, 0.6, 1.0 and 1.6. CPU seconds of this thread, the fastest of many
rounds in turn. Every product is compared with float64 before its speed counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels import gemm

pytestmark = [
    pytest.mark.skipif(backend.native is None, reason=f"no native module: {backend.native_reason}"),
    pytest.mark.timeout(0),
]
SHAPES = [(39, 1792), (1792, 1792), (1792, 768), (768, 400), (256, 512), (512, 400), (400, 200)]  # inputs, outputs
ROWS = (1, 2, 4, 8, 16)
SECONDS = 0.3  # of CPU time for all calls of one row of the table


def fastest(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    best, stop = dict.fromkeys(calls, float("inf")), time.thread_time() + SECONDS
    while time.thread_time() < stop:
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(repeats):
                call()
            best[name] = min(best[name], (time.thread_time() - start) / repeats)
    return best


def ratios(rows: int, weight: Tensor, bias: Tensor) -> dict[str, float]:
    """The product's time over those of other ways."""
    groups, outputs, inputs = weight.shape
    x, y, sums = torch.randn(1, rows, inputs), torch.empty(groups, rows, outputs), torch.empty(groups, rows)
    product = partial(gemm.multiply, backend.native, x, weight.mT, y, bias)
    product()
    exact = x.double() @ weight.double().mT + bias.double()
    assert float((y - exact).norm() / exact.norm()) < 1e-6
    best = fastest(
        {
            "rows": product,
            "tiles": partial(product, sums),
            "torch": partial(torch.addmm, bias[0], x[0], weight[0].T, out=y[0]),
            "read": partial(backend.native.read_floats, weight.data_ptr(), weight.numel()),
        },
        1 + 1_000_000 // (rows * weight.numel()),
    )
    found = {name: best["rows"] / best[name] for name in ("tiles", "torch", "read")}
    rate = 2e-9 * rows * weight.numel() / best["rows"]
    print(
        f"\n    {rows:2d} rows {1e6 * best['rows']:7.1f} us, {rate:5.1f} GFLOP/s: "
        + ", ".join(f"{ratio:.2f} of {name}" for name, ratio in found.items()),
        end="",
    )
    return found


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_few_rows(inputs: int, outputs: int, record_property: Callable) -> None:
    torch.manual_seed(0)
    weight, bias = gemm.huge_copy(torch.randn(1, outputs, inputs)), torch.randn(1, outputs)
    print(f"\n  {inputs} -> {outputs}, {4e-6 * weight.numel():.1f} MB", end="")
    for rows in ROWS:
        for name, ratio in ratios(rows, weight, bias).items():
            record_property(f"{rows}x{inputs}x{outputs}_{name}_ratio", ratio)
