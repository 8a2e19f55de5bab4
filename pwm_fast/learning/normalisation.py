"""Running observation statistics, for learners that meet their data as they go."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningNormalisation:
    """(x - mean) / std of all rows seen so far, per entry; an entry that never varies is only centred.

    Merging is Chan et al. 1979, counts in float64, so that millions of rows do not freeze the mean.
    """

    def __init__(self, size: int, device: str | torch.device = "cpu"):
        self.mean = torch.zeros(size, device=device)
        self.variance = torch.ones(size, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Merge rows [n, size], n >= 1, all finite."""
        variance, mean = torch.var_mean(rows, 0, correction=0)
        total = self.count + len(rows)
        old, new = (self.count / total).to(rows.dtype), (len(rows) / total).to(rows.dtype)
        delta = mean - self.mean
        self.variance = self.variance * old + variance * new + delta.square() * old * new
        self.mean = self.mean + delta * new
        self.count = total

    @property
    def scale(self) -> Tensor:
        """1 / std [size]; 1 where the std is below 1e-4."""
        std = self.variance.sqrt()
        return torch.where(std < 1e-4, 1.0, 1.0 / std)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., size], normalised."""
        return (x - self.mean) * self.scale

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean, self.variance, self.count = (state[name].clone() for name in ("mean", "variance", "count"))
