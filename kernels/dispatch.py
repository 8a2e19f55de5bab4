"""Decides per call what runs an op: float32 on the CPU goes native, CUDA tensors go to Triton, all else is torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels.triton_support import refusal


def backend_for(choice: str | None, *tensors: Tensor) -> str:
    """What runs an op on `tensors`: "native", "triton" or "torch".

    `choice`: one of them, or None for the automatic choice (`pwm_fast.backend.resolve`, by the first one's device).
    Raises RuntimeError where the one asked for is missing, TypeError where it cannot take these tensors. What the
    environment asks for gives way to torch where the dtype is the obstacle: float64 is torch's everywhere.
    """
    name = backend.resolve(choice, tensors[0].device.type)
    if name == "native":
        return name if _native_takes(choice, tensors) else "torch"
    if name == "triton":
        reason = refusal(*tensors)
        if reason is None:
            return name
        if choice is None and any(t.dtype is torch.float64 for t in tensors):
            return "torch"
        raise TypeError(f"{reason}; choose backend 'torch', or none for the automatic choice")
    return name


def native_for(choice: str | None, *tensors: Tensor) -> Any | None:
    """The native module if it should run an op on `tensors`, else None.

    `choice`: a backend or None for the automatic choice (`pwm_fast.backend.resolve`).
    Raises RuntimeError where "native" is asked for and the module is missing, TypeError where it cannot take these
    tensors.
    """
    return backend.native if backend.resolve(choice) == "native" and _native_takes(choice, tensors) else None


def _native_takes(choice: str | None, tensors: tuple[Tensor, ...]) -> bool:
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            if choice == "native":
                raise TypeError(f"native kernels take float32 on cpu, got {tensor.dtype} on {tensor.device}")
            return False
    return True
