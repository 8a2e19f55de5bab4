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
from pwm_fast.learning.task_windows import check_widths
from pwm_fast.models.world_model import WorldModel


class Member(NamedTuple):
    """One policy of a run."""

    task: str
    seed: int


def known_tasks(model: WorldModel) -> dict[str, int]:
    """Numbers, by name, of the tasks that a model with embeddings was trained on.

    As its file says, or all of TD-MPC2's set of as many tasks. Raises ValueError where neither tells.
    """
    count, named = model.config.num_tasks, model.provenance.get("tasks")
    if isinstance(named, dict):
        return {str(name): int(number) for name, number in named.items()}
    for name, size in SETS.items():
        if size == count:
            return {task.name: number for number, task in enumerate(tasks(name))}
    raise ValueError(f"the world model knows {count} tasks and does not say which: its provenance lacks their names")


def task_number(model: WorldModel, task: registry.Task) -> int | None:
    """The task's number in the model's embedding; None for a model of one task.

    Raises ValueError for a task that the model was not trained on, or whose observations or actions do not fit.
    """
    found, want = (model.config.obs_dim, model.config.action_dim), (task.obs_dim, task.action_dim)
    padded = model.config.num_tasks > 0
    if found != want and not (padded and found[0] >= want[0] and found[1] >= want[1]):
        trained = model.provenance.get("task", "another task")
        raise ValueError(
            f"the world model has {found[0]} observations and {found[1]} actions, task {task.name} has {want[0]} and "
            f"{want[1]}: it is for {trained}"
        )
    if not padded:
        return None
    known = known_tasks(model)
    if task.name not in known:
        hint = f"the world model was trained on {len(known)}"
        raise ValueError(nearest("task", task.name, known, hint=hint))
    return known[task.name]


class Source(NamedTuple):
    """A task's episodes: those of the store's task number `task`."""

    store: EpisodeStore
    task: int

    @property
    def episodes(self) -> np.ndarray:
        """Their ids."""
        return choose(self.store, tasks=self.task).ids


def find_source(stores: Sequence[EpisodeStore], task: registry.Task) -> Source:
    """Where a task's episodes are: in the first store that names it, or in the only one if that holds one task.

    Their observations and actions are the task's own, or padded in a store of several tasks. Raises ValueError where no
    store has any, or they are of other sizes.
    """
    named = [store for store in stores if task.name in store.task_names]
    if named:
        source = Source(named[0], named[0].task_id(task.name))
    elif len(stores) == 1 and len(stores[0].task_names) == 1:  # whatever it is called there
        source = Source(stores[0], 0)
    else:
        known = [name for store in stores for name in store.task_names]
        raise ValueError(nearest("task", task.name, known, hint=f"the data holds {len(known)} tasks"))
    check_widths(source.store, task)
    source.episodes  # noqa: B018 raises where there are none
    return source
