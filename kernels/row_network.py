"""Layers of constant weights on rows, all in one native call: the Python side of csrc/gemm_rows_network.cpp.

The definition is layer by layer: `linear.forward`, then a row kernel (`layernorm_mish`, `layernorm_simnorm` in
groups of 8, `mish_layernorm`, or none). Rows that come alone or in batches of up to 16 have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pwm_fast import backend


class RowLayer(NamedTuple):
    """kernel(x W^T + b): "layernorm_mish", "layernorm_simnorm", "mish_layernorm" or "none"."""

    kernel: str
    weight: Tensor  # [out, in], rows in sequence
    bias: Tensor  # [out]
    gain: Tensor | None = None  # [out], of the LayerNorm
    shift: Tensor | None = None


class RowNetwork:
    """`layers` read where they lie, so that changes in place show; they must not be resized. float32 on the CPU.

    Raises RuntimeError where the native module is missing, ValueError for an unknown kernel or tensors that do not fit.
    """

    def __init__(self, layers: Sequence[RowLayer], eps: float = 1e-5):
        if backend.native is None:
            raise RuntimeError(f"a native network needs the native module: {backend.native_reason}")
        self.layers, self._eps = list(layers), eps
        if not self.layers:
            raise ValueError("a network needs at least one layer, got none")
        for i, layer in enumerate(self.layers):
            _check(i, layer, self.layers[i - 1].weight.shape[0] if i else layer.weight.shape[-1])
        self._network = backend.native.RowNetwork(
            [
                (
                    s.kernel,
                    *reversed(s.weight.shape),
                    s.weight.stride(0),
                    *(0 if t is None else t.data_ptr() for t in s[1:]),
                )
                for s in self.layers
            ],
            eps,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return RowNetwork, (self.layers, self._eps)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Outputs [R, out] of inputs x [R, in] of layer `first`. Raises ValueError for another type or shape."""
        inputs = self.layers[first].weight.shape[1]
        if x.dim() != 2 or x.shape[1] != inputs or x.dtype is not torch.float32 or not x.is_cpu:
            raise ValueError(
                f"x must be float32 [R, {inputs}] on the cpu, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        if x.stride(1) != 1:
            x = x.contiguous()
        y = x.new_empty(x.shape[0], self.layers[-1].weight.shape[0])
        self._network.forward(x.data_ptr(), x.stride(0), y.data_ptr(), x.shape[0], first, torch.get_num_threads())
        return y

    def forward_array(self, x: np.ndarray) -> np.ndarray:
        """Outputs [..., out] float32 of rows [..., in] of any numbers. Raises ValueError for rows of another length."""
        return self._network.forward_array(x, torch.get_num_threads())


def _check(number: int, layer: RowLayer, inputs: int) -> None:
    outputs = layer.weight.shape[0]
    norm = [] if layer.kernel == "none" else [("gain", layer.gain), ("shift", layer.shift)]
    for name, tensor in [("weight", layer.weight), ("bias", layer.bias), *norm]:
        shape = (outputs, inputs) if name == "weight" else (outputs,)
        if tensor is None or tensor.shape != shape:
            found = "none" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{name} of layer {number} must have shape {shape}, got {found}")
        if tensor.dtype is not torch.float32 or not tensor.is_cpu or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
            raise ValueError(
                f"{name} of layer {number} must be float32 on the cpu with rows in sequence, got {tensor.dtype}"
            )
    if layer.kernel == "layernorm_simnorm" and outputs % 8:
        raise ValueError(f"simnorm needs a multiple of 8 columns, got {outputs} in layer {number}")
