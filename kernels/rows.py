"""What the row kernels (layernorm_mish, mish_layernorm, layernorm_simnorm) share: shape checks, calls of native code.

Rows come grouped: x [G, R, N], weight and bias [G, N], statistics [G, R].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Forward = tuple[Tensor, Tensor, Tensor]  # y [G, R, N], mean [G, R], rstd [G, R]
Backward = tuple[Tensor, Tensor | None, Tensor | None]  # dx [G, R, N], dw [G, N], db [G, N]


def check_rows(x: Tensor, w: Tensor, b: Tensor) -> None:
    """Raises ValueError unless x is [G, R, N] and w, b are [G, N]."""
    if x.dim() != 3:
        raise ValueError(f"x must be grouped rows [G, R, N], got shape {tuple(x.shape)}")
    expected = (x.shape[0], x.shape[2])
    for name, value in (("weight", w), ("bias", b)):
        if value.shape != expected:
            raise ValueError(f"{name} must be {expected} for x {tuple(x.shape)}, got {tuple(value.shape)}")


def _output(out: Tensor | None, like: Tensor, shape: torch.Size) -> Tensor:
    if out is None:
        return like.new_empty(shape)
    if out.shape != shape or out.dtype is not like.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {like.dtype} {tuple(shape)}, got {out.dtype} {tuple(out.shape)}")
    return out


def into(out: Sequence[Tensor | None] | None, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """`results` copied into the tensors of `out` where there are some."""
    if out is None:
        return results
    return tuple(r if o is None else _output(o, r, r.shape).copy_(r) for o, r in zip(out, results, strict=True))


def native_forward(
    kernel: Callable[..., None], x: Tensor, w: Tensor, b: Tensor, eps: float, out: Forward | None
) -> Forward:
    """Runs a native forward kernel on float32 CPU rows."""
    groups, rows, columns = x.shape
    x, w, b = x.contiguous(), w.contiguous(), b.contiguous()
    y, mean, rstd = out or (None, None, None)
    y, mean, rstd = _output(y, x, x.shape), _output(mean, x, x.shape[:2]), _output(rstd, x, x.shape[:2])
    addresses = [t.data_ptr() for t in (x, w, b, y, mean, rstd)]
    kernel(*addresses, groups, rows, columns, eps, torch.get_num_threads())
    return y, mean, rstd


def native_backward(
    kernel: Callable[..., None], inputs: tuple[Tensor, ...], w: Tensor, need_weight_grad: bool, out: Tensor | None
) -> Backward:
    """Runs a native backward kernel on its `inputs`, the first of which is dy [G, R, N]; w [G, N] gives dw's shape."""
    inputs = tuple(t.contiguous() for t in inputs)
    dy = inputs[0]
    dx = _output(out, dy, dy.shape)
    dw, db = (w.new_empty(w.shape), w.new_empty(w.shape)) if need_weight_grad else (None, None)
    addresses = [t.data_ptr() if t is not None else 0 for t in (*inputs, dx, dw, db)]
    kernel(*addresses, *dy.shape, torch.get_num_threads())
    return dx, dw, db
