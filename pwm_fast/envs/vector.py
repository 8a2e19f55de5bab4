"""Gymnasium fronts of the dflex tasks: a VectorEnv that steps the whole batch at once, and a single environment.

Autoreset is Gymnasium's *next-step* mode: the step that ends an episode returns its last observation; the following
``step`` ignores that environment's action and returns the first observation of a new episode with reward 0.
"""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from pwm_fast.envs.dflex import DifferentiableEnv
from pwm_fast.envs.dflex.tasks import get_task

RENDER_FPS = 60


def _spaces(task: str) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    row = get_task(task)
    observation = gymnasium.spaces.Box(-np.inf, np.inf, (row.obs_dim,), np.float32)
    return observation, gymnasium.spaces.Box(-1.0, 1.0, (row.action_dim,), np.float32)


def _check_render_mode(render_mode: str | None) -> None:
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")


class DflexVectorEnv(VectorEnv):
    """``gymnasium.make_vec("pwm_fast/Humanoid-v0", num_envs=64)``: obs [N, S], actions [N, A] in [-1, 1], float32.

    ``seed`` serves the first ``reset()`` that brings none; the same seed gives the same episodes for any ``threads``.
    Raises ValueError for actions of a wrong shape or with non-finite entries.
    """

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        seed: int = 0,
        threads: int | None = None,
        render_mode: str | None = None,
        **options: Any,
    ):
        _check_render_mode(render_mode)
        self.metadata = {
            "autoreset_mode": AutoresetMode.NEXT_STEP,
            "render_modes": ["rgb_array"],
            "render_fps": RENDER_FPS,
        }
        self.render_mode = render_mode
        options.setdefault("action_in_obs", True)
        self.simulation = DifferentiableEnv(task, num_envs, seed=seed, threads=threads, **options)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _spaces(task)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._pending = np.zeros(num_envs, bool)  # episodes that ended in the last step

    @property
    def joint_q(self) -> np.ndarray:
        """Coordinates of the robots after the last step, [N, nq]: of the final state where an episode just ended."""
        return self._final_q.numpy()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """(obs [N, S], {}); an integer seed restarts the random numbers."""
        super().reset(seed=seed)
        if seed is not None:
            self.simulation.generator.manual_seed(seed)
        self._pending[:] = False
        with torch.no_grad():
            obs = self.simulation.reset()
        self._final_q = self.simulation.q
        return obs.numpy().copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """(obs [N, S], reward [N], terminated [N], truncated [N], {})."""
        sim, pending = self.simulation, self._pending
        rows = torch.from_numpy(np.flatnonzero(pending))
        with torch.no_grad():
            fresh_q, fresh_qd = sim.q[rows], sim.qd[rows]
            action = torch.from_numpy(np.asarray(actions, np.float32))
            _, reward, terminated, truncated, info = sim.step(action)
            obs, self._final_q = info["final_obs"].clone(), info["final_q"].clone()
            if len(rows):  # these begin an episode in this step: undo what the batch did to them
                sim.restart_rows(rows, fresh_q, fresh_qd)
                obs[rows], self._final_q[rows], reward[rows] = sim.obs[rows], fresh_q, 0.0
        fell, timed_out = terminated.numpy() & ~pending, truncated.numpy() & ~pending
        self._pending = fell | timed_out
        return obs.numpy(), reward.numpy(), fell, timed_out, {}

    def render(self) -> tuple[np.ndarray, ...] | None:
        """One RGB picture per environment."""
        if self.render_mode is None:
            return None
        from pwm_fast.envs.dflex.rendering import render

        return tuple(render(self.simulation.task, q) for q in self.joint_q)


class DflexEnv(gymnasium.Env):
    """``gymnasium.make("pwm_fast/Humanoid-v0")``: one robot, no autoreset. For more than one, the VectorEnv is far
    faster."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": RENDER_FPS}  # noqa: RUF012

    def __init__(self, task: str, render_mode: str | None = None, **options: Any):
        _check_render_mode(render_mode)
        self.render_mode = render_mode
        self.observation_space, self.action_space = _spaces(task)
        self.batch = DflexVectorEnv(task, 1, render_mode=render_mode, threads=1, **options)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        obs, _ = self.batch.reset(seed=seed)
        return obs[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, _ = self.batch.step(np.asarray(action)[None])
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self) -> Any:
        pictures = self.batch.render()
        return None if pictures is None else pictures[0]
