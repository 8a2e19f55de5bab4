"""Float32 matrix products on the CPU through oneDNN: inside a `with` block, or by weights packed once.

torch gives them to MKL, which runs at the AVX2 rate on AMD; `kernels/linear.py` holds the switch and its numeric gate.
The gate is tried once per process, the switch is thrown once per extraction step and put back, so code around an
extraction keeps the setting it chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from pwm_fast.kernels import linear


@cache
def _passes_gate() -> bool:
    with linear.fast_matmul() as switch:
        return switch.active


@contextmanager
def fast_matmul(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, float32 products on the CPU take the fastest library that keeps float32 accuracy."""
    if dtype is not torch.float32 or device.type != "cpu" or not _passes_gate():
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class PackedWeight:
    """A constant W [out, in] in oneDNN's blocked layout, for products of about `rows` rows.

    Saves the reordering that a product of few rows pays each time: 11% at 64 rows, 5% at 1024 (512 to 1792 columns).
    """

    def __init__(self, weight: Tensor, rows: int):
        self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias for x [R, in], bias [out]."""
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._blocked, bias, "none", [], "")


def pack(weight: Tensor, rows: int) -> PackedWeight | None:
    """`weight` packed, or None where this torch, device or dtype has no such product (then use torch.mm)."""
    if weight.dtype is not torch.float32 or weight.device.type != "cpu" or not _passes_gate():
        return None
    try:
        packed = PackedWeight(weight, rows)
        probe = torch.ones(1, weight.shape[1])
        exact = weight.double().sum(1)
        error = (packed.product(probe)[0].double() - exact).norm()
    except (AttributeError, RuntimeError):  # private operators of torch: absent or changed in another version
        return None
    return packed if error <= linear.GATE * weight.double().abs().sum(1).norm() else None
