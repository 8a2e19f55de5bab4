"""Layer normalisation of rows without its affine part, forward and backward: what the fused torch versions share."""

from __future__ import annotations

import torch
from torch import Tensor


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
