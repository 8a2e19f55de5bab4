"""Triton, where it is installed: op files take `jit`, `tl` and `triton` from here, so that they import without it.

On CUDA the kernels are compiled; with TRITON_INTERPRET=1 (set before the first import) they run on the CPU, line by
line in numpy, which is how they are tested without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl

    unavailable: str | None = None
except ImportError as error:
    triton = tl = None
    unavailable = f"triton cannot be imported: {error}"

interpreting = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit`; without Triton the function as it is, which nobody calls then."""
    return function if triton is None else triton.jit(function)


def refusal(*tensors: torch.Tensor) -> str | None:
    """Why Triton kernels cannot take these tensors, or None where they can."""
    if unavailable is not None:
        return unavailable
    if interpreting:
        return None
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"triton kernels need CUDA tensors (or TRITON_INTERPRET=1), got one on {tensor.device}"
    return None
