"""What the row kernels (layernorm_mish, mish_layernorm, layernorm_simnorm) share: shape checks, calls of native and
Triton code.

Rows come grouped: x [G, R, N], weight and bias [G, N], statistics [G, R].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Forward = tuple[Tensor, Tensor, Tensor]  # y [G, R, N], mean [G, R], rstd [G, R]
Backward = tuple[Tensor, Tensor | None, Tensor | None]  # dx [G, R, N], dw [G, N], db [G, N]


def check_rows(
    x: Tensor, w: Tensor, b: Tensor, like_x: tuple[Tensor, ...] = (), statistics: tuple[Tensor, ...] = ()
) -> None:
    """Raises ValueError unless x and `like_x` are [G, R, N], w and b [G, N], `statistics` [G, R]."""
    if x.dim() != 3:
        raise ValueError(f"x must be grouped rows [G, R, N], got shape {tuple(x.shape)}")
    groups, rows, columns = x.shape
    for value in (w, b):
        if value.shape != (groups, columns):
            raise ValueError(f"weight and bias must be {(groups, columns)} for x {(*x.shape,)}, got {(*value.shape,)}")
    for value in like_x:
        if value.shape != x.shape:
            raise ValueError(f"gradients and outputs must have x's shape {(*x.shape,)}, got {(*value.shape,)}")
    for value in statistics:
        if value.shape != (groups, rows):
            raise ValueError(f"mean and rstd must be {(groups, rows)} for x {(*x.shape,)}, got {(*value.shape,)}")


def _output(out: Tensor | None, like: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or like.dtype
    if out is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    if out.shape != shape or out.dtype is not dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {dtype} {tuple(shape)}, got {out.dtype} {tuple(out.shape)}")
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
    dw, db = (_output(None, w, w.shape), _output(None, w, w.shape)) if need_weight_grad else (None, None)
    addresses = [t.data_ptr() if t is not None else 0 for t in (*inputs, dx, dw, db)]
    kernel(*addresses, *dy.shape, torch.get_num_threads())
    return dx, dw, db


@torch.no_grad()
def triton_forward(
    operator: Callable[..., None], x: Tensor, w: Tensor, b: Tensor, *options: float, out: Forward | None
) -> Forward:
    """Runs a registered forward operator. Statistics are float32 also of bfloat16 rows, unless `out` has them so."""
    x, w, b = x.contiguous(), w.contiguous(), b.contiguous()
    y, *statistics = out or (None, None, None)
    y = _output(y, x, x.shape)
    mean, rstd = (
        _output(s, x, x.shape[:2], x.dtype if s is not None and s.dtype is x.dtype else torch.float32)
        for s in statistics
    )
    operator(x, w, b, y, mean, rstd, *options)
    return y, mean, rstd


@torch.no_grad()
def triton_backward(
    operator: Callable[..., None],
    inputs: tuple[Tensor, ...],
    w: Tensor,
    need_weight_grad: bool,
    *options: float,
    out: Tensor | None,
) -> Backward:
    """Runs a registered backward operator on its `inputs`, the first of which is dy [G, R, N]."""
    inputs = tuple(t.contiguous() for t in inputs)
    dy = inputs[0]
    dx = _output(out, dy, dy.shape)
    dw, db = (_output(None, w, w.shape), _output(None, w, w.shape)) if need_weight_grad else (None, None)
    operator(*inputs, dx, dw, db, *options)
    return dx, dw, db
