"""Which tasks a world model knows, and what a policy of each may see and do.

A world model of many tasks takes observations and actions padded with zeros to its widest task's, and the number of the
task (TD-MPC2, Hansen et al. 2024, section 3.2). Policies learn and act in their own task's sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.task_table import SETS, tasks
from pwm_fast.envs import registry
from pwm_fast.errors import nearest
from pwm_fast.models.world_model import WorldModel


class Member(NamedTuple):
    """One policy of a run."""

    task: str
    seed: int


def known_tasks(model: WorldModel) -> list[str]:
    """The tasks of a model with embeddings, by number: as its file says, or TD-MPC2's set of as many tasks.

    Raises ValueError where neither tells.
    """
    count = model.config.num_tasks
    named = model.provenance.get("tasks")
    if named is not None and len(named) == count:
        return [str(name) for name in named]
    for name, size in SETS.items():
        if size == count:
            return [task.name for task in tasks(name)]
    raise ValueError(f"the world model knows {count} tasks and does not say which: its provenance lacks their names")


def task_numbers(model: WorldModel, names: Sequence[str]) -> list[int] | None:
    """Numbers of tasks in the model's embedding; None for a model without. Raises ValueError for one it lacks."""
    if model.config.num_tasks == 0:
        return None
    known = known_tasks(model)
    if missing := [name for name in names if name not in known]:
        raise ValueError(nearest("task", missing[0], known, hint=f"the world model knows {len(known)} tasks"))
    return [known.index(name) for name in names]


def check_sizes(model: WorldModel, data: EpisodeStore, task: registry.Task) -> None:
    """Raises ValueError where model, data and task do not fit each other."""
    want, c = (task.obs_dim, task.action_dim), model.config
    found, stored = (c.obs_dim, c.action_dim), (data.obs_dim, data.action_dim)
    sizes = f"{want[0]} and {want[1]}"
    padded = c.num_tasks > 0
    if found != want and not (padded and found[0] >= want[0] and found[1] >= want[1]):
        trained = model.provenance.get("task", "another task")
        raise ValueError(
            f"the world model has {found[0]} observations and {found[1]} actions, task {task.name} has {sizes}: it is "
            f"for {trained}"
        )
    if stored != (found if padded else want):
        wanted = f"the world model {found[0]} and {found[1]}" if padded else f"task {task.name} has {sizes}"
        raise ValueError(
            f"the data has {stored[0]} observations and {stored[1]} actions, {wanted}: is it another task's?"
        )


def episodes_of(data: EpisodeStore, task: str) -> np.ndarray:
    """Ids of a task's episodes; all of a store that holds one task, whatever it is called there.

    Raises ValueError where there are none.
    """
    if len(data.task_names) == 1:
        return np.arange(data.num_episodes)
    if task not in data.task_names:
        raise ValueError(nearest("task", task, data.task_names, hint=f"{data.path} holds {len(data.task_names)} tasks"))
    found = np.flatnonzero(np.asarray(data.task[data.episode_start[:-1]]) == data.task_names.index(task))
    if not len(found):
        raise ValueError(f"{data.path} names task {task} and holds no episode of it: convert or collect some")
    return found


def widened(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows [..., n] with zeros up to [..., width]."""
    missing = width - rows.shape[-1]
    return rows if missing == 0 else np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])
