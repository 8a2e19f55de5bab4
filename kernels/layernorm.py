"""Layer normalisation of rows without its affine part, forward and backward: what the fused versions share.

The functions of tiles are for use inside Triton kernels: tiles [rows, columns] in float32, zero outside the row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.kernels.triton_support import jit, tl


def layernorm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition (Ba et al. 2016): x [G, R, N] normalised along N, then scaled and shifted by w, b [G, N]."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * w[:, None] + b[:, None]


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows [G, R, N], mean [G, R] and reciprocal standard deviation [G, R]."""
    normalised, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], None, None, eps)
    return normalised, mean.squeeze(-1), rstd.squeeze(-1)


def renormalise(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The normalised rows from saved statistics."""
    return (x - mean[..., None]) * rstd[..., None]


def normalise_backward(dnormalised: Tensor, normalised: Tensor, rstd: Tensor) -> Tensor:
    """dx = rstd (d - mean(d) - n mean(d n)) with d the gradient at the normalised rows n."""
    projection = (dnormalised * normalised).mean(-1, keepdim=True)
    return rstd[..., None] * (dnormalised - dnormalised.mean(-1, keepdim=True) - normalised * projection)


@jit
def row_statistics_tile(x, inside, N: tl.constexpr, eps):
    """Mean and reciprocal standard deviation [rows]. The row is in registers, so two passes cost no memory."""
    mean = tl.sum(x, 1) / N
    centred = tl.where(inside, x - mean[:, None], 0.0)
    return mean, 1 / tl.sqrt(tl.sum(centred * centred, 1) / N + eps)


@jit
def renormalise_tile(x, inside, mean, rstd):
    """`renormalise` of a tile; zero outside the row, where (0 - mean) / std could be anything, infinity included."""
    return tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)


@jit
def normalise_backward_tile(dnormalised, normalised, rstd, N: tl.constexpr):
    """`normalise_backward` of a tile."""
    mean = tl.sum(dnormalised, 1) / N
    projection = tl.sum(dnormalised * normalised, 1) / N
    return rstd[:, None] * (dnormalised - mean[:, None] - normalised * projection[:, None])
