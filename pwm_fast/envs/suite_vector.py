"""Several environments of one task in this process: a Gymnasium VectorEnv with the protocol of `vector.py`."""

from functools import partial
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from pwm_fast.envs.registry import Task


def episode_seeds(seed: int, count: int) -> list[int]:
    """Seeds of `count` environments: the first ones do not depend on `count`, and seeds 0 and 1 share none."""
    return np.random.SeedSequence(seed).generate_state(count).tolist()


def check_actions(actions: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The actions as float32. Raises ValueError unless they are [N, A] as `shape` says, and finite."""
    actions = np.asarray(actions, np.float32)
    if actions.shape != shape:
        raise ValueError(f"action must have shape {shape}, got {actions.shape}")
    finite = np.isfinite(actions).all(1)
    if not finite.all():
        raise ValueError(f"action must be finite; it is not in environments {np.flatnonzero(~finite).tolist()}")
    return actions


class SuiteVectorEnv(SyncVectorEnv):
    """obs [N, S] float32, actions [N, A] in [-1, 1]; autoreset in the next step; `info["success"]` [N] where the task
    tells it.

    `seed` serves the first `reset()` that brings none. `threads` is there for the signature that all suites share: the
    physics of these tasks runs in the caller's thread (`evaluation.evaluate_population` uses processes).
    Raises ValueError for actions of a wrong shape or with non-finite entries.
    """

    def __init__(
        self,
        task: Task,
        num_envs: int = 1,
        seed: int = 0,
        threads: int | None = None,
        render_mode: str | None = None,
        **options: Any,
    ):
        if num_envs < 1:
            raise ValueError(f"num_envs must be >= 1, got {num_envs}")
        make = partial(task.make, render_mode=render_mode, **options)
        super().__init__([make] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)
        self.task, self._shape = task, (num_envs, task.action_dim)
        self._first_seed: int | None = seed

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        """(obs [N, S], info); an integer seed restarts the random numbers of all environments, a list those of each."""
        seed, self._first_seed = self._first_seed if seed is None else seed, None
        seeds: Any = episode_seeds(seed, self.num_envs) if isinstance(seed, int) else seed
        return super().reset(seed=seeds, options=options)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """(obs [N, S], reward [N], terminated [N], truncated [N], info)"""
        actions = check_actions(actions, self._shape)
        # Gymnasium's own step adds up to a half to what a small simulator takes
        obs = np.empty(self._observations.shape, self._observations.dtype)
        infos: dict[str, Any] = {}
        reward, fell, timed_out = np.zeros(self.num_envs), np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for i, env in enumerate(self.envs):
            if self._autoreset_envs[i]:
                self._env_obs[i], info = env.reset()
            else:
                self._env_obs[i], reward[i], fell[i], timed_out[i], info = env.step(actions[i])
            obs[i] = self._env_obs[i]
            if info:
                infos = self._add_info(infos, info, i)
        self._autoreset_envs = fell | timed_out
        return obs, reward, fell, timed_out, infos
