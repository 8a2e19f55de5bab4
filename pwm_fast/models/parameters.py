"""Parameters of a population: one flat row per member, named views into it.

The optimiser sees two matrices `[G, n]` (values and gradients), the networks see named tensors `[G, ...]` that alias
them, so clipping and Adam are one pass over memory whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

# Tensors start on 64-byte boundaries inside a row (16 float32), as GEMM and vector code like it; padding stays zero.
ALIGNMENT = 16


class FlatParameters:
    """Values and gradients of G members with the same named shapes.

    Attributes: `flat` and `grad` [G, n]; `views[name]` and `grads[name]` [G, *shape], aliasing them.
    """

    def __init__(
        self,
        members: int,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        if members < 1:
            raise ValueError(f"a population needs at least 1 member, got {members}")
        self.members = members
        self.shapes = dict(shapes)
        self._offsets: dict[str, int] = {}
        size = 0
        for name, shape in self.shapes.items():
            self._offsets[name] = size
            size += -(-prod(shape) // ALIGNMENT) * ALIGNMENT
        self.size = size
        self.flat = torch.zeros(members, size, dtype=dtype, device=device)
        self.grad = torch.zeros_like(self.flat)
        self.views, self.grads = self.of(self.flat), self.of(self.grad)

    def of(self, rows: Tensor) -> dict[str, Tensor]:
        """The named tensors [..., *shape] in rows [..., n] that are laid out as these."""
        return {
            name: rows[..., start : start + prod(self.shapes[name])].view(*rows.shape[:-1], *self.shapes[name])
            for name, start in self._offsets.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]

    def tensors(self, member: int) -> dict[str, Tensor]:
        """Detached copies of one member's tensors, by name."""
        return {name: view[member].detach().clone() for name, view in self.views.items()}

    def load(self, member: int, tensors: Mapping[str, Tensor]) -> None:
        """Set one member's tensors; raises ValueError on a missing, unknown or wrongly shaped one."""
        if missing := sorted(set(self.shapes) - set(tensors)):
            raise ValueError(f"missing parameters: {', '.join(missing)}")
        if unknown := sorted(set(tensors) - set(self.shapes)):
            raise ValueError(f"unknown parameters: {', '.join(unknown)}")
        for name, value in tensors.items():
            if tuple(value.shape) != self.shapes[name]:
                raise ValueError(f"{name} must have shape {self.shapes[name]}, got {tuple(value.shape)}")
            self.views[name][member].copy_(value)
