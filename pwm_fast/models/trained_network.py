"""A network in training: explicit forward and backward over rows, with gradients in the parameters' own `.grad`.

Nothing is traced, and memory is kept between passes. Rows may be passed in parts, such as the steps of a rollout: the
weight gradients of all rows are then one product per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pwm_fast.kernels import layernorm_mish, layernorm_simnorm, linear
from pwm_fast.kernels.gemm import pack
from pwm_fast.models.workspace import Workspace

EPS = 1e-5
EVERY = slice(None)


@dataclass
class _Memory:
    """One layer's rows, with a leading group axis of 1."""

    pre: Tensor  # [1, R, out] Linear's output
    y: Tensor  # [1, R, out] the layer's; `pre` itself of a plain linear one
    d: Tensor  # [1, R, out] gradient at y, then at `pre`
    mean: Tensor | None = None  # [1, R]
    rstd: Tensor | None = None


class TrainedNetwork:
    """The layers of one of a `WorldModel`'s networks, over inputs [R, in] in `dtype` (default: the parameters').

    `begin`, then `forward`, `backward`, `input_gradient` and `weight_gradients` for slices of the rows (default: all).
    Gradients are summed in the parameters' type, and overwrite what `.grad` held.
    """

    def __init__(self, layers: nn.ModuleList, dtype: torch.dtype | None = None):
        self._parameters = [list(layer.parameters()) for layer in layers]  # weight, bias, and LayerNorm's two
        self._simnorm_dims = [getattr(layer, "simnorm_dim", 0) for layer in layers]
        self._own = self._parameters[0][0].dtype
        self.dtype = dtype or self._own
        self._memories: dict[int, list[_Memory]] = {}
        self._workspace = Workspace()

    def begin(self, x: Tensor, columns: slice = EVERY, parts: int = 1) -> Tensor:
        """Start a pass with inputs x [R, in], whose rows may be written until they are needed; returns where the
        outputs [R, out] will be.

        `columns`: of the inputs, where their gradient is wanted. `parts`: in how many parts the rows will come; for
        several, weights are brought once into the order in which products read them (where there is one).
        """
        self._weights = [[p.detach().to(self.dtype)[None] for p in layer] for layer in self._parameters]
        self._gradients = [[_gradient(p) for p in layer] for layer in self._parameters]
        if len(x) not in self._memories:
            self._memories[len(x)] = [self._memory(x, w) for w in self._weights]
        self._x, self._rows, self._columns = x[None], self._memories[len(x)], columns
        wanted = [weight[0] for weight, *_ in self._weights]
        self._onto = [wanted[0][:, columns], *wanted[1:]]  # what input gradients multiply by
        packs = parts > 1 and self.dtype is self._own
        self._packed = [(pack(w), pack(w_in.T)) if packs else (None, None) for w, w_in in zip(wanted, self._onto)]
        for _, _, *ln in self._gradients:  # summed over the parts, while weights are overwritten
            for gradient in ln:
                gradient.zero_()
        return self._rows[-1].y[0]

    @staticmethod
    def _memory(x: Tensor, parameters: list[Tensor]) -> _Memory:
        shape = (1, len(x), parameters[0].shape[1])
        pre, d = x.new_empty(shape), x.new_empty(shape)
        return _Memory(pre, pre if len(parameters) == 2 else x.new_empty(shape), d)

    @property
    def output_gradient(self) -> Tensor:
        """Where the gradient at the outputs [R, out] goes; `backward` overwrites it."""
        return self._rows[-1].d[0]

    def forward(self, rows: slice = EVERY) -> Tensor:
        """Outputs of these rows."""
        x = self._x[:, rows]
        for i, (m, (weight, bias, *ln)) in enumerate(zip(self._rows, self._weights)):
            packed = self._packed[i][0]
            if packed is None:
                linear.forward(x, weight, bias, out=m.pre[:, rows])
            else:
                packed.product(x[0], bias[0], out=m.pre[0, rows])
            if ln:
                statistics = (None, None) if m.mean is None or m.rstd is None else (m.mean[:, rows], m.rstd[:, rows])
                place = (m.y[:, rows], *statistics)
                if group := self._simnorm_dims[i]:
                    _, *found = layernorm_simnorm.forward(m.pre[:, rows], *ln, group, EPS, out=place)
                else:
                    _, *found = layernorm_mish.forward(m.pre[:, rows], *ln, EPS, out=place)
                if m.mean is None:  # only the kernel knows in which precision it keeps them
                    m.mean, m.rstd = (s.new_empty(m.pre.shape[:2]) for s in found)
                    m.mean[:, rows], m.rstd[:, rows] = found
            x = m.y[:, rows]
        return x[0]

    def backward(self, rows: slice = EVERY) -> None:
        """From `output_gradient` down to the first layer's `Linear`."""
        for i in reversed(range(len(self._rows))):
            (_, _, *ln), m = self._weights[i], self._rows[i]
            d = m.d[:, rows]
            if ln:
                assert m.mean is not None and m.rstd is not None
                saved = (m.pre[:, rows], m.mean[:, rows], m.rstd[:, rows], *ln)
                place = d if self.dtype is self._own else None  # statistics in float32 may widen what torch returns
                if group := self._simnorm_dims[i]:
                    dx, dgain, dshift = layernorm_simnorm.backward(d, m.y[:, rows], *saved, True, group, out=place)
                else:
                    dx, dgain, dshift = layernorm_mish.backward(d, *saved, True, out=place)
                if dx is not d:
                    d.copy_(dx)
                for gradient, found in zip(self._gradients[i][2:], (dgain, dshift)):
                    gradient += found[0]
            if i:
                self._through(i, rows, self._rows[i - 1].d[:, rows])

    def input_gradient(self, rows: slice = EVERY) -> Tensor:
        """Gradient at these rows, and the columns of `begin`, of the inputs, after `backward`; the next call may
        overwrite it."""
        d = self._rows[0].d[:, rows]
        return self._through(0, rows, self._workspace.tensor("dx", d, *d.shape[:2], self._onto[0].shape[1]))[0]

    def _through(self, i: int, rows: slice, out: Tensor) -> Tensor:
        """The gradient at layer i's inputs of these rows."""
        d, packed = self._rows[i].d[:, rows], self._packed[i][1]
        if packed is None:
            return linear.input_grad(d, self._onto[i][None], out=out)
        return packed.product(d[0], out=out[0])[None]

    def weight_gradients(self, rows: slice = EVERY) -> None:
        """The weights' and biases' gradients from these rows alone, after `backward`."""
        x = self._x
        for (weight, bias, *_), m in zip(self._gradients, self._rows):
            d, inputs = m.d[:, rows], x[:, rows]
            if self.dtype is self._own:
                linear.weight_grad(d, inputs, out=weight[None], bias_out=bias[None])
            else:
                weight.copy_(linear.weight_grad(d, inputs)[0])
                torch.sum(d[0], 0, dtype=self._own, out=bias)
            x = m.y


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "gradients are written in place"
    return parameter.grad
