"""Triton, where it is installed: op files take `jit`, `tl` and `triton` from here, so that they import without it.

On CUDA the kernels are compiled; with TRITON_INTERPRET=1 (set before the first import) they run on the CPU, line by
line in numpy, which is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import library

# Multiplies and adds fuse. Triton 3.10 turns that off by default, and 3.9 warns at every start that it will.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

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

DTYPES = (torch.float32, torch.bfloat16)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function as it is, which nobody calls then."""
    return function if triton is None else triton.jit(function)


def refusal(*tensors: torch.Tensor, float64: bool = False) -> str | None:
    """Why Triton kernels cannot take these tensors, or None where they can. Some kernels take `float64` as well."""
    if unavailable is not None:
        return unavailable
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in (*DTYPES, *((torch.float64,) if float64 else ())):
            return f"triton kernels take float32 and bfloat16, got {tensor.dtype}"
        if not (tensor.is_cuda or interpreting):
            return f"triton kernels need CUDA tensors (or TRITON_INTERPRET=1), got one on {tensor.device}"
    return None


def operator(*writes: str) -> Callable[[Callable[..., None]], Any]:
    """Registers a function that launches kernels as torch.ops.pwm_fast.<its name>, and gives that operator.

    It returns nothing and writes into those of its arguments that `writes` names: whoever calls it brings the memory.
    So a fake tensor needs no more than the declaration, and whole steps can be traced, with CUDA tensors on a machine
    that has none, or captured in a graph. There is no autograd here; each op file has its own front for that.
    The schema is read from the annotations (Tensor, Tensor | None, float, int, bool).
    """

    def register(launch: Callable[..., None]) -> Any:
        @functools.wraps(launch)
        def on_its_device(*args: Any) -> None:
            if args[0].is_cuda:  # kernels go to the current device, which need not be the tensors'
                with torch.cuda.device(args[0].device):
                    launch(*args)
            else:
                launch(*args)

        name = f"pwm_fast::{launch.__name__}"
        library.define(name, library.infer_schema(launch, mutates_args=writes))
        library.impl(name, "CompositeExplicitAutograd")(on_its_device)
        library.register_fake(name)(_writes_into_its_arguments)
        return getattr(torch.ops.pwm_fast, launch.__name__).default

    return register


def _writes_into_its_arguments(*args: Any, **kwargs: Any) -> None:
    """What an operator does to fake tensors: their shapes stay as they are."""
