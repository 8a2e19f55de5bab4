"""The network of actors and critics, G of them at once: (Linear -> Mish -> LayerNorm) x hidden, then a plain Linear.

Forward and backward are explicit functions: nothing is traced, gradients land in the flat gradient rows, and the caller
decides which rows of a batch are worth a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.kernels import linear, mish_layernorm
from pwm_fast.kernels.gemm import gemm_for
from pwm_fast.kernels.mlp import NativeMLP
from pwm_fast.models.parameters import FlatParameters
from pwm_fast.models.workspace import Workspace

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

    @staticmethod
    def join(steps: list[Activations], workspace: Workspace | None = None) -> Activations:
        """Rows of several passes one after the other: H passes of [G, R, .] become [G, H * R, .] (in `workspace`)."""
        if len(steps) == 1:
            return steps[0]
        w = workspace or Workspace()

        def cat(name: str, parts: Sequence[Tensor]) -> Tensor:
            groups, _, *rest = parts[0].shape
            return torch.cat(parts, 1, out=w.tensor(name, parts[0], groups, sum(p.shape[1] for p in parts), *rest))

        hidden = []
        for i, layers in enumerate(zip(*(s.hidden for s in steps))):
            fields = zip(Hidden._fields, zip(*layers))
            hidden.append(Hidden(*(cat(f"{i}.{name}", parts) for name, parts in fields)))
        return Activations(hidden, cat("last", [s.last for s in steps]))


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
        self._made: NativeMLP | None = None

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> tuple[Tensor, Activations]:
        """Outputs [G, R, out] of inputs [G, R, in], and what `backward` needs (all of it in `workspace`, if given).

        Inputs [g, R, in] with g a divisor of G are shared by G / g neighbouring networks.
        """
        p, w, rows, first = self.parameters, workspace or Workspace(), (self.members, x.shape[1]), x
        native = self._native(first)
        hidden, places = [], []
        for i, width in enumerate(self.widths[1:-1]):
            pre, y = (w.tensor(f"{i}.{name}", p.flat, *rows, width) for name in ("pre", "y"))
            mean, rstd = (w.tensor(f"{i}.{name}", p.flat, *rows) for name in ("mean", "rstd"))
            if native is None:
                linear.forward(x, p[f"{i}.weight"], p[f"{i}.bias"], out=pre)
                mish_layernorm.forward(pre, p[f"{i}.ln.weight"], p[f"{i}.ln.bias"], EPS, out=(y, mean, rstd))
            places += [pre, y, mean, rstd]
            hidden.append(Hidden(x, pre, mean, rstd))
            x = y
        last = self.depth - 1
        out = w.tensor("out", p.flat, *rows, self.widths[-1])
        if native is None:
            linear.forward(x, p[f"{last}.weight"], p[f"{last}.bias"], out=out)
        else:
            native.forward(p.flat, first, places, out)
        return out, Activations(hidden, x)

    def _native(self, x: Tensor, *others: Tensor) -> NativeMLP | None:
        """The kernel that runs all layers, if it can take inputs [g, R, in] and these `others`, all contiguous."""
        p, shape = self.parameters, x.shape
        if gemm_for(None, p.flat, x, *others) is None:
            return None
        if len(shape) != 3 or not shape[1] or shape[2] != self.widths[0] or self.members % shape[0] or x.stride(2) != 1:
            return None  # layer by layer: the checks there name what is wrong
        if not all(t.is_contiguous() for t in others):
            return None
        if self._made is None:
            offsets = {name: view.storage_offset() for name, view in p.views.items()}
            self._made = NativeMLP(self.widths, offsets, *p.flat.shape, EPS)
        return self._made

    def backward(self, dy: Tensor, saved: Activations, workspace: Workspace | None = None) -> None:
        """Overwrite the gradients of all network parameters with those of sum(dy * y). dy [G, R, out]."""
        p, w, hidden = self.parameters, workspace or Workspace(), saved.hidden
        outputs = [*(layer.x for layer in hidden[1:]), saved.last]
        places = []
        for i, (layer, y) in enumerate(zip(hidden, outputs), 1):
            places += [layer.pre, y, layer.mean, layer.rstd, w.tensor(f"{i}.dx", dy, *dy.shape[:2], self.widths[i])]
        native = self._native(hidden[0].x, dy, *places)
        if native is None:
            self._backward(dy, saved, True, False, w)
        else:
            native.backward(p.flat, p.grad, dy, hidden[0].x, places)

    def input_gradient(self, dy: Tensor, saved: Activations) -> Tensor:
        """Gradient [g, R, in] with respect to the input; parameters' gradients are left alone."""
        dx = self._backward(dy, saved, False, True, Workspace())
        assert dx is not None
        return dx

    def _backward(
        self, dy: Tensor, saved: Activations, weights: bool, inputs: bool, workspace: Workspace
    ) -> Tensor | None:
        p, g = self.parameters, self.parameters.grads
        x = saved.last
        for i in range(self.depth - 1, -1, -1):
            if i < self.depth - 1:
                layer = saved.hidden[i]
                gain, shift = p[f"{i}.ln.weight"], p[f"{i}.ln.bias"]
                dy, dgain, dshift = mish_layernorm.backward(
                    dy, layer.pre, layer.mean, layer.rstd, gain, shift, weights, out=dy
                )
                x = layer.x
                if weights:
                    g[f"{i}.ln.weight"].copy_(dgain)
                    g[f"{i}.ln.bias"].copy_(dshift)
            if weights:
                linear.weight_grad(dy, x, out=g[f"{i}.weight"], bias_out=g[f"{i}.bias"])
            if i:
                place = workspace.tensor(f"{i}.dx", dy, *dy.shape[:2], self.widths[i])
                dy = linear.input_grad(dy, p[f"{i}.weight"], out=place)
            elif inputs:
                dy = linear.input_grad(dy, p[f"{i}.weight"], groups=saved.hidden[0].x.shape[0])
        return dy if inputs else None
