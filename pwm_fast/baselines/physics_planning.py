"""MPPI in MuJoCo itself: planning with the true model, for dm_control's tasks.

Before each step the state of the physics goes into a copy, where every action sequence is tried out; the environment
itself is only ever stepped with the chosen actions. It needs neither a world model nor training, and finds what SAC
does not where rewards lie within its horizon; it is slow, for all of it are single steps of one simulation.
Episodes run in processes of their own.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import cache
from multiprocessing import get_context, resource_tracker
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast.baselines.mppi import MPPI, MPPIConfig
from pwm_fast.data.collect import RandomActions, Source, check_noise_levels, derived_seed, noise_level, noise_phase
from pwm_fast.data.recording import EpisodeAssembler
from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import Episode
from pwm_fast.envs.extras import import_extra
from pwm_fast.envs.registry import Task
from pwm_fast.errors import positive

# A simulator's samples are dear: few of them, from a narrower search, and actions that are kept for some steps, so that
# a plan reaches as far as a movement takes (12 actions of 5 steps are 1.2 s of the cartpole)
DEFAULT = MPPIConfig(horizon=12, samples=24, elites=6, iterations=1, policy_trajectories=0, min_std=0.1, max_std=1.0)
HOLD = 5


def refuse_without_physics(task: Task) -> None:
    """Raises ValueError for a task whose physics cannot be copied and set."""
    if task.suite == "dm_control":
        return
    mend = {"metaworld": "expert", "dflex": "shac"}.get(task.suite, "sac")
    raise ValueError(
        f"planning in MuJoCo is for dm_control's tasks, not for {task.name}; use --policy {mend}, or plan in a world "
        "model (--world-model FILE)"
    )


class PhysicsModel:
    """Tries out action sequences from where a dm_control environment is, on a copy of its physics and rules."""

    def __init__(self, env: Any):
        mujoco = self._mujoco = import_extra("mujoco", "mt80")
        self._error = import_extra("dm_control.rl.control", "mt80").PhysicsError
        self._env, self._what = env, mujoco.mjtState.mjSTATE_INTEGRATION
        self.begin()
        self._state = np.empty(mujoco.mj_stateSize(env.physics.model.ptr, self._what))

    def begin(self) -> None:
        """An episode begins, which may change the model itself (a target's place)."""
        self._physics, self._rules = self._env.physics.copy(), deepcopy(self._env.rules)

    def values(self, actions: np.ndarray) -> np.ndarray:
        """Sums of rewards [K] of sequences [K, H, A] in [-1, 1], one action per agent step; -inf where the simulation
        diverges. Rewards are read once per agent step, at its end, and count for all of its repeats.
        """
        env, mujoco = self._env, self._mujoco
        mujoco.mj_getState(env.physics.model.ptr, env.physics.data.ptr, self._state, self._what)
        return np.array([self._value(controls) for controls in env._low + (actions + 1.0) * env._range])

    def _value(self, controls: np.ndarray) -> float:
        physics, rules, repeat = self._physics, self._rules, self._env.task.action_repeat
        self._mujoco.mj_setState(physics.model.ptr, physics.data.ptr, self._state, self._what)
        self._mujoco.mj_forward(physics.model.ptr, physics.data.ptr)
        total = 0.0
        try:
            for control in controls:
                for _ in range(repeat):
                    rules.before_step(control, physics)
                    physics.step(self._env._substeps)
                    rules.after_step(physics)
                total += rules.get_reward(physics)
        except self._error:
            return -np.inf
        return total * repeat


def plan_episode(
    task: Task,
    seed: int,
    level: float = 0.0,
    config: MPPIConfig = DEFAULT,
    hold: int = HOLD,
    smooth: bool = False,
) -> Episode:
    """One episode of planning, whose actions are a share `level` random (`smooth` or jumping).

    A plan is made every `hold` steps, of actions that are each kept for as long.
    """
    refuse_without_physics(task)
    env = task.make()
    obs, _ = env.reset(seed=derived_seed(seed))
    model, mppi = PhysicsModel(env), MPPI(config, 1, task.action_dim, derived_seed(seed, 1), dtype=torch.float64)
    random, columns = RandomActions(task.action_dim, derived_seed(seed, 2)), []
    planned = np.zeros(task.action_dim)

    def score(actions: Tensor) -> Tensor:
        return torch.from_numpy(model.values(actions[0].numpy().repeat(hold, 1)))[None]

    for step in range(task.episode_length):
        if level < 1.0 and step % hold == 0:
            planned = mppi.plan(score)[0].numpy()
        action = ((1.0 - level) * planned + level * random(np.zeros((2, 1)))[int(smooth)]).astype(np.float32)
        after, reward, terminated, truncated, _ = env.step(action)
        columns.append((obs, action, np.float32(reward), terminated, truncated, after))
        obs = after
    env.close()
    (episode,) = EpisodeAssembler(1).add(*(np.stack(column)[:, None] for column in zip(*columns)))
    return episode


def physics_source(
    task: Task,
    seed: int,
    levels: Sequence[float],
    config: MPPIConfig = DEFAULT,
    hold: int = HOLD,
    processes: int = 1,
) -> Source:
    """Episodes of planning at each of the noise levels in turn, in `processes`; the data does not depend on how many.

    Raises ValueError for a task without MuJoCo's physics, and for processes < 1.
    """
    refuse_without_physics(task)
    check_noise_levels(levels)
    title = "planning in MuJoCo"
    for name, value in (("hold", hold), ("processes", processes)):
        positive(name, value)

    def batch(first: int, count: int) -> Iterator[tuple[str, Episode]]:
        numbers = range(first, first + count)
        jobs = [(task.name, derived_seed(seed, n), noise_level(levels, n), config, hold, bool(n % 2)) for n in numbers]
        made = map(_job, jobs) if processes == 1 else _in_processes(processes, jobs)
        return ((noise_phase(title, level), episode) for (_, _, level, *_), episode in zip(jobs, made))

    return Source(task, title, batch)


def _job(job: tuple[str, int, float, MPPIConfig, int, bool]) -> Episode:
    name, seed, level, config, hold, smooth = job
    return plan_episode(registry.get(name), seed, level, config, hold, smooth)


def _in_processes(processes: int, jobs: list[tuple[str, int, float, MPPIConfig, int, bool]]) -> Iterator[Episode]:
    """Ctrl-C goes to all processes of a terminal, but is for the one that holds the store, which stops after the batch.

    What is blocked here stays blocked in processes that start here, from their first instruction on.
    """
    resource_tracker.ensure_running()  # now, for when it starts it unblocks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return _pool(processes).map(_job, jobs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))
