"""Which library multiplies float32 matrices on the CPU.

torch gives float32 products to MKL, which runs at the AVX2 rate on AMD. Its oneDNN path uses AVX-512 where there is
any, but torch only takes it under the "bf16" precision flag. On machines without AMX that flag changes nothing in the
arithmetic (float32 throughout); on others it may really round to bfloat16. So it is used only where a numeric check
passes, and only inside extraction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# Worst relative error of a product that counts as float32. bfloat16 inputs give 3e-3, float32 below 1e-6.
GATE = 1e-5


@contextmanager
def _onednn() -> Iterator[None]:
    flags = torch.backends.mkldnn.matmul
    before = flags.fp32_precision
    flags.fp32_precision = "bf16"
    try:
        yield
    finally:
        flags.fp32_precision = before


@cache
def onednn_is_float32() -> bool:
    """Whether the oneDNN path exists and keeps float32 accuracy on this machine, tried on products of three shapes."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((64, 512, 512), (256, 400, 200), (1024, 97, 35)):
        a = torch.randn(rows, inner, generator=generator)
        b = torch.randn(inner, columns, generator=generator)
        with _onednn():
            product = a @ b
        exact = a.double() @ b.double()
        if (product - exact).norm() > GATE * exact.norm():
            return False
    return True


@contextmanager
def fast_matmul(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, float32 products on the CPU take the fastest library that keeps float32 accuracy."""
    if dtype is torch.float32 and device.type == "cpu" and onednn_is_float32():
        with _onednn():
            yield
    else:
        yield
