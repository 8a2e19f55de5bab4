"""Value functions of a population: K critics per policy, stacked (PWM, Georgiev et al. 2024, section 4)."""

from __future__ import annotations

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

    def fit_last_layer(self, policy: int, z: Tensor, value: Tensor, ridge: float = 1e-3) -> None:
        """Set one policy's last layers to the least-squares fit of values [R] in latents [R, Z]."""
        mine = slice(policy * self.num_critics, (policy + 1) * self.num_critics)
        _, activations = self.mlp.forward(z[None].expand(self.policies, -1, -1).contiguous())
        features = activations.last[mine].double()  # [K, R, F]
        middle, mean = features.mean(1, keepdim=True), value.double().mean()
        features = features - middle
        gram = features.mT @ features + ridge * features.shape[1] * torch.eye(features.shape[2], device=z.device)
        right = features.mT @ (value.double() - mean)[:, None]
        weight = torch.cholesky_solve(right, torch.linalg.cholesky(gram))  # [K, F, 1]
        last = self.mlp.depth - 1
        self.parameters[f"{last}.weight"][mine] = weight.mT.to(z.dtype)
        self.parameters[f"{last}.bias"][mine] = (mean - (middle @ weight)[:, 0]).to(z.dtype)

    def input_gradient(self, dv: Tensor, saved: Activations) -> Tensor:
        """Gradient [P, R, Z] of sum(dv * V) with respect to the latents. dv [P, K, R]."""
        return self.mlp.input_gradient(dv.reshape(self.mlp.members, -1, 1), saved)
