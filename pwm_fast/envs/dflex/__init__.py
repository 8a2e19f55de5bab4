"""Differentiable articulated-body tasks (hopper, ant, humanoid, anymal, snu-humanoid) on Warp kernels."""

from pwm_fast.envs.dflex.env import DifferentiableEnv
from pwm_fast.envs.dflex.tasks import TASKS

__all__ = ["TASKS", "DifferentiableEnv"]
