"""All layers of a population's networks in one native call: the Python side of csrc/gemm_mlp.cpp.

The definition is `pwm_fast.models.population_mlp.PopulationMLP`, layer by layer. With eleven calls
from Python per minibatch of the critics, a step at 5M took 1.17 times as long (bench/test_extraction.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pwm_fast import backend


class NativeMLP:
    """G networks of equal widths, parameters in rows of one array [G, size] with tensors at `offsets` in each row."""

    def __init__(self, widths: Sequence[int], offsets: Mapping[str, int], groups: int, size: int, eps: float):
        self._groups, self._made_of = groups, (tuple(widths), dict(offsets), groups, size, eps)
        layers = [
            [inputs, outputs, *(offsets.get(f"{i}.{name}", 0) for name in ("weight", "bias", "ln.weight", "ln.bias"))]
            for i, (inputs, outputs) in enumerate(pairwise(widths))
        ]
        self._mlp = backend.native.Mlp(layers, groups, size, eps)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeMLP, self._made_of

    def _input(self, x: Tensor) -> tuple[int, int, int, int]:
        return x.data_ptr(), x.stride(1), x.stride(0), self._groups // x.shape[0]

    def forward(self, parameters: Tensor, x: Tensor, places: Sequence[Tensor], y: Tensor) -> None:
        """y [G, R, out] of x [g, R, in] (rows whole); `places`: pre, y, mean, rstd per hidden layer."""
        addresses = [t.data_ptr() for t in places]
        self._mlp.forward(
            parameters.data_ptr(), *self._input(x), addresses, y.data_ptr(), x.shape[1], torch.get_num_threads()
        )

    def backward(self, parameters: Tensor, gradients: Tensor, dy: Tensor, x: Tensor, places: Sequence[Tensor]) -> None:
        """Overwrites `gradients` with those of sum(dy * y); `places`: pre, y, mean, rstd, dy per hidden layer."""
        addresses = [t.data_ptr() for t in places]
        self._mlp.backward(
            parameters.data_ptr(),
            gradients.data_ptr(),
            dy.data_ptr(),
            *self._input(x),
            addresses,
            x.shape[1],
            torch.get_num_threads(),
        )
