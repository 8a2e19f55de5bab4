"""Value functions of a population: K critics per policy, stacked (PWM, Georgiev et al. 2024, section 4)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pwm_fast.models.population_mlp import Activations, PopulationMLP
from pwm_fast.models.workspace import Workspace

UNITS = (400, 200)
VALUE_ROWS = 256  # of a policy in one pass on the CPU: activations stay in the second-level cache


class Critic:
    """P x K value networks. Parameters' rows are ordered [P, K], so one policy's K critics are neighbours."""

    def __init__(
        self,
        seeds: list[int],
        latent_dim: int,
        num_critics: int = 3,
        units: tuple[int, ...] = UNITS,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self.policies, self.num_critics = len(seeds), num_critics
        self.mlp = PopulationMLP(self.policies * num_critics, (latent_dim, *units, 1), dtype=dtype, device=device)
        self.parameters = self.mlp.parameters
        for policy, seed in enumerate(seeds):
            self._initialise(policy, seed)

    def _initialise(self, policy: int, seed: int) -> None:
        """Orthogonal weights with gain sqrt(2) on every layer, zero biases."""
        generator = torch.Generator().manual_seed(seed)
        for k in range(self.num_critics):
            for i in range(self.mlp.depth):
                weight = self.parameters[f"{i}.weight"][policy * self.num_critics + k]
                start = torch.empty(weight.shape, dtype=torch.float64)
                weight.copy_(nn.init.orthogonal_(start, gain=2**0.5, generator=generator))

    def forward(self, z: Tensor, workspace: Workspace | None = None) -> tuple[Tensor, Activations]:
        """Values [P, K, R] of latents [P, R, Z], and what `backward` needs (all of it in `workspace`, if given)."""
        v, saved = self.mlp.forward(z, workspace)
        return v.view(self.policies, self.num_critics, -1), saved

    def values(self, z: Tensor, workspace: Workspace) -> Tensor:
        """Values [P, K, R] of latents [P, R, Z] that need no gradient, on the CPU a few hundred rows at a time."""
        rows_at_once = VALUE_ROWS if z.is_cpu else z.shape[1]
        return torch.cat([self.forward(rows, workspace)[0].clone() for rows in z.split(rows_at_once, 1)], 2)

    def backward(self, dv: Tensor, saved: Activations, workspace: Workspace | None = None) -> None:
        """Overwrite the parameters' gradients. dv [P, K, R]."""
        self.mlp.backward(dv.reshape(self.mlp.members, -1, 1), saved, workspace)

    def fit_last_layers(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], ridge: float = 1e-3) -> None:
        """Set the last layers to the least-squares fit of values, in batches of latents [P, R, Z], values and 0/1
        weights [P, R] (0: a row that is not there)."""
        width, last, workspace = self.mlp.widths[-2], self.mlp.depth - 1, Workspace()
        like = self.parameters.flat
        moments = torch.zeros(self.mlp.members, width + 1, width + 2, dtype=torch.float64, device=like.device)
        for z, value, weight in batches:
            features = self.forward(z, workspace)[1].last.double()  # [P * K, R, F]
            value, weight = (x.double().repeat_interleave(self.num_critics, 0)[..., None] for x in (value, weight))
            left = torch.cat([features, torch.ones_like(value)], 2) * weight
            moments += left.mT @ torch.cat([left, value * weight], 2)
        count, total = moments[:, -1:, width : width + 1], moments[:, -1:, -1:]
        middle = moments[:, :width, width : width + 1] / count
        gram = moments[:, :width, :width] - count * middle @ middle.mT
        gram += ridge * count * torch.eye(width, dtype=torch.float64, device=like.device)
        right = moments[:, :width, -1:] - middle * total
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(gram))  # [P * K, F, 1]
        self.parameters[f"{last}.weight"].copy_(solution.mT)
        self.parameters[f"{last}.bias"].copy_((total / count - middle.mT @ solution)[:, 0])

    def input_gradient(self, dv: Tensor, saved: Activations) -> Tensor:
        """Gradient [P, R, Z] of sum(dv * V) with respect to the latents. dv [P, K, R]."""
        return self.mlp.input_gradient(dv.reshape(self.mlp.members, -1, 1), saved)
