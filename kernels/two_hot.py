"""Two-hot regression (TD-MPC2 appendix; Dreamer v3): a scalar as weights on its two neighbouring bins of a linear grid.

The grid is linspace(vmin, vmax, num_bins). `encode` makes targets, `expectation` reads logits back as a scalar, and
`cross_entropy` is the loss between logits and two-hot targets; each that has a gradient has an explicit backward.
Rewards that span decades go through `symlog` before and `symexp` after; `log_scale` does the latter in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pwm_fast import backend as backends
from pwm_fast.kernels import two_hot_triton
from pwm_fast.kernels.dispatch import backend_for


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp(|x|) - 1), the inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(x.abs())


def _check_grid(num_bins: int, vmin: float, vmax: float) -> None:
    if num_bins < 2 or not vmin < vmax:
        raise ValueError(f"two-hot needs num_bins >= 2 and vmin < vmax, got {num_bins} bins on [{vmin}, {vmax}]")


def _check_rows(logits: Tensor, *scalars: Tensor) -> None:
    for value in scalars:
        if value.shape != logits.shape[:-1]:
            expected = tuple(logits.shape[:-1])
            raise ValueError(f"logits {(*logits.shape,)} need scalars of shape {expected}, got {(*value.shape,)}")


def _position(x: Tensor, num_bins: int, vmin: float, vmax: float) -> tuple[Tensor, Tensor]:
    """Lower bin [...] (int64, at most num_bins - 2) and the weight [...] of the bin above it."""
    _check_grid(num_bins, vmin, vmax)
    place = (x.clamp(vmin, vmax) - vmin) * ((num_bins - 1) / (vmax - vmin))
    lower = place.floor().nan_to_num(0.0).clamp(0, num_bins - 2)  # NaN: bin 0 with weight NaN, shown by the loss
    return lower.long(), place - lower


def encode(x: Tensor, num_bins: int, vmin: float, vmax: float) -> Tensor:
    """Two-hot rows [..., num_bins] of scalars x [...], clamped to [vmin, vmax]; their expectation is x."""
    lower, weight = _position(x, num_bins, vmin, vmax)
    rows = x.new_zeros(*x.shape, num_bins)
    rows.scatter_(-1, lower[..., None], (1 - weight)[..., None])
    return rows.scatter_(-1, lower[..., None] + 1, weight[..., None])


def _bins(logits: Tensor, vmin: float, vmax: float) -> Tensor:
    return torch.linspace(vmin, vmax, logits.shape[-1], dtype=logits.dtype, device=logits.device)


@torch.no_grad()
def encode_forward(x: Tensor, num_bins: int, vmin: float, vmax: float, backend: str | None = None) -> Tensor:
    """`encode` in one pass where Triton runs; elsewhere the definition. No autograd graph."""
    _check_grid(num_bins, vmin, vmax)
    if backend_for(backend, x) != "triton":
        return encode(x, num_bins, vmin, vmax)
    rows = x.new_empty(*x.shape, num_bins)
    two_hot_triton.two_hot_encode(x.contiguous(), rows, vmin, vmax)
    return rows


def two_hot_expectation(logits: Tensor, vmin: float, vmax: float, log_scale: bool = False) -> Tensor:
    """The definition of `expectation`: softmax(logits) . linspace(vmin, vmax, num_bins), its symexp if `log_scale`."""
    value = (torch.softmax(logits, -1) * _bins(logits, vmin, vmax)).sum(-1)
    return symexp(value) if log_scale else value


def two_hot_cross_entropy(logits: Tensor, x: Tensor, vmin: float, vmax: float) -> Tensor:
    """The definition of `cross_entropy`: -encode(x) . log_softmax(logits)."""
    return -(encode(x, logits.shape[-1], vmin, vmax) * torch.log_softmax(logits, -1)).sum(-1)


@torch.no_grad()
def expectation_forward(
    logits: Tensor, vmin: float, vmax: float, backend: str | None = None, log_scale: bool = False
) -> Tensor:
    """Expected value [...] of logits [..., num_bins], its symexp if `log_scale`. No autograd graph."""
    _check_grid(logits.shape[-1], vmin, vmax)
    chosen = backend_for(backend, logits)
    if chosen == "torch":
        value = torch.softmax(logits, -1) @ _bins(logits, vmin, vmax)
        return symexp(value) if log_scale else value
    logits = logits.contiguous()
    value = logits.new_empty(logits.shape[:-1])
    if chosen == "triton":
        two_hot_triton.two_hot_expectation_forward(logits, value, vmin, vmax, log_scale)
        return value
    backends.native.two_hot_expectation_forward(
        logits.data_ptr(), value.data_ptr(), value.numel(), logits.shape[-1], vmin, vmax, torch.get_num_threads()
    )
    return symexp(value) if log_scale else value


@torch.no_grad()
def expectation_backward(
    dvalue: Tensor, logits: Tensor, vmin: float, vmax: float, backend: str | None = None, log_scale: bool = False
) -> Tensor:
    """dlogits [..., num_bins] = dvalue p (bin - value), recomputed from the logits; times symexp' if `log_scale`."""
    _check_grid(logits.shape[-1], vmin, vmax)
    _check_rows(logits, dvalue)
    chosen = backend_for(backend, dvalue, logits)
    if chosen == "triton":
        dvalue, logits = dvalue.contiguous(), logits.contiguous()
        dlogits = torch.empty_like(logits)
        two_hot_triton.two_hot_expectation_backward(dvalue, logits, dlogits, vmin, vmax, log_scale)
        return dlogits
    if log_scale:  # symexp'(x) = exp(|x|)
        dvalue = dvalue * expectation_forward(logits, vmin, vmax, chosen).abs().exp()
    if chosen == "torch":
        p, bins = torch.softmax(logits, -1), _bins(logits, vmin, vmax)
        return dvalue[..., None] * p * (bins - (p @ bins)[..., None])
    dvalue, logits = dvalue.contiguous(), logits.contiguous()
    dlogits = torch.empty_like(logits)
    backends.native.two_hot_expectation_backward(
        *(t.data_ptr() for t in (dvalue, logits, dlogits)),
        dvalue.numel(),
        logits.shape[-1],
        vmin,
        vmax,
        torch.get_num_threads(),
    )
    return dlogits


@torch.no_grad()
def cross_entropy_forward(logits: Tensor, x: Tensor, vmin: float, vmax: float, backend: str | None = None) -> Tensor:
    """Soft cross-entropy [...] of logits [..., num_bins] against the two-hot rows of x [...]. No autograd graph."""
    _check_grid(logits.shape[-1], vmin, vmax)
    _check_rows(logits, x)
    chosen = backend_for(backend, logits, x)
    if chosen == "torch":
        lower, weight = _position(x, logits.shape[-1], vmin, vmax)
        below = logits.gather(-1, lower[..., None]).squeeze(-1)
        above = logits.gather(-1, lower[..., None] + 1).squeeze(-1)
        return torch.logsumexp(logits, -1) - torch.lerp(below, above, weight)
    logits, x = logits.contiguous(), x.contiguous()
    loss = torch.empty_like(x)
    if chosen == "triton":
        two_hot_triton.two_hot_cross_entropy_forward(logits, x, loss, vmin, vmax)
        return loss
    backends.native.two_hot_cross_entropy_forward(
        *(t.data_ptr() for t in (logits, x, loss)), x.numel(), logits.shape[-1], vmin, vmax, torch.get_num_threads()
    )
    return loss


@torch.no_grad()
def cross_entropy_backward(
    dloss: Tensor, logits: Tensor, x: Tensor, vmin: float, vmax: float, backend: str | None = None
) -> Tensor:
    """dlogits [..., num_bins] = dloss (softmax(logits) - encode(x)); targets get no gradient."""
    _check_grid(logits.shape[-1], vmin, vmax)
    _check_rows(logits, dloss, x)
    chosen = backend_for(backend, dloss, logits, x)
    if chosen == "torch":
        return dloss[..., None] * (torch.softmax(logits, -1) - encode(x, logits.shape[-1], vmin, vmax))
    dloss, logits, x = dloss.contiguous(), logits.contiguous(), x.contiguous()
    dlogits = torch.empty_like(logits)
    if chosen == "triton":
        two_hot_triton.two_hot_cross_entropy_backward(dloss, logits, x, dlogits, vmin, vmax)
        return dlogits
    backends.native.two_hot_cross_entropy_backward(
        *(t.data_ptr() for t in (dloss, logits, x, dlogits)),
        x.numel(),
        logits.shape[-1],
        vmin,
        vmax,
        torch.get_num_threads(),
    )
    return dlogits


class _Expectation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, vmin: float, vmax: float, log_scale: bool) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.limits, ctx.log_scale = (vmin, vmax), log_scale
        return expectation_forward(logits, vmin, vmax, log_scale=log_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        dlogits = expectation_backward(dvalue, *ctx.saved_tensors, *ctx.limits, log_scale=ctx.log_scale)
        return dlogits, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor, vmin: float, vmax: float) -> Tensor:
        ctx.save_for_backward(logits, x)
        ctx.limits = (vmin, vmax)
        return cross_entropy_forward(logits, x, vmin, vmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.limits), None, None, None


def expectation(logits: Tensor, vmin: float, vmax: float, log_scale: bool = False) -> Tensor:
    """Expected value [...] of logits [..., num_bins], its symexp if `log_scale`; differentiable."""
    return _Expectation.apply(logits, vmin, vmax, log_scale)


def cross_entropy(logits: Tensor, x: Tensor, vmin: float, vmax: float) -> Tensor:
    """Soft cross-entropy [...] against the two-hot rows of x [...]; differentiable in the logits only."""
    return _CrossEntropy.apply(logits, x.detach(), vmin, vmax)
