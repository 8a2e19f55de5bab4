"""The network of actors and critics, G of them at once: (Linear -> Mish -> LayerNorm) x hidden, then a plain Linear.

Forward and backward are explicit functions: nothing is traced, gradients land in the flat gradient rows, and the caller
decides which rows of a batch are worth a backward pass.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.kernels import linear, mish_layernorm
from pwm_fast.models.parameters import FlatParameters

EPS = 1e-5


class Hidden(NamedTuple):
    """What the backward pass of one hidden layer needs."""

    x: Tensor  # [G, R, in] its input (first layer: [g, R, in], shared by G / g neighbours)
    pre: Tensor  # [G, R, out] Linear's output
    mean: Tensor  # [G, R] of mish(pre)
    rstd: Tensor  # [G, R]


class Activations(NamedTuple):
    """What a forward pass keeps for the backward pass."""

    hidden: list[Hidden]
    last: Tensor  # [G, R, in] input of the last Linear

    def rows(self, start: int, stop: int) -> Activations:
        """The same for a range of rows."""

        def cut(t: Tensor) -> Tensor:
            return t[:, start:stop].contiguous()

        return Activations([Hidden(*map(cut, layer)) for layer in self.hidden], cut(self.last))

    @staticmethod
    def join(steps: list[Activations]) -> Activations:
        """Rows of several passes one after the other: H passes of [G, R, .] become [G, H * R, .]."""
        if len(steps) == 1:
            return steps[0]
        hidden = []
        for layers in zip(*(s.hidden for s in steps)):
            hidden.append(Hidden(*(torch.cat(parts, 1) for parts in zip(*layers))))
        return Activations(hidden, torch.cat([s.last for s in steps], 1))


class PopulationMLP:
    """G networks of equal widths.

    Parameters of layer i: `{i}.weight` [G, out, in], `{i}.bias`, `{i}.ln.weight` and `{i}.ln.bias` [G, out].
    """

    def __init__(
        self,
        members: int,
        widths: tuple[int, ...],
        extra: dict[str, tuple[int, ...]] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        if len(widths) < 3 or min(widths) < 1:
            raise ValueError(f"widths must be input, at least one hidden layer and output, all >= 1, got {widths}")
        self.members, self.widths = members, tuple(widths)
        self.depth = len(widths) - 1
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            shapes[f"{i}.weight"], shapes[f"{i}.bias"] = (outputs, inputs), (outputs,)
            if i < self.depth - 1:
                shapes[f"{i}.ln.weight"], shapes[f"{i}.ln.bias"] = (outputs,), (outputs,)
        self.parameters = FlatParameters(members, shapes | (extra or {}), dtype, device)
        for i in range(self.depth - 1):
            self.parameters[f"{i}.ln.weight"].fill_(1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Activations]:
        """Outputs [G, R, out] of inputs [G, R, in], and what `backward` needs.

        Inputs [g, R, in] with g a divisor of G are shared by G / g neighbouring networks.
        """
        p = self.parameters
        hidden = []
        for i in range(self.depth - 1):
            pre = linear.forward(x, p[f"{i}.weight"], p[f"{i}.bias"])
            y, mean, rstd = mish_layernorm.forward(pre, p[f"{i}.ln.weight"], p[f"{i}.ln.bias"], EPS)
            hidden.append(Hidden(x, pre, mean, rstd))
            x = y
        last = self.depth - 1
        out = linear.forward(x, p[f"{last}.weight"], p[f"{last}.bias"])
        return out, Activations(hidden, x)

    def backward(self, dy: Tensor, saved: Activations) -> None:
        """Overwrite the gradients of all network parameters with those of sum(dy * y). dy [G, R, out]."""
        self._backward(dy, saved, weights=True, inputs=False)

    def input_gradient(self, dy: Tensor, saved: Activations) -> Tensor:
        """Gradient [g, R, in] with respect to the input; parameters' gradients are left alone."""
        dx = self._backward(dy, saved, weights=False, inputs=True)
        assert dx is not None
        return dx

    def _backward(self, dy: Tensor, saved: Activations, weights: bool, inputs: bool) -> Tensor | None:
        p, g = self.parameters, self.parameters.grads
        x = saved.last
        for i in range(self.depth - 1, -1, -1):
            if i < self.depth - 1:
                layer = saved.hidden[i]
                gain, shift = p[f"{i}.ln.weight"], p[f"{i}.ln.bias"]
                dy, dgain, dshift = mish_layernorm.backward(dy, layer.pre, layer.mean, layer.rstd, gain, shift, weights)
                x = layer.x
                if weights:
                    g[f"{i}.ln.weight"].copy_(dgain)
                    g[f"{i}.ln.bias"].copy_(dshift)
            if weights:
                linear.weight_grad(dy, x, out=g[f"{i}.weight"], bias_out=g[f"{i}.bias"])
            if i:
                dy = linear.input_grad(dy, p[f"{i}.weight"])
            elif inputs:
                dy = linear.input_grad(dy, p[f"{i}.weight"], groups=saved.hidden[0].x.shape[0])
        return dy if inputs else None
