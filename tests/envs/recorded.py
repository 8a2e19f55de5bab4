"""Trajectories and gradients recorded from the original dflex (float32), and the worst errors a correct rebuild shows."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parents[1] / "data" / "dflex"
FILES = {"hopper": "hopper", "ant": "ant", "humanoid": "humanoid", "anymal": "anymal", "snu-humanoid": "snu"}
TASKS = tuple(FILES)


class Tolerance(NamedTuple):
    """Largest errors over 256 recorded transitions (up to four times those of a float64 rebuild: float32 rounds on both
    sides), after 64 steps, and of observations and rewards along the way."""

    q: float
    qd: float
    open_loop_q: float
    obs: float
    reward: float


TOLERANCES = {
    "hopper": Tolerance(4e-7, 1e-5, 1e-5, 3e-4, 1e-4),
    "ant": Tolerance(1.4e-6, 2e-4, 5e-5, 1e-3, 3e-4),
    "humanoid": Tolerance(4e-6, 4e-4, 1e-4, 4e-3, 1e-2),
    "anymal": Tolerance(1.5e-6, 6e-5, 2e-5, 5e-4, 1e-4),
    "snu-humanoid": Tolerance(2e-6, 4e-4, 2e-4, 4e-3, 1e-3),
}


def trajectory(task: str) -> dict[str, torch.Tensor]:
    """joint_q, joint_qd, action [64, 4, .] before each step; obs_after, reward_after; obs_initial; joint_*_final."""
    with np.load(FOLDER / f"{FILES[task]}_traj.npz") as file:
        return {name: torch.tensor(file[name]) for name in file}


def gradients(task: str) -> dict[str, torch.Tensor]:
    """start_joint_q, start_joint_qd [8, .], action [16, 8, A], grad_H4, grad_H16, reward_H4, reward_H16."""
    with np.load(FOLDER / f"{FILES[task]}_grad.npz") as file:
        return {name: torch.tensor(file[name]) for name in file}
