"""Networks whose weights never change: forward, and the gradient with respect to the input only.

Extraction differentiates through the world model but never trains it, so no weight gradient is ever formed (30% of the
actor's time at 48M when it is).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.kernels import layernorm_mish, layernorm_simnorm, linear
from pwm_fast.kernels.gemm import PackedWeight, gemm_for, pack
from pwm_fast.models.workspace import Workspace
from pwm_fast.models.world_model import FrozenLayer

EPS = 1e-5


class Saved(NamedTuple):
    """What the backward pass of one layer needs; rows are flattened, with a leading group axis of 1."""

    pre: Tensor  # [1, R, out] Linear's output
    mean: Tensor  # [1, R]
    rstd: Tensor  # [1, R]
    y: Tensor | None  # [1, R, out] SimNorm's output


class FrozenNetwork:
    """A stack of `FrozenLayer`s over rows [..., P, B, in]; biases may differ per policy (folded task embeddings).

    With `packed` the weights are kept a second and third time, W and its transpose as the product's kernel reads them
    (where there is one): for networks that run many times. `dtype` is what weights and activations are kept and
    multiplied in (default: the weights' own); inputs and outputs keep theirs. bfloat16 on such a kernel rounds the
    factors of products only: what it packs is bfloat16, activations, biases and norms stay as they are.
    """

    def __init__(
        self,
        layers: Sequence[FrozenLayer],
        simnorm_dim: int = 8,
        packed: bool = False,
        dtype: torch.dtype | None = None,
    ):
        own = packed and dtype is torch.bfloat16 and gemm_for(None, *(s.weight for s in layers)) is not None
        self.layers, self.simnorm_dim = [s if own else _cast(s, dtype) for s in layers], simnorm_dim
        self.dtype, self._packs, self._rounds = self.layers[0].weight.dtype, packed, own
        self._pack()
        self._norms = [None if s.ln_weight is None else (s.ln_weight[None], s.ln_bias[None]) for s in self.layers]

    def _pack(self) -> None:
        self._packed: list[tuple[PackedWeight | None, PackedWeight | None]] = [
            (pack(s.weight, bf16=self._rounds), pack(s.weight.T, bf16=self._rounds)) if self._packs else (None, None)
            for s in self.layers
        ]

    def load(self, layers: Sequence[FrozenLayer]) -> None:
        """Overwrite the weights with those of `layers` of the same shapes, where they lie."""
        for mine, other in zip(self.layers, layers, strict=True):
            for name in ("weight", "bias", "ln_weight", "ln_bias"):
                if getattr(mine, name) is not None:
                    getattr(mine, name).copy_(getattr(other, name))
        self._pack()

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> tuple[Tensor, list[Saved]]:
        """Outputs [..., P, B, out] and what `input_gradient` needs (all of it in `workspace`, if given)."""
        w = workspace or Workspace()
        lead, batch, outside = x.shape[:-1], x.shape[-2], x.dtype
        x = x.reshape(-1, x.shape[-1]).to(self.dtype)
        rows, saved, whole = x.shape[0], [], self.dtype is not torch.bfloat16  # statistics have the kernel's precision
        for i, (layer, norm, (packed, _)) in enumerate(zip(self.layers, self._norms, self._packed)):
            pre = w.tensor(f"{i}.pre", x, 1, rows, layer.weight.shape[0])
            _linear(x, layer, packed, batch, pre[0])
            if norm is None:
                x = pre[0]
                continue
            place: tuple[Tensor | None, ...] = (
                w.tensor(f"{i}.y", pre, *pre.shape),
                *(w.tensor(f"{i}.{s}", pre, 1, rows) if whole else None for s in ("mean", "rstd")),
            )
            if layer.activation == "simnorm":
                y, *statistics = layernorm_simnorm.forward(pre, *norm, self.simnorm_dim, EPS, out=place)
            else:
                y, *statistics = layernorm_mish.forward(pre, *norm, EPS, out=place)
            if not whole:
                statistics = [w.tensor(f"{i}.{n}", s, 1, rows).copy_(s) for n, s in zip(("mean", "rstd"), statistics)]
            saved.append(Saved(pre, *statistics, y if layer.activation == "simnorm" else None))
            x = y[0]
        if outside is not self.dtype:
            x = w.tensor("result", x.new_empty(0, dtype=outside), *x.shape).copy_(x)
        return x.view(*lead, -1), saved

    def input_gradient(self, dy: Tensor, saved: list[Saved], workspace: Workspace | None = None) -> Tensor:
        """Gradient [..., P, B, in] of sum(dy * y), in `workspace` if given. dy [..., P, B, out]."""
        w = workspace or Workspace()
        lead, outside = dy.shape[:-1], dy.dtype
        dy = dy.reshape(-1, dy.shape[-1]).to(self.dtype)
        saved = [*saved, *[None] * (len(self.layers) - len(saved))]
        for i in reversed(range(len(self.layers))):
            layer, norm, s, packed = self.layers[i], self._norms[i], saved[i], self._packed[i][1]
            if norm is not None:
                d_pre = w.tensor(f"{i}.d_pre", dy, 1, *dy.shape)
                if s.y is not None:
                    layernorm_simnorm.backward(
                        dy[None], s.y, s.pre, s.mean, s.rstd, *norm, False, self.simnorm_dim, out=d_pre
                    )
                else:
                    layernorm_mish.backward(dy[None], s.pre, s.mean, s.rstd, *norm, False, out=d_pre)
                dy = d_pre[0]
            dx = w.tensor(f"{i}.dx", dy, dy.shape[0], layer.weight.shape[1])
            if packed is not None:
                dy = packed.product(dy, out=dx)
            else:
                dy = linear.input_grad(dy[None], layer.weight[None], out=dx[None])[0]
        return dy.to(outside).view(*lead, -1)


def _cast(layer: FrozenLayer, dtype: torch.dtype | None) -> FrozenLayer:
    """The layer with its tensors in `dtype`; itself where there is nothing to convert."""
    if dtype is None or layer.weight.dtype is dtype:
        return layer
    ln = (None if x is None else x.to(dtype) for x in (layer.ln_weight, layer.ln_bias))
    return FrozenLayer(layer.weight.to(dtype), layer.bias.to(dtype), layer.activation, *ln)


def _linear(x: Tensor, layer: FrozenLayer, packed: PackedWeight | None, batch: int, out: Tensor) -> None:
    """out = x [R, in] @ W^T + bias, with bias [1, out] for all rows or [P, out] for rows ordered [..., P, batch]."""
    shared = layer.bias[0] if layer.bias.shape[0] == 1 else None
    if packed is not None:
        packed.product(x, shared, out=out)
    else:
        bias = None if shared is None else shared[None]
        linear.forward(x[None], layer.weight[None], bias, out=out[None])
    if shared is None:
        out.view(-1, layer.bias.shape[0], batch, out.shape[1]).add_(layer.bias[:, None])
