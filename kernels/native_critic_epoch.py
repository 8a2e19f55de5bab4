"""All minibatch steps of a population's critics in one native call: the Python side of csrc/critic_epoch.cpp.

The definition is `pwm_fast.kernels.critic_epoch.critic_epoch`; on CUDA that file's persistent kernel does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pwm_fast import backend


class NativeCriticEpoch:
    """The plan for critics of `widths` whose parameters lie at `offsets` in rows of `size` floats, one per network."""

    def __init__(
        self, widths: Sequence[int], offsets: Mapping[str, int], size: int, policies: int, critics: int, rows: int,
        epochs: int, minibatches: int, max_norm: float, betas: tuple[float, float], eps: float, norm_eps: float,
    ):  # fmt: skip
        if not 1 <= minibatches <= rows:
            raise ValueError(f"minibatches must be between 1 and the {rows} rows, got {minibatches}")
        self._made_of = (
            tuple(widths), dict(offsets), size, policies, critics, rows, epochs, minibatches, max_norm, betas, eps,
            norm_eps,
        )  # fmt: skip
        layers = [
            [inputs, outputs, *(offsets.get(f"{i}.{name}", 0) for name in ("weight", "bias", "ln.weight", "ln.bias"))]
            for i, (inputs, outputs) in enumerate(pairwise(widths))
        ]
        self._shapes = {
            "flat": (policies * critics, size), "m": (policies, critics * size), "v": (policies, critics * size),
            "x": (policies, rows, widths[0]), "targets": (policies, rows), "order": (policies, epochs, rows),
            "lr": (policies,), "step": (policies,), "active": (policies,),
        }  # fmt: skip
        self._kernel = backend.native.CriticEpoch(
            layers, policies, critics, size, rows, epochs, minibatches, max_norm, *betas, eps, norm_eps
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeCriticEpoch, self._made_of

    @torch.no_grad()
    def run(
        self, flat: Tensor, x: Tensor, targets: Tensor, order: Tensor, m: Tensor, v: Tensor, lr: Tensor, step: Tensor,
        active: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Trains the parameters `flat` [P K, size] on states x [P, R, Z] and targets [P, R], in place.

        `order` [P, epochs, R] int64 is each epoch's order of the rows; the moments m and v [P, K size] and the steps
        [P] int64 go on, in place; rates lr and `active` bool are [P]. Returns, per policy [P]: the squared error
        averaged over critics, rows and steps, the last gradient norm before clipping, and who is still active. Raises
        ValueError on other shapes, layouts or rows, TypeError on other types.
        """
        active, targets, order, lr = active.clone(), targets.contiguous(), order.contiguous(), lr.contiguous()
        given = {"flat": flat, "m": m, "v": v, "x": x, "targets": targets, "order": order, "lr": lr, "step": step,
                 "active": active}  # fmt: skip
        types = {"order": torch.int64, "step": torch.int64, "active": torch.bool}
        for name, tensor in given.items():
            dtype = types.get(name, torch.float32)
            if tensor.dtype is not dtype or not tensor.is_cpu:
                raise TypeError(f"{name} must be {dtype} on the cpu, got {tensor.dtype} on {tensor.device}")
            fits = x.stride(2) == 1 if name == "x" else tensor.is_contiguous()
            if tuple(tensor.shape) != self._shapes[name] or not fits:
                raise ValueError(
                    f"{name} must be contiguous {self._shapes[name]}, got {tuple(tensor.shape)}, {tensor.stride()}"
                )
        loss, norm = torch.empty_like(lr), torch.empty_like(lr)
        self._kernel.run(
            flat.data_ptr(), m.data_ptr(), v.data_ptr(), x.data_ptr(), x.stride(1), x.stride(0), targets.data_ptr(),
            order.data_ptr(), lr.data_ptr(), step.data_ptr(), active.data_ptr(), loss.data_ptr(), norm.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return loss, norm, active
