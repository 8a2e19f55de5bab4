"""Decides per call whether the native kernels take it: float32 on the CPU goes native, everything else is torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast import backend


def native_for(choice: str | None, *tensors: Tensor) -> Any | None:
    """The native module if it should run an op on `tensors`, else None (torch runs it).

    `choice`: "native", "torch" or None for the automatic choice (`pwm_fast.backend.resolve`).
    Raises RuntimeError where "native" is asked for and the module is missing, TypeError where it cannot take these
    tensors.
    """
    if backend.resolve(choice) != "native":
        return None
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            if choice == "native":
                raise TypeError(f"native kernels take float32 on cpu, got {tensor.dtype} on {tensor.device}")
            return None
    return backend.native
