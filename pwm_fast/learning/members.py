"""Which tasks a world model knows, and what a policy of each may see and do.

A world model of many tasks takes observations and actions padded with zeros to its widest task's, and the number of the
task (TD-MPC2, Hansen et al. 2024, section 3.2). Policies learn and act in their own task's sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pwm_fast.data.drawing import choose
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
    named = model.provenance.get("tasks") or {}
    if sorted(named.values()) == list(range(count)):
        return sorted(named, key=named.__getitem__)
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


class Source(NamedTuple):
    """A task's episodes: those of the store's task number `task`."""

    store: EpisodeStore
    task: int

    @property
    def episodes(self) -> np.ndarray:
        """Their ids."""
        return choose(self.store, tasks=self.task).ids


def check_model(model: WorldModel, task: registry.Task) -> None:
    """Raises ValueError where a world model is not of a task."""
    found, want = (model.config.obs_dim, model.config.action_dim), (task.obs_dim, task.action_dim)
    if found != want and not (model.config.num_tasks and found[0] >= want[0] and found[1] >= want[1]):
        trained = model.provenance.get("task", "another task")
        raise ValueError(
            f"the world model has {found[0]} observations and {found[1]} actions, task {task.name} has {want[0]} and "
            f"{want[1]}: it is for {trained}"
        )


def find_source(stores: Sequence[EpisodeStore], task: registry.Task, model: WorldModel) -> Source:
    """Where a task's episodes are: in the first store that names it, or in the only one if that holds one task.

    Their observations and actions are the task's own, or padded as the model's. Raises ValueError where no store has
    any, or they are of other sizes.
    """
    named = [store for store in stores if task.name in store.task_names]
    if named:
        source = Source(named[0], named[0].task_id(task.name))
    elif len(stores) == 1 and len(stores[0].task_names) == 1:  # whatever it is called there
        source = Source(stores[0], 0)
    else:
        known = [name for store in stores for name in store.task_names]
        raise ValueError(nearest("task", task.name, known, hint=f"the data holds {len(known)} tasks"))
    found = (source.store.obs_dim, source.store.action_dim)
    if found not in ((task.obs_dim, task.action_dim), (model.config.obs_dim, model.config.action_dim)):
        raise ValueError(
            f"the data has {found[0]} observations and {found[1]} actions, task {task.name} has {task.obs_dim} and "
            f"{task.action_dim}: is it another task's?"
        )
    source.episodes  # noqa: B018 raises where there are none
    return source


def widened(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows [..., n] with zeros up to [..., width]."""
    missing = width - rows.shape[-1]
    return rows if missing == 0 else np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])
