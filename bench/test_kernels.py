"""CPU kernels against eager torch, each with a check of its numbers.

    pytest bench/test_kernels.py -s

Shapes are those of extraction (batch 64, H = 16; three critics on minibatches of 256). Times are CPU seconds on one
thread, torch and native in turn, the fastest of each, so other work on the machine disturbs the ratios little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pwm_fast import backend
from pwm_fast.kernels import clip_adam, layernorm_mish, layernorm_simnorm, linear, mish_layernorm, td_lambda, two_hot

pytestmark = [
    pytest.mark.skipif(backend.native is None, reason=f"no native module: {backend.native_reason}"),
    pytest.mark.benchmark(timer=time.process_time, min_rounds=3, max_time=0.1, warmup=False),
]
GRID = (-10.0, 10.0)


def fastest(*calls: Callable[[], object], rounds: int = 7) -> list[float]:
    """CPU seconds of one call of each, taken in turn; rounds of at least 2 ms."""
    times = []
    for call in calls:
        call()
        start = time.process_time()
        call()
        times.append(max(time.process_time() - start, 1e-6))
    repeats = [max(1, int(2e-3 / t)) for t in times]
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.process_time()
            for _ in range(repeats[i]):
                call()
            best[i] = min(best[i], (time.process_time() - start) / repeats[i])
    return best


def report(benchmark: Any, what: str, torch_call: Callable[[], object], native_call: Callable[[], object]) -> None:
    """Prints both times and their ratio, and leaves them in the benchmark's record."""
    slow, fast = fastest(torch_call, native_call)
    benchmark.extra_info.update(torch_us=slow * 1e6, native_us=fast * 1e6, ratio=slow / fast)
    print(f"\n  {what:58s} torch {slow * 1e6:8.1f} us   native {fast * 1e6:8.1f} us   ratio {slow / fast:6.2f}")
    benchmark(native_call)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def eager(kernel: ModuleType, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The op as one would write it with torch's functions."""
    columns = x.shape[-1:]

    def norm(rows: Tensor) -> Tensor:
        if len(w) == 1:
            return F.layer_norm(rows, columns, w[0], b[0])
        return torch.addcmul(b[:, None], F.layer_norm(rows, columns), w[:, None])

    if kernel is mish_layernorm:
        return norm(F.mish(x))
    if kernel is layernorm_mish:
        return F.mish(norm(x))
    return torch.softmax(norm(x).unflatten(-1, (-1, 8)), -1).flatten(-2)


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        (layernorm_mish, (1, 64, 512)),
        (layernorm_mish, (1, 64, 1792)),
        (layernorm_mish, (1, 1024, 512)),
        (layernorm_simnorm, (1, 64, 512)),
        (layernorm_simnorm, (1, 1024, 512)),
        (mish_layernorm, (1, 64, 400)),
        (mish_layernorm, (3, 256, 400)),
        (mish_layernorm, (3, 256, 200)),
        (mish_layernorm, (1, 1024, 100)),
    ],
    ids=lambda value: value.__name__.rsplit(".", 1)[-1] if isinstance(value, ModuleType) else "x".join(map(str, value)),
)
@pytest.mark.parametrize("gradients", ["forward", "input gradient", "all gradients"])
def test_row_kernel(benchmark: Any, kernel: ModuleType, shape: tuple[int, int, int], gradients: str) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(shape), torch.randn(shape)
    w, b = torch.randn(shape[0], shape[2]), torch.randn(shape[0], shape[2])
    inputs = [x, w, b]
    leaves = [t.clone().requires_grad_(gradients == "all gradients" or t is x) for t in inputs]
    wanted = [t for t in leaves if t.requires_grad]
    y, mean, rstd = kernel.forward(x, w, b, backend="native")
    saved = (y, x) if kernel is layernorm_simnorm else (x,)
    out = (torch.empty_like(y), torch.empty_like(mean), torch.empty_like(rstd))
    dx = torch.empty_like(x)

    def torch_call() -> tuple[Tensor, ...]:
        if gradients == "forward":
            with torch.no_grad():
                return (eager(kernel, x, w, b),)
        return torch.autograd.grad(eager(kernel, *leaves), wanted, dy)

    def native_call() -> tuple[Tensor, ...]:
        result = kernel.forward(x, w, b, backend="native", out=out)
        if gradients == "forward":
            return result[:1]
        found = kernel.backward(
            dy, *saved, mean, rstd, w, b, need_weight_grad=gradients == "all gradients", backend="native", out=dx
        )
        return found[: len(wanted)]

    for value, expected in zip(native_call(), torch_call(), strict=True):
        assert relative_error(value, expected) < 5e-6
    name = kernel.__name__.rsplit(".", 1)[-1]
    report(benchmark, f"{name} {'x'.join(map(str, shape))} {gradients}", torch_call, native_call)


@pytest.mark.parametrize("head", ["expectation", "cross_entropy"])
def test_two_hot(benchmark: Any, head: str) -> None:
    """Forward and gradient over 16 x 64 rows of 101 bins."""
    torch.manual_seed(0)
    logits, x, gradient = torch.randn(1024, 101), 5 * torch.randn(1024), torch.randn(1024)
    leaf = logits.clone().requires_grad_()

    def torch_call() -> Tensor:
        value = (
            two_hot.two_hot_expectation(leaf, *GRID)
            if head == "expectation"
            else two_hot.two_hot_cross_entropy(leaf, x, *GRID)
        )
        return torch.autograd.grad(value, leaf, gradient)[0]

    def native_call() -> Tensor:
        if head == "expectation":
            two_hot.expectation_forward(logits, *GRID, backend="native")
            return two_hot.expectation_backward(gradient, logits, *GRID, backend="native")
        two_hot.cross_entropy_forward(logits, x, *GRID, backend="native")
        return two_hot.cross_entropy_backward(gradient, logits, x, *GRID, backend="native")

    assert relative_error(native_call(), torch_call()) < 2e-5
    report(benchmark, f"two_hot {head} 1024x101 forward and gradient", torch_call, native_call)


def test_td_lambda(benchmark: Any) -> None:
    torch.manual_seed(0)
    reward, value = torch.randn(16, 64), torch.randn(16, 64)

    def torch_call() -> Tensor:
        return td_lambda.td_lambda(reward, value, None, 0.99, 0.95)

    def native_call() -> Tensor:
        return td_lambda.returns(reward, value, None, 0.99, 0.95, backend="native")

    assert relative_error(native_call(), torch_call()) < 1e-6
    report(benchmark, "td_lambda 16x64", torch_call, native_call)


@pytest.mark.parametrize(("policies", "size"), [(1, 300_000), (1, 900_000), (4, 300_000)])
def test_clip_adam(benchmark: Any, policies: int, size: int) -> None:
    """Against clip_grad_norm_ and torch's fused Adam, one optimiser of eight tensors per policy."""
    torch.manual_seed(0)
    grad = 1e-3 * torch.randn(policies, size)
    start = torch.randn(policies, size)
    parameters = [[torch.nn.Parameter(part.clone()) for part in row.tensor_split(8)] for row in start]
    for row, gradients in zip(parameters, grad, strict=True):
        for parameter, part in zip(row, gradients.tensor_split(8), strict=True):
            parameter.grad = part.clone()
    optimizers = [torch.optim.Adam(row, 1e-4, (0.7, 0.95), fused=True) for row in parameters]
    param, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    lr, step = torch.full((policies,), 1e-4), torch.zeros(policies, dtype=torch.int64)

    def torch_call() -> None:
        for row, optimizer in zip(parameters, optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(row, 1e9)
            optimizer.step()

    def native_call() -> None:
        clip_adam.step(param, grad, m, v, lr, step, 1e9, (0.7, 0.95), backend="native")

    torch_call()
    native_call()
    moved = torch.stack([torch.cat([p.detach() for p in row]) for row in parameters]) - start
    assert relative_error(param - start, moved) < 2e-3  # float32 parameters of size 1 moved by 1e-4
    report(benchmark, f"clip_adam {policies}x{size}", torch_call, native_call)


@pytest.mark.parametrize(("inputs", "outputs", "shared"), [(512, 400, True), (400, 200, False)])
@pytest.mark.parametrize("library", ["MKL", "oneDNN"])
def test_grouped_linear(benchmark: Any, inputs: int, outputs: int, shared: bool, library: str) -> None:
    """A layer of three critics on 256 rows (kernels/linear.py) against a loop of torch's products.

    Weights and their gradients are views of flat parameters, the first layer's rows are shared, as in extraction.
    """
    torch.manual_seed(0)
    flat = torch.randn(2, 3, outputs * inputs + 1000)
    weight, dw = (part[:, : outputs * inputs].view(3, outputs, inputs) for part in flat)
    x, bias, dy = torch.randn(1 if shared else 3, 256, inputs), torch.randn(3, outputs), torch.randn(3, 256, outputs)
    y, dx = torch.empty(3, 256, outputs), torch.empty(3, 256, inputs)
    rows = x.expand(3, -1, -1)

    def torch_call() -> None:
        for g in range(3):
            torch.addmm(bias[g], rows[g], weight[g].t(), out=y[g])
            torch.mm(dy[g], weight[g], out=dx[g])
            torch.mm(dy[g].t(), rows[g], out=dw[g])

    def grouped_call() -> None:
        linear.forward(x, weight, bias, out=y)
        linear.input_grad(dy, weight, out=dx)
        linear.weight_grad(dy, x, out=dw)

    fast = linear.fast_matmul() if library == "oneDNN" else None
    if fast is not None and not fast.active:
        pytest.skip(fast.reason)
    try:
        grouped_call()
        wide = rows.double(), weight.double(), dy.double()
        assert relative_error(y, wide[0] @ wide[1].mT + bias[:, None]) < 1e-6
        assert relative_error(dx, wide[2] @ wide[1]) < 1e-6
        assert relative_error(dw, wide[2].mT @ wide[0]) < 1e-6
        report(benchmark, f"linear 3x256x{inputs}->{outputs}, torch on {library}", torch_call, grouped_call)
        rate = 6 * 3 * 256 * inputs * outputs / (benchmark.extra_info["native_us"] * 1e3)
        print(f"  {'':58s} {rate:.0f} GFLOP/s")
    finally:
        if fast is not None:
            fast.restore()
