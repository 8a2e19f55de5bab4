"""H imagined steps in one native call, and their gradient in one: the Python side of csrc/dynamics_rollout.cpp.

The definition is `pwm_fast.kernels.dynamics_rollout.dynamics_rollout`; on CUDA that file's persistent kernels
do the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels.dynamics_rollout import ActorRows
from pwm_fast.kernels.gemm import PackedWeight


class PackedLayer(NamedTuple):
    """A layer of the dynamics: `pack(W)` and `pack(W.T)` of W [out, in], bias [P or 1, out], the norm's affine part."""

    weight: PackedWeight
    transpose: PackedWeight
    bias: Tensor
    ln_weight: Tensor | None  # [out]; None in the last layer of residual dynamics
    ln_bias: Tensor | None


class NativeDynamicsRollout:
    """The rollout for P policies, H steps, B states, on buffers that stay in place; float32.

    Actors of `actor_widths` have their parameters at `offsets` in rows of `size` floats. The dynamics' layers have
    `dynamics_widths`, Mish but for the last, which is SimNorm over groups of 8, or linear in `residual` dynamics, whose
    output is z's change. `inputs` [H + 1, P, B, Z + A] holds z_h and a_h side by side (a_H is unused), `latents`
    [P, H + 1, B, Z] the same states, `actions` and `d_action` [P, H, B, A]; each call overwrites them.
    """

    def __init__(
        self, actor_widths: Sequence[int], offsets: Mapping[str, int], size: int, dynamics_widths: Sequence[int],
        policies: int, horizon: int, batch: int, residual: bool, norm_eps: float,
    ):  # fmt: skip
        self._made_of = (
            tuple(actor_widths), dict(offsets), size, tuple(dynamics_widths), policies, horizon, batch, residual,
            norm_eps,
        )  # fmt: skip
        z, a, rows = actor_widths[0], actor_widths[-1], horizon * batch
        layers = [
            [inputs, outputs, *(offsets.get(f"{i}.{name}", 0) for name in ("weight", "bias", "ln.weight", "ln.bias"))]
            for i, (inputs, outputs) in enumerate(pairwise(actor_widths))
        ]
        self._kernel = backend.native.DynamicsRollout(
            layers, size, offsets["log_std"], list(dynamics_widths), policies, horizon, batch, residual, norm_eps
        )
        self._policies, last = policies, len(dynamics_widths) - 2
        self._layers = [(*pair, not residual or i < last) for i, pair in enumerate(pairwise(dynamics_widths))]
        self._shapes = {
            "flat": (policies, size), "z": (policies, batch, z), "noise": (policies, horizon, batch, a),
            "d_inputs": (horizon, policies, batch, z + a), "d_last": (policies, batch, z), "mask": (policies, 1, a),
        }  # fmt: skip
        self.inputs = torch.zeros(horizon + 1, policies, batch, z + a)
        self.latents = torch.zeros(policies, horizon + 1, batch, z)
        self.actions, self.d_action = (torch.zeros(policies, horizon, batch, a) for _ in range(2))
        self.actor_rows, self.actor_outputs = [], []  # per hidden layer; outputs [P, H * B, out]
        for width in actor_widths[1:-1]:
            pre, y = (torch.zeros(policies, rows, width) for _ in range(2))
            self.actor_rows.append(ActorRows(pre, *(torch.zeros(policies, rows) for _ in range(2))))
            self.actor_outputs.append(y)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeDynamicsRollout, self._made_of

    @torch.no_grad()
    def forward(self, flat: Tensor, dynamics: Sequence[PackedLayer], z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Imagine from z [P, B, Z] with standard normal noise [P, H, B, A], actors' parameters `flat` [P, size].

        Returns `inputs` and `latents`. Raises ValueError on shapes other than the planned ones and on weights packed
        for another instruction set, TypeError on other types.
        """
        z, noise = z.contiguous(), noise.contiguous()
        self._expect(flat=flat, z=z, noise=noise)
        self._kernel.forward(
            flat.data_ptr(), *self._dynamics(dynamics), z.data_ptr(), noise.data_ptr(), self._places(),
            torch.get_num_threads(),
        )  # fmt: skip
        return self.inputs, self.latents

    @torch.no_grad()
    def backward(
        self, flat: Tensor, dynamics: Sequence[PackedLayer], d_inputs: Tensor, d_last: Tensor, detach: bool = True,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Gradients [P, H, B, A] of the last `forward`'s actions, given those at its inputs from elsewhere (rewards).

        d_inputs [H, P, B, Z + A] is left as it is; d_last [P, B, Z] is the gradient at z_H. `detach` cuts the actors'
        own dependence on z; else `mask` [P, 1, A] is 0 where an actor's action depends on nothing. Raises as `forward`,
        and RuntimeError where that was not called.
        """
        d_inputs, d_last = d_inputs.contiguous(), d_last.contiguous()
        mask = None if mask is None else mask.contiguous()
        self._expect(flat=flat, d_inputs=d_inputs, d_last=d_last, **({} if mask is None else {"mask": mask}))
        self._kernel.backward(
            flat.data_ptr(), *self._dynamics(dynamics), d_inputs.data_ptr(), d_last.data_ptr(),
            0 if mask is None else mask.data_ptr(), self.d_action.data_ptr(), self._places(), detach,
            torch.get_num_threads(),
        )  # fmt: skip
        return self.d_action

    def _expect(self, **given: Tensor) -> None:
        for name, tensor in given.items():
            if tensor.dtype is not torch.float32 or not tensor.is_cpu:
                raise TypeError(f"{name} must be float32 on the cpu, got {tensor.dtype} on {tensor.device}")
            if tuple(tensor.shape) != self._shapes[name] or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous {self._shapes[name]}, got {tuple(tensor.shape)}, {tensor.stride()}"
                )

    def _places(self) -> list[int]:
        tensors = [self.inputs, self.latents, self.actions]
        for rows, y in zip(self.actor_rows, self.actor_outputs):
            tensors += [rows.pre, y, rows.mean, rows.rstd]
        return [t.data_ptr() for t in tensors]

    def _dynamics(self, layers: Sequence[PackedLayer]) -> tuple[list[list[int]], int]:
        """Addresses of every layer, and the panels' width that its weights were packed in."""
        if len(layers) != len(self._layers):
            raise ValueError(f"the dynamics must have {len(self._layers)} layers, got {len(layers)}")
        rows = []
        for layer, (inputs, outputs, normed) in zip(layers, self._layers):
            w, t, norm = layer.weight, layer.transpose, [v for v in (layer.ln_weight, layer.ln_bias) if v is not None]
            shapes = [(w._outputs, w._inputs), (t._inputs, t._outputs), *(tuple(v.shape) for v in norm)]
            if shapes != [(outputs, inputs)] * 2 + [(outputs,)] * 2 * normed:
                raise ValueError(f"a layer must be {outputs} x {inputs}{' with a norm' * normed}, got shapes {shapes}")
            if layer.bias.shape[1:] != (outputs,) or len(layer.bias) not in (1, self._policies):
                raise ValueError(
                    f"biases must be one row or {self._policies} of {outputs} columns, got {tuple(layer.bias.shape)}"
                )
            for v in (layer.bias, *norm):
                if v.dtype is not torch.float32 or not v.is_cpu or not v.is_contiguous():
                    raise TypeError(f"vectors must be contiguous float32 on the cpu, got {v.dtype} on {v.device}")
            stride = outputs if len(layer.bias) > 1 else 0
            addresses = [v.data_ptr() for v in norm] or [0, 0]
            rows.append([w._panels.data_ptr(), t._panels.data_ptr(), layer.bias.data_ptr(), stride, *addresses, w.bf16])
        return rows, layers[0].weight._panel_row
