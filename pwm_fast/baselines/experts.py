"""Meta-World's scripted experts as data: from flawless to random, holding still where they have succeeded.

An episode of noise level l acts (1 - l) times as the expert and l times at random, so level 1 is a random policy. The
experts were written to reach success, not to stay there, and many overshoot: as long as the environment says that the
task is solved, the hand gets no displacement and the gripper's last command.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pwm_fast.data.collect import RandomActions, Source, check_noise_levels, derived_seed, noise_level, noise_phase
from pwm_fast.data.recording import EpisodeAssembler
from pwm_fast.envs.evaluation import Episode
from pwm_fast.envs.extras import import_extra
from pwm_fast.envs.registry import Task

NOISE_LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def refuse_without_expert(task: Task) -> None:
    """Raises ValueError for a task that has no scripted expert."""
    if task.suite != "metaworld":
        raise ValueError(
            f"there are scripted experts for Meta-World's tasks (mw-reach, ...) alone, not for {task.name}; make its "
            "data with --policy sac"
        )


class ScriptedExpert:
    """Meta-World's expert of a task, for N environments.

    Raises ValueError for a task without one, MissingExtra where Meta-World is not installed.
    """

    def __init__(self, task: Task, num_envs: int):
        refuse_without_expert(task)
        experts = import_extra("metaworld.policies", "mt80").ENV_POLICY_MAP
        make: Any = experts[f"{task.name.removeprefix('mw-')}-v3"]
        self._experts = [make() for _ in range(num_envs)]
        self._grip = np.zeros(num_envs)

    def __call__(self, obs: np.ndarray, success: np.ndarray) -> np.ndarray:
        """Actions [N, 4] in [-1, 1] for observations [N, 39]; `success` [N]: where to hold still."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that its actions need the clipping they get here
            actions = np.stack([expert.get_action(row) for expert, row in zip(self._experts, obs.astype(np.float64))])
        actions = np.clip(actions, -1.0, 1.0)
        actions[success, :3], actions[success, 3] = 0.0, self._grip[success]
        self._grip = actions[:, 3].copy()
        return actions


def expert_source(task: Task, seed: int, levels: Sequence[float] = NOISE_LEVELS) -> Source:
    """Episodes of the expert at each of the noise levels in turn, equally many of each.

    Raises ValueError for levels outside [0, 1] and for a task without an expert.
    """
    refuse_without_expert(task)
    check_noise_levels(levels)

    def batch(first: int, count: int) -> Iterator[tuple[str, Episode]]:
        mine = [noise_level(levels, number) for number in range(first, first + count)]
        level = np.array(mine)[:, None]
        env = task.make_vector(count, seed=derived_seed(seed, first))
        try:
            episodes = _run(env, ScriptedExpert(task, count), level, derived_seed(seed, first, 1), task.episode_length)
        finally:
            env.close()
        return ((noise_phase("expert", level), episode) for level, episode in zip(mine, episodes))

    return Source(task, "scripted expert", batch)


def _run(env: Any, expert: ScriptedExpert, level: np.ndarray, seed: int, steps: int) -> list[Episode]:
    """One episode of each environment, in their order."""
    obs, _ = env.reset()
    success, random = np.zeros(len(obs), bool), RandomActions(env.single_action_space.shape[0], seed)
    columns: list[tuple[np.ndarray, ...]] = []
    for _ in range(steps):
        action = ((1.0 - level) * expert(obs, success) + level * random(obs)).astype(np.float32)
        after, reward, terminated, truncated, info = env.step(action)
        columns.append((obs, action, reward, terminated, truncated, after))
        obs, success = after, info["success"]
    return EpisodeAssembler(len(obs)).add(*(np.stack(column) for column in zip(*columns)))
