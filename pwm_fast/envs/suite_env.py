"""What MuJoCo's suites have in common: float32 observations, actions in [-1, 1], repeated actions, a time limit."""

from abc import ABC, abstractmethod
from typing import Any

import gymnasium
import numpy as np

from pwm_fast.envs.drawing import prepare_drawing
from pwm_fast.envs.registry import Task


class SuiteEnv(gymnasium.Env, ABC):
    """One environment: obs [S] float32, action [A] in [-1, 1]; an episode is `task.episode_length` steps, never less.

    A step applies the action `task.action_repeat` times and sums the rewards. `reset(seed=)` decides everything that
    is random until the next seed, whatever ran before. Raises RuntimeError for a step after the last one, and for
    `render_mode="rgb_array"` on a machine that cannot draw.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, task: Task, render_mode: str | None = None):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        if render_mode is not None:
            prepare_drawing()
        self.task, self.render_mode = task, render_mode
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (task.obs_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (task.action_dim,), np.float32)
        self._steps_left = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """(obs [S], {})"""
        super().reset(seed=seed)
        self._steps_left = self.task.episode_length
        return self._begin(seed), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """(obs [S], reward, False, whether the time is over, info)"""
        if not self._steps_left:
            raise RuntimeError(f"the episode of {self.task.name} is over; call reset() before the next step")
        self._steps_left -= 1
        obs, reward, info = self._advance(np.minimum(np.maximum(np.asarray(action, np.float64), -1.0), 1.0))
        return obs, reward, False, not self._steps_left, info

    def render(self) -> np.ndarray | None:
        """An RGB picture [height, width, 3] uint8, drawn off screen; None without `render_mode="rgb_array"`."""
        return None if self.render_mode is None else np.asarray(self._picture())

    @abstractmethod
    def _picture(self) -> np.ndarray:
        """What `render` gives."""

    @abstractmethod
    def _begin(self, seed: int | None) -> np.ndarray:
        """Start an episode; a seed that is not None restarts the random numbers. Returns the observation."""

    @abstractmethod
    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, float, dict[str, Any]]:
        """Apply a float64 action within [-1, 1] `action_repeat` times: observation, sum of rewards, info."""
