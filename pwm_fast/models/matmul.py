"""How float32 matrices are multiplied, inside a `with` block only: on CUDA in float32 or TF32, on the CPU by our own
products, where it has AMX in a form of TF32 too, or by oneDNN.

oneDNN matters where our own products (kernels/gemm.py) cannot run. torch gives them to MKL, which runs at the AVX2 rate
on AMD; `kernels/linear.py` holds the switch to oneDNN and its numeric gate.
The gate is tried once per process, the switch is thrown once per extraction step and put back, so code around an
extraction keeps the setting it chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from pwm_fast import backend
from pwm_fast.kernels import linear


@cache
def _passes_gate() -> bool:
    with linear.fast_matmul() as switch:
        return switch.active


@contextmanager
def fast_matmul(dtype: torch.dtype, device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Inside, float32 products on the CPU take the fastest library that keeps float32 accuracy.

    With `tf32` CUDA's tensor cores round factors to 11 bits of mantissa, AMX's tiles to 16 (csrc/gemm_amx.cpp).
    """
    if device.type == "cuda":
        with _tensor_cores(tf32):
            yield
        return
    if dtype is not torch.float32 or device.type != "cpu":
        yield
        return
    with _tiles(tf32), _onednn():
        yield


@contextmanager
def _tiles(tf32: bool) -> Iterator[None]:
    if backend.native is None:
        yield
        return
    before = backend.native.allow_tf32(tf32)
    try:
        yield
    finally:
        backend.native.allow_tf32(before)


@contextmanager
def _onednn() -> Iterator[None]:
    if not _passes_gate():
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@contextmanager
def _tensor_cores(tf32: bool) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
