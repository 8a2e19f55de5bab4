"""Trajectories and gradients recorded from the original dflex (float32), and how close we come to them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parents[1] / "data" / "dflex"
FILES = {"hopper": "hopper", "ant": "ant", "humanoid": "humanoid", "anymal": "anymal", "snu-humanoid": "snu"}
TASKS = tuple(FILES)


class Tolerance(NamedTuple):
    """Largest errors over 256 recorded transitions, after 64 steps, and of observations and rewards along the way."""

    q: float
    qd: float
    open_loop_q: float
    obs: float
    reward: float


# q, qd: the worst errors that a float64 rebuild shows against the recorded float32, so most of each is the recording's
# own rounding. ANYmal's recording was summed in another order than our bundles; against float64 (naive_dynamics.py) the
# recording is off by 3.9e-7, 2.1e-5 and ours by 4.7e-7, 1.8e-5; the two are 4.5e-7, 1.5e-5 apart.
TOLERANCES = {
    "hopper": Tolerance(2e-7, 5e-6, 1e-5, 3e-4, 1e-4),
    "ant": Tolerance(7e-7, 1e-4, 5e-5, 1e-3, 3e-4),
    "humanoid": Tolerance(2e-6, 2e-4, 1e-4, 4e-3, 1e-2),
    "anymal": Tolerance(6e-7, 2.5e-5, 2e-5, 5e-4, 1e-4),
    "snu-humanoid": Tolerance(1e-6, 2e-4, 2e-4, 4e-3, 1e-3),
}


def trajectory(task: str) -> dict[str, torch.Tensor]:
    """joint_q, joint_qd, action [64, 4, .] before each step; obs_after, reward_after; obs_initial; joint_*_final."""
    with np.load(FOLDER / f"{FILES[task]}_traj.npz") as file:
        return {name: torch.tensor(file[name]) for name in file}


def gradients(task: str) -> dict[str, torch.Tensor]:
    """start_joint_q, start_joint_qd [8, .], action [16, 8, A], grad_H4, grad_H16, reward_H4, reward_H16."""
    with np.load(FOLDER / f"{FILES[task]}_grad.npz") as file:
        return {name: torch.tensor(file[name]) for name in file}
