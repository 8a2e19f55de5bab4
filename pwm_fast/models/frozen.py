"""Networks whose weights never change: forward, and the gradient with respect to the input only.

Extraction differentiates through the world model but never trains it, so no weight gradient is ever formed (30% of the
actor's time at 48M when it is).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.kernels import layernorm_mish, layernorm_simnorm
from pwm_fast.kernels.gemm import PackedWeight, pack
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
    (where there is one): for networks that run many times.
    """

    def __init__(self, layers: Sequence[FrozenLayer], simnorm_dim: int = 8, packed: bool = False):
        self.layers, self.simnorm_dim = list(layers), simnorm_dim
        self._packed: list[tuple[PackedWeight | None, PackedWeight | None]] = [
            (pack(s.weight), pack(s.weight.T)) if packed else (None, None) for s in self.layers
        ]
        self._norms = [None if s.ln_weight is None else (s.ln_weight[None], s.ln_bias[None]) for s in self.layers]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Saved]]:
        """Outputs [..., P, B, out] and what `input_gradient` needs."""
        lead, batch = x.shape[:-1], x.shape[-2]
        x = x.reshape(-1, x.shape[-1])
        saved = []
        for layer, norm, (packed, _) in zip(self.layers, self._norms, self._packed):
            pre = _linear(x, layer, packed, batch)
            if norm is None:
                x = pre
                continue
            if layer.activation == "simnorm":
                y, mean, rstd = layernorm_simnorm.forward(pre[None], *norm, self.simnorm_dim, EPS)
                saved.append(Saved(pre[None], mean, rstd, y))
            else:
                y, mean, rstd = layernorm_mish.forward(pre[None], *norm, EPS)
                saved.append(Saved(pre[None], mean, rstd, None))
            x = y[0]
        return x.view(*lead, -1), saved

    def input_gradient(self, dy: Tensor, saved: list[Saved]) -> Tensor:
        """Gradient [..., P, B, in] of sum(dy * y). dy [..., P, B, out]."""
        lead = dy.shape[:-1]
        dy = dy.reshape(-1, dy.shape[-1])
        keep = iter(reversed(saved))
        for layer, norm, (_, packed) in zip(reversed(self.layers), reversed(self._norms), reversed(self._packed)):
            if norm is not None:
                s = next(keep)
                if s.y is not None:
                    grads = layernorm_simnorm.backward(
                        dy[None], s.y, s.pre, s.mean, s.rstd, *norm, False, self.simnorm_dim
                    )
                else:
                    grads = layernorm_mish.backward(dy[None], s.pre, s.mean, s.rstd, *norm, False)
                dy = grads[0][0]
            dy = torch.mm(dy, layer.weight) if packed is None else packed.product(dy)
        return dy.view(*lead, -1)


def _linear(x: Tensor, layer: FrozenLayer, packed: PackedWeight | None, batch: int) -> Tensor:
    """x [R, in] @ W^T + bias, with bias [1, out] for all rows or [P, out] for rows ordered [..., P, batch]."""
    if layer.bias.shape[0] == 1:
        return torch.addmm(layer.bias, x, layer.weight.T) if packed is None else packed.product(x, layer.bias[0])
    y = torch.mm(x, layer.weight.T) if packed is None else packed.product(x)
    y.view(-1, layer.bias.shape[0], batch, y.shape[1]).add_(layer.bias[:, None])
    return y
