"""Adam over the flat parameters of a population, with a learning rate, norm and step count per policy."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.kernels import clip_adam
from pwm_fast.models.parameters import FlatParameters


def linear_schedule(step: Tensor, start: float, end: float, total_steps: int | Tensor) -> Tensor:
    """start + (end - start) * step / total_steps, then constant: a float64 tensor on the device of `step`."""
    return start + (end - start) * (step.to(torch.float64) / total_steps).clamp(max=1.0)


class Adam:
    """Clipped Adam (betas, eps as published); rows of `parameters` belonging to one policy are clipped together."""

    def __init__(self, parameters: FlatParameters, policies: int, betas: tuple[float, float], eps: float = 1e-8):
        self.value = parameters.flat.view(policies, -1)
        self.grad = parameters.grad.view(policies, -1)
        self.m, self.v = torch.zeros_like(self.value), torch.zeros_like(self.value)
        self.steps = torch.zeros(policies, dtype=torch.int64, device=self.value.device)
        self.betas, self.eps = betas, eps

    def step(self, lr: Tensor, max_norm: float, active: Tensor) -> Tensor:
        """Update the rows that are `active` [P] bool with a finite norm; returns the norms [P] before clipping."""
        return clip_adam.step(
            self.value, self.grad, self.m, self.v, lr, self.steps, max_norm, self.betas, self.eps, active
        )

    def snapshot(self, policy: int) -> dict[str, Tensor]:
        """A copy of one policy's parameters and moments."""
        return {name: getattr(self, name)[policy].clone() for name in ("value", "m", "v", "steps")}

    def restore(self, policy: int, snapshot: dict[str, Tensor]) -> None:
        """Put one policy back to a snapshot."""
        for name, value in snapshot.items():
            getattr(self, name)[policy] = value

    def state_dict(self) -> dict[str, Tensor]:
        return {"m": self.m.clone(), "v": self.v.clone(), "steps": self.steps.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("m", "v", "steps"):
            getattr(self, name).copy_(state[name])
