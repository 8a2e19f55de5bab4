"""The 80 tasks of TD-MPC2's multi-task data, in the order of their numbers; the first 30 are MT30.

Observations and actions of a set are padded to its widest task, and the number of a task is its row in the table and in
the embedding of a world model trained on the set.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from pwm_fast.errors import nearest

_TABLE = Path(__file__).parent.parent / "assets" / "tdmpc2_tasks.csv"
SETS = {"mt30": 30, "mt80": 80}
SUITES = ("dm_control", "metaworld")


@dataclass(frozen=True)
class MultiTask:
    """A task: entries of an observation and an action before padding, agent steps of an episode (action repeat 2)."""

    name: str
    suite: str
    obs_dim: int
    action_dim: int
    episode_length: int


@cache
def tasks(set: str = "mt80") -> tuple[MultiTask, ...]:
    """The tasks of "mt30" or "mt80", by number. Raises ValueError for another set."""
    if set not in SETS:
        raise ValueError(nearest("set of tasks", set, SETS))
    with open(_TABLE, newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(
        MultiTask(row["name"], row["suite"], *(int(row[key]) for key in ("obs_dim", "action_dim", "episode_length")))
        for row in rows[: SETS[set]]
    )


def padded_dims(set: str) -> tuple[int, int]:
    """(observation, action) entries of the set's data: (24, 6) or (39, 6)."""
    return max(task.obs_dim for task in tasks(set)), max(task.action_dim for task in tasks(set))


def set_of(obs_dim: int, action_dim: int) -> str | None:
    """The set whose padded data has these dimensions, if any."""
    return next((name for name in SETS if padded_dims(name) == (obs_dim, action_dim)), None)


def action_dims(num_tasks: int) -> list[int] | None:
    """Action entries by task for a world model of 30 or 80 tasks; None for another number."""
    name = next((name for name, count in SETS.items() if count == num_tasks), None)
    return None if name is None else [task.action_dim for task in tasks(name)]


def select(chosen: list[str], names: list[str]) -> list[int]:
    """Numbers, among `names`, of the tasks that `chosen` lists by name, set (mt30) or suite (dm_control).

    Raises ValueError that suggests the nearest name, or for a choice of none.
    """
    numbers: set[int] = set()
    for choice in chosen:
        if choice in names:
            numbers.add(names.index(choice))
            continue
        members = {task.name for task in tasks() if choice == task.suite}
        members |= {task.name for task in tasks(choice)} if choice in SETS else set()
        found = {number for number, name in enumerate(names) if name in members}
        if not found:
            raise ValueError(nearest("task", choice, [*names, *SETS, *SUITES]))
        numbers |= found
    return sorted(numbers)


def fitted(rows: np.ndarray, width: int) -> np.ndarray:
    """Observations or actions [..., n] as a set or world model has them: zeros behind, or cut, to [..., width]."""
    missing = width - rows.shape[-1]
    return rows[..., :width] if missing <= 0 else np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])
