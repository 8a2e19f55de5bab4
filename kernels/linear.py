"""Linear layers over a leading group axis (policies, ensemble members): explicit forward and gradients.

On CPUs with AVX2 or AVX-512, float32 runs on our own products (kernels/gemm.py). Elsewhere torch multiplies: batched on
CUDA; on the CPU group by group in `forward` and `weight_grad`, where a batched product would first copy transposed
weights and shared rows (1.8 times as long for three critics 512 -> 400 on 256 shared rows).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pwm_fast.kernels.gemm import gemm_for, multiply


def _check(x: Tensor, weight: Tensor, columns: int, name: str) -> None:
    if x.dim() != 3 or weight.dim() != 3 or x.shape[2] != weight.shape[columns] or weight.shape[0] % x.shape[0]:
        raise ValueError(
            f"{name} must be [G or a divisor of G, R, {weight.shape[columns]}] for weights {tuple(weight.shape)}, "
            f"got {tuple(x.shape)}"
        )


def _spread(x: Tensor, groups: int) -> Tensor:
    """x [g, R, in] with each of its groups repeated to make `groups` (critic ensembles share their policy's rows)."""
    if x.shape[0] == groups:
        return x
    if x.shape[0] == 1:
        return x.expand(groups, -1, -1)
    return x.repeat_interleave(groups // x.shape[0], 0)


def _place(out: Tensor | None, like: Tensor, *shape: int) -> Tensor:
    if out is None:
        return like.new_empty(shape)
    if tuple(out.shape) != shape or out.dtype is not like.dtype:
        raise ValueError(f"out must be {like.dtype} {shape}, got {out.dtype} {tuple(out.shape)}")
    return out


@torch.no_grad()
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """y [G, R, out] = x W^T + b for x [G or a divisor of G, R, in], W [G, out, in], b [G, out]. No autograd graph.

    `out` [G, R, out], where given, is overwritten and returned. Raises ValueError on shapes that do not fit.
    """
    _check(x, weight, 2, "x")
    groups, outputs = weight.shape[:2]
    if bias is not None and bias.shape != (groups, outputs):
        raise ValueError(f"bias must be {(groups, outputs)}, got {tuple(bias.shape)}")
    native = gemm_for(backend, x, weight, *(() if bias is None else (bias,)))
    if native is not None:
        return multiply(native, x, weight.mT, _place(out, x, groups, x.shape[1], outputs), bias)
    if groups == 1:
        flat = None if out is None else out[0]
        if bias is None:
            return torch.mm(x[0], weight[0].t(), out=flat)[None]
        return torch.addmm(bias[0], x[0], weight[0].t(), out=flat)[None]
    if x.device.type == "cpu" and outputs > 1:
        y = _place(out, x, groups, x.shape[1], outputs)
        share = groups // x.shape[0]
        for g in range(groups):
            if bias is None:
                torch.mm(x[g // share], weight[g].t(), out=y[g])
            else:
                torch.addmm(bias[g], x[g // share], weight[g].t(), out=y[g])
        return y
    x = _spread(x, groups)
    if bias is None:
        return torch.bmm(x, weight.mT, out=out)
    return torch.baddbmm(bias[:, None], x, weight.mT, out=out)


@torch.no_grad()
def input_grad(
    dy: Tensor, weight: Tensor, out: Tensor | None = None, groups: int | None = None, backend: str | None = None
) -> Tensor:
    """dx [G, R, in] = dy W for dy [G, R, out], W [G, out, in].

    `groups`, a divisor of G, gives the gradient at an input [groups, R, in] that each of G / groups members shared.
    """
    _check(dy, weight, 1, "dy")
    members = weight.shape[0]
    groups = members if groups is None else groups
    if groups < 1 or members % groups:
        raise ValueError(f"groups must divide the {members} weights, got {groups}")
    if dy.shape[0] != members:
        raise ValueError(f"dy must have {members} groups, got {dy.shape[0]}")
    if groups < members:
        shared = input_grad(dy, weight, backend=backend).unflatten(0, (groups, members // groups))
        return torch.sum(shared, 1, out=out) if out is not None else shared.sum(1)
    native = gemm_for(backend, dy, weight)
    if native is not None:
        return multiply(native, dy, weight, _place(out, dy, members, dy.shape[1], weight.shape[2]))
    if members == 1:
        return torch.mm(dy[0], weight[0], out=None if out is None else out[0])[None]
    return torch.bmm(dy, weight, out=out)


@torch.no_grad()
def weight_grad(
    dy: Tensor, x: Tensor, out: Tensor | None = None, bias_out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """dW [G, out, in] = dy^T x, summed over rows, for dy [G, R, out], x [G or a divisor of G, R, in].

    `bias_out` [G, out], where given, receives the bias gradient, dy summed over rows.
    """
    if dy.dim() != 3 or x.dim() != 3 or dy.shape[1] != x.shape[1] or dy.shape[0] % x.shape[0]:
        raise ValueError(f"dy [G, R, out] and x [G, R, in] must share rows, got {tuple(dy.shape)} and {tuple(x.shape)}")
    groups, _, outputs = dy.shape
    if bias_out is not None:
        _place(bias_out, dy, groups, outputs)
    native = gemm_for(backend, dy, x)
    if native is not None:
        return multiply(native, dy.mT, x, _place(out, dy, groups, outputs, x.shape[2]), row_sums=bias_out)
    if bias_out is not None:
        torch.sum(dy, 1, out=bias_out)
    if groups == 1:
        return torch.mm(dy[0].t(), x[0], out=None if out is None else out[0])[None]
    if x.device.type == "cpu" and outputs > 1:
        dw = _place(out, dy, groups, outputs, x.shape[2])
        share = groups // x.shape[0]
        for g in range(groups):
            torch.mm(dy[g].t(), x[g // share], out=dw[g])
        return dw
    return torch.bmm(dy.mT, _spread(x, groups), out=out)


GATE = 1e-6  # relative error against float64: fp32 GEMMs of these sizes stay below 5e-7, bf16 ones are near 3e-3


def matmul_error(inner: int = 512) -> float:
    """Largest relative error of torch's float32 products against float64, over the forms this file uses."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, inner, generator=generator)
    w = torch.randn(2, 192, inner, generator=generator)
    dy = torch.randn(2, 64, 192, generator=generator)
    b = torch.randn(2, 192, generator=generator)
    worst = 0.0
    for groups in (1, 2):
        inputs = (x[:groups], w[:groups], dy[:groups], b[:groups])
        wide = tuple(t.double() for t in inputs)
        for op in (
            lambda x, w, dy, b: forward(x, w, b, backend="torch"),
            lambda x, w, dy, b: forward(x, w, backend="torch"),
            lambda x, w, dy, b: input_grad(dy, w, backend="torch"),
            lambda x, w, dy, b: weight_grad(dy, x, backend="torch"),
        ):
            exact = op(*wide)
            error = (op(*inputs).double() - exact).norm() / exact.norm()
            worst = max(worst, float(error)) if torch.isfinite(error) else float("inf")
    return worst


class FastMatmul:
    """What `fast_matmul` did: `active`, and the `reason` in words; as a context manager it undoes it on exit."""

    def __init__(self, active: bool, reason: str, previous: str | None):
        self.active, self.reason, self._previous = active, reason, previous

    def restore(self) -> None:
        """Back to the setting found; harmless where nothing was changed."""
        if self.active and self._previous is not None:
            torch.backends.mkldnn.matmul.fp32_precision = self._previous  # type: ignore[attr-defined]
            self.active = False

    def __enter__(self) -> FastMatmul:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def fast_matmul() -> FastMatmul:
    """Sends float32 CPU products to oneDNN if they stay float32-exact there; torch sends them to MKL otherwise.

    The switch is torch's permission to round to bf16 inside. oneDNN uses it only on machines with AMX: there the
    products fail the gate (`GATE`) and the switch goes back. Elsewhere the AVX-512 kernels run in full float32.
    The outcome depends on the machine and torch only, never on a timing, so runs stay reproducible.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not torch.backends.mkldnn.is_available() or not hasattr(settings, "fp32_precision"):
        return FastMatmul(False, f"torch {torch.__version__} has no oneDNN precision switch", None)
    previous = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
    except RuntimeError as refusal:
        return FastMatmul(False, f"torch refused the oneDNN precision switch: {refusal}", None)
    error = matmul_error()
    if error < GATE:
        return FastMatmul(True, f"oneDNN float32 products, relative error {error:.1e}", previous)
    settings.fp32_precision = previous
    return FastMatmul(False, f"oneDNN would round float32 products (relative error {error:.1e}), left off", None)
