"""Mish (Misra 2019), x tanh(softplus(x)), and its slope from a single exponential.

With e = exp(x) and n = e (e + 2): tanh(log(1 + e)) = n / (n + 2), so mish = x n / (n + 2) and
mish' = n / (n + 2) + 4 x e (e + 1) / (n + 2)^2. The usual form costs three transcendental functions per element.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pwm_fast.kernels.triton_support import jit, tl


def mish(x: Tensor) -> Tensor:
    """The definition, elementwise."""
    return x * torch.tanh(F.softplus(x, threshold=40.0))


def _limit(x: Tensor) -> float:
    """Where exp(4x) still fits the dtype and 1 - n / (n + 2) is already below its resolution."""
    return 40.0 if x.dtype is torch.float64 else 20.0


def mish_forward(x: Tensor) -> Tensor:
    """Mish from one exponential."""
    e = torch.exp(x.clamp(max=_limit(x)))
    n = e * (e + 2)
    return x * (n / (n + 2))


def mish_slope(x: Tensor) -> Tensor:
    """d mish / dx from one exponential."""
    e = torch.exp(x.clamp(max=_limit(x)))
    n = e * (e + 2)
    r = 1 / (n + 2)
    return n * r + x * (4 * e * (e + 1) * r * r)


@jit
def mish_tile(x):
    """`mish_forward` of a tile. NaN goes through: `minimum` loses it, the product with x brings it back."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


@jit
def mish_and_slope_tile(x):
    """Mish of a tile and its slope, from one exponential and one division."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2)
    r = 1 / (n + 2)
    return x * (n * r), n * r + x * (4 * e * (e + 1) * r * r)
