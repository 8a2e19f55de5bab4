"""The row kernels, TD(lambda) and Adam: GB/s beside the measured copy bandwidth, after a check of their numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from gpu_timing import Run
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels import clip_adam, layernorm_mish, layernorm_simnorm, mish_layernorm, td_lambda, two_hot

GRID = (-10.0, 10.0)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative RMS error against float64


class Case(NamedTuple):
    """One kernel at one size: `make(dtype, device)` its buffers, `call(backend, *buffers)` its results."""

    name: str
    make: Callable[..., tuple[Tensor, ...]]
    call: Callable[..., object]
    bytes: Callable[..., int]  # that must be read and written
    low: bool = True  # takes bfloat16


def cases(dry: bool) -> list[Case]:
    """Rows of extraction: 16 x 64 states of 1, 16 or 80 policies; hidden widths of 5M, 48M and 317M."""
    found = []
    for rows, columns in (
        ((32, 24),) if dry else ((1024, 512), (1024, 1792), (16384, 1792), (81920, 1792), (16384, 4096))
    ):
        for name, op in (("layernorm_mish", layernorm_mish), ("mish_layernorm", mish_layernorm)):
            found += _normed(f"{name} {rows}x{columns}", op, rows, columns)
        found += _normed(f"layernorm_simnorm {rows}x{columns}", layernorm_simnorm, rows, columns, 8)
    for rows in (64,) if dry else (16384, 81920):
        found.append(
            Case(
                f"two_hot expectation {rows}x101",
                lambda dtype, device, rows=rows: (torch.randn(rows, 101, dtype=dtype, device=device),),
                lambda name, x: two_hot.expectation_forward(x, *GRID, backend=name),
                lambda x: x.nbytes,
            )
        )
        found.append(
            Case(
                f"td_lambda 16x{rows}",
                lambda dtype, device, rows=rows: tuple(
                    torch.rand(16, rows, dtype=dtype, device=device) for _ in range(3)
                ),
                lambda name, r, v, c: td_lambda.returns(r, v, c, 0.99, 0.95, backend=name),
                lambda r, v, c: 4 * r.nbytes,
                low=False,
            )
        )
    for policies in (1,) if dry else (1, 16, 80):
        found.append(_adam(policies, 1000 if dry else 3 * 388_000))
    return found


def _normed(name: str, op, rows: int, columns: int, *extra: int) -> list[Case]:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        return (
            torch.randn(1, rows, columns, dtype=dtype, device=device),
            1 + 0.1 * torch.randn(1, columns, dtype=dtype, device=device),
            0.1 * torch.randn(1, columns, dtype=dtype, device=device),
        )

    def make_backward(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        x, w, b = make(dtype, device)
        y, mean, rstd = op.forward(x, w, b, *extra)
        return torch.randn_like(x), x, mean, rstd, w, b, y

    def forward(backend_name: str, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return op.forward(x, w, b, *extra, backend=backend_name)[0]

    def backward(backend_name: str, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, b: Tensor, y: Tensor):
        if extra:
            return op.backward(dy, y, x, mean, rstd, w, b, False, *extra, backend=backend_name)[0]
        return op.backward(dy, x, mean, rstd, w, b, False, backend=backend_name)[0]

    return [
        Case(f"{name} forward", make, forward, lambda x, w, b: 2 * x.nbytes),
        Case(f"{name} backward", make_backward, backward, lambda dy, x, *rest: (4 if extra else 3) * x.nbytes),
    ]


def _adam(policies: int, size: int) -> Case:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        rows = [torch.randn(policies, size, dtype=dtype, device=device) for _ in range(3)]
        rate = torch.full((policies,), 1e-3, dtype=dtype, device=device)
        return *rows, rows[0].square(), rate, torch.ones(policies, dtype=torch.int64, device=device)

    def call(name: str, p: Tensor, g: Tensor, m: Tensor, v: Tensor, rate: Tensor, steps: Tensor) -> Tensor:
        clip_adam.step(p, g, m, v, rate, steps, 100.0, (0.7, 0.95), 1e-8, None, backend=name)
        return p

    return Case(f"clip_adam {policies}x{size}", make, call, lambda p, *rest: 8 * p.nbytes, low=False)


def kernels(run: Run) -> None:
    """Every case on every backend that runs on this device."""
    fused = "triton" if "triton" in backend.BACKENDS and run.device.type == "cuda" else None
    for case in cases(run.dry):
        for dtype in (torch.float32, torch.bfloat16) if case.low else (torch.float32,):
            torch.manual_seed(0)
            buffers = case.make(dtype, run.device)
            exact = case.call("torch", *(t.double() if t.is_floating_point() else t.clone() for t in buffers))
            plain = 0.0
            for name in ("torch", *([fused] if fused else [])):
                label = f"{case.name} {'bf16' if dtype is torch.bfloat16 else 'fp32'} {name}"
                try:
                    found = case.call(name, *(t.clone() for t in buffers))
                    error = float((found.double() - exact).norm() / exact.norm())
                    seconds = run.rotating(partial(case.make, dtype, run.device), partial(case.call, name))
                except (RuntimeError, TypeError, ValueError) as refusal:
                    run.failures.append(f"kernel {label}: {refusal}")
                    continue
                rate = case.bytes(*buffers) / seconds / 1e9
                run.require(error < TOLERANCE[dtype], f"kernel {label}: relative error {error:.1e}")
                plain = plain or seconds
                run.record(
                    f"kernel/{label}", seconds * 1e6, "us", GBps=rate, of_copy=rate / run.ceilings["copy"],
                    times_torch=plain / seconds, error=error,
                )  # fmt: skip
