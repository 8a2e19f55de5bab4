"""Grouped float32 matrix products on the CPU: the Python side of csrc/gemm*, on AMX, AVX-512, AVX2 or any vectors.

AMX multiplies bfloat16 only: there a float32 is the sum of three, and six products of them are as exact as a
multiply-add at 1.3 to 1.9 times MKL's speed (csrc/gemm_amx.cpp); three, where TF32 is allowed, have 16 bits of
mantissa. Products by packed weights may round their factors to bfloat16, with sums in float32: on AMX 1.8 to 3.3
times float32's speed; on AVX2, which has no such multiplication, 0.97 to 1.02 at half the weights' memory
(bench/test_native.py).

Groups, shared rows, transposed and strided operands are read where they lie, and biases and their gradients cost no
pass of their own. Against torch's MKL and oneDNN: 1.1 to 1.2 times as fast at 256 rows, 1.1 to 1.4 at 64 rows on packed
weights (AVX2, Zen 3, bench/test_native.py); in extraction 85-90% of a core's peak against 70-80% (AVX-512, Zen 4).
Packed weights of megabytes lie in huge pages: 3 to 5% of a product of 64 rows. Up to 16 rows meet W^T without a copy of
either (csrc/gemm_rows.hpp), each as if it were alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels.dispatch import native_for

Operand = tuple[int, int, int, int, int]  # address, strides of row, column and member, groups that share a member


def gemm_for(choice: str | None, *tensors: Tensor) -> Any | None:
    """The native module if it should multiply `tensors`, else None: torch does (see `dispatch.native_for`).

    The automatic choice is native with AVX2 or better, or where `PWM_FAST_ISA` or `set_isa` forces an instruction set.
    """
    native = native_for(choice, *tensors)
    return native if native is not None and (choice == "native" or native.has_gemm()) else None


def _operand(x: Tensor, groups: int) -> Operand:
    return x.data_ptr(), x.stride(1), x.stride(2), x.stride(0), groups // x.shape[0]


def _vector(x: Tensor | None, groups: int, length: int) -> tuple[int, int]:
    if x is None:
        return 0, 0
    if tuple(x.shape) != (groups, length) or (length > 1 and x.stride(1) != 1):
        raise ValueError(f"vectors must be {(groups, length)} with neighbouring entries, got {tuple(x.shape)}")
    return x.data_ptr(), x.stride(0)


def multiply(
    native: Any, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, row_sums: Tensor | None = None
) -> Tensor:
    """out [G, m, n] = a b + bias [G, n] for a [g, m, k], b [h, k, n] of any strides, g and h divisors of G.

    Each member of a and b serves G / g and G / h neighbouring groups. `row_sums` [G, m], where given, receives a summed
    along k. Raises ValueError on shapes that do not fit.
    """
    groups, m, n = out.shape
    k = a.shape[2]
    if a.shape[1] != m or b.shape[1:] != (k, n) or groups % a.shape[0] or groups % b.shape[0]:
        raise ValueError(f"cannot multiply {tuple(a.shape)} by {tuple(b.shape)} into {tuple(out.shape)}")
    if n > 1 and out.stride(2) != 1:  # the kernel writes whole vectors of columns
        return out.copy_(multiply(native, a, b, out.new_empty(out.shape), bias, row_sums))
    native.gemm(
        _operand(a, groups),
        _operand(b, groups),
        0,
        (out.data_ptr(), out.stride(1), out.stride(0)),
        _vector(bias, groups, n),
        _vector(row_sums, groups, m),
        groups,
        m,
        n,
        k,
        False,
        torch.get_num_threads(),
    )
    return out


HUGE_PAGE = 1 << 19  # floats of 2 MB; csrc/huge_pages.hpp asks for such pages


def _huge(like: Tensor, floats: int) -> Tensor:
    """Memory for `floats` that begins with a huge page, if it fills one."""
    if floats < HUGE_PAGE:
        return like.new_empty(floats)
    memory = like.new_empty(floats + HUGE_PAGE)
    start = -(memory.data_ptr() // memory.element_size()) % HUGE_PAGE
    return memory[start : start + floats]


def huge_copy(weight: Tensor) -> Tensor:
    """A contiguous copy of a constant; one of megabytes lies in huge pages, where the system grants them.

    Reading 33 MB for a single row takes 0.82 of the time without a page's end every 4 KB (Zen 3).
    """
    if backend.native is None or not weight.is_cpu or weight.numel() < HUGE_PAGE:
        return weight.clone(memory_format=torch.contiguous_format)
    memory = _huge(weight, weight.numel())
    backend.native.advise_huge_pages(memory.data_ptr(), memory.numel() * memory.element_size())
    return memory.view(weight.shape).copy_(weight)


class PackedWeight:
    """A constant W [out, in] prepared for products; made by `pack`. With `bf16` its panels hold pairs of bfloat16."""

    def __init__(self, native: Any, weight: Tensor, bf16: bool = False):
        self._native, self._panel_row, (self._outputs, self._inputs) = native, native.gemm_panel_row(), weight.shape
        self.bf16, strides = bf16, (weight.stride(1), weight.stride(0))
        self._panels = _huge(weight, native.gemm_packed_floats(self._inputs, self._outputs, bf16))
        native.gemm_pack(weight.data_ptr(), *strides, self._inputs, self._outputs, bf16, self._panels.data_ptr())

    def product(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x W^T + bias for x [R, in], bias [out]: `torch.nn.functional.linear`. `out` [R, out] is contiguous.

        With `bf16` both factors are rounded to bfloat16, to nearest even; sums, bias and result are float32.
        Raises ValueError on other shapes and types.
        """
        if x.dim() != 2 or x.shape[1] != self._inputs or x.dtype is not torch.float32 or not x.is_cpu:
            raise ValueError(f"x must be float32 [R, {self._inputs}] on the cpu, got {x.dtype} {tuple(x.shape)}")
        if bias is not None and (bias.dtype is not torch.float32 or not bias.is_cpu):
            raise ValueError(f"bias must be float32 on the cpu, got {bias.dtype} on {bias.device}")
        y = x.new_empty(x.shape[0], self._outputs) if out is None else out
        if y.shape != (x.shape[0], self._outputs) or y.dtype is not torch.float32 or not y.is_contiguous():
            raise ValueError(f"out must be contiguous float32 {(x.shape[0], self._outputs)}, got {tuple(y.shape)}")
        self._native.gemm(
            _operand(x[None], 1),
            (self._panels.data_ptr(), 0, 0, 0, 1),
            self._panel_row,
            (y.data_ptr(), y.stride(0), 0),
            _vector(None if bias is None else bias[None], 1, self._outputs),
            (0, 0),
            1,
            *y.shape,
            self._inputs,
            self.bf16,
            torch.get_num_threads(),
        )
        return y


def pack(weight: Tensor, backend: str | None = None, bf16: bool = False) -> PackedWeight | None:
    """W [out, in] prepared for many products, or None where torch multiplies. Later changes of `weight` do not show.

    Saves what a product of 64 rows spends on bringing W into order: 9% at 512 columns, 17% at 1792. `bf16`: in half the
    memory, for products of factors rounded to bfloat16.
    """
    native = gemm_for(backend, weight)
    return None if native is None else PackedWeight(native, weight, bf16)
