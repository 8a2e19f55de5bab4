"""Which rows a batch may be drawn from, and how likely each is: of all episodes or some, of all tasks or some, every
row equally likely or every task."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from pwm_fast.data.layout import StoreError
from pwm_fast.data.philox import random_pairs, scale_to
from pwm_fast.data.store import EpisodeStore

Task = int | str
Tasks = Task | Sequence[Task] | Mapping[Any, float]  # a mapping gives each task's weight


class Chosen(NamedTuple):
    """Episodes `ids` [E]; with weights, those of task g are ids[group[g] : group[g + 1]] and are drawn with
    probability share[g], which sum to 1."""

    ids: np.ndarray
    group: np.ndarray  # [G+1]
    share: list[Fraction]  # [G]


def choose(
    store: EpisodeStore,
    episodes: Sequence[int] | np.ndarray | None = None,
    tasks: Tasks | None = None,
    balanced: bool = False,
) -> Chosen:
    """The episodes (None: all) of some tasks (None: all), by name or id.

    `tasks` may be one, several, or a mapping from tasks to weights > 0 in whose proportion they are drawn; `balanced`
    draws each equally often. Otherwise one group holds every episode. Raises StoreError for episodes that are not
    there, or none of a task; ValueError for a task that the store does not name, or a bad weight.
    """
    ids = np.arange(store.num_episodes) if episodes is None else np.asarray(episodes, np.int64).reshape(-1)
    if len(ids) == 0:
        raise StoreError("a sampler needs at least one episode, got none")
    if ids.min() < 0 or ids.max() >= store.num_episodes:
        bad = ids[(ids < 0) | (ids >= store.num_episodes)][0]
        raise StoreError(f"episode ids must be in [0, {store.num_episodes}), got {bad}")
    if tasks is None and not balanced:
        return Chosen(ids, np.array([0, len(ids)]), [Fraction(1)])
    task = store.episode_task[ids]
    weights = _weights(store, np.unique(task).tolist() if tasks is None else tasks, balanced)
    for wanted in weights:
        if not (task == wanted).any():
            raise StoreError(
                f"episode store {store.path}: none of the {len(ids)} chosen episodes is of task "
                f"{store.task_names[wanted]!r}; leave it out or collect some"
            )
    ids, task = ids[np.isin(task, list(weights))], task[np.isin(task, list(weights))]
    if not balanced and not isinstance(tasks, Mapping):
        return Chosen(ids, np.array([0, len(ids)]), [Fraction(1)])
    order = np.argsort(task, kind="stable")
    groups = np.searchsorted(task[order], sorted(weights))
    total = sum(weights.values())
    return Chosen(ids[order], np.append(groups, len(ids)), [weights[t] / total for t in sorted(weights)])


def _weights(store: EpisodeStore, tasks: Tasks, balanced: bool) -> dict[int, Fraction]:
    """Weight of each task id; Fractions, so that thresholds made of them are exact on every machine."""
    if isinstance(tasks, Mapping) and balanced:
        raise ValueError("tasks have weights of their own, so they cannot be balanced too; choose one")
    own = listed(tasks)
    weights: dict[int, Fraction] = {}
    for name, weight in own.items() if isinstance(own, dict) else [(task, 1) for task in own or ()]:
        task = store.task_id(name)
        if not (0 < weight < float("inf")):
            raise ValueError(f"the weight of task {name!r} must be > 0 and finite, got {weight}; leave out a task of 0")
        if task in weights:
            raise ValueError(f"task {store.task_names[task]!r} is given twice")
        weights[task] = Fraction(weight)
    if not weights:
        raise ValueError("tasks must name at least one task, got none; None means all")
    return weights


def listed(tasks: Tasks | None) -> list[Task] | dict[Task, float] | None:
    """A copy of `tasks` in the form of a list, or of a dict if they have weights."""
    if tasks is None:
        return None
    if isinstance(tasks, Mapping):
        return dict(tasks)
    return [tasks] if isinstance(tasks, (str, int, np.integer)) else list(tasks)


class Draw:
    """Choice among `counts[e]` consecutive rows from `first_row[e]` on of each episode e: first a group of episodes
    with probability `share[g]`, then a row of the group, all equally likely."""

    def __init__(
        self,
        first_row: np.ndarray,
        counts: np.ndarray,
        group: np.ndarray | None = None,
        share: Sequence[Fraction] = (Fraction(1),),
    ) -> None:
        used = counts > 0
        before = np.concatenate(([0], np.cumsum(used)))  # episodes with rows
        self.first_row = np.ascontiguousarray(first_row[used])  # [E]
        self.cumulative = np.concatenate(([0], np.cumsum(counts[used]))).astype(np.int64)  # [E+1]
        self.group = before[[0, -1] if group is None else group].astype(np.int64)  # [G+1]
        # [G-1] 64 random bits choose group g if they are below threshold[g] and no earlier one
        self.threshold = np.array([int(sum(share[: g + 1]) * 2**64) for g in range(len(share) - 1)], np.uint64)
        self.total = int(self.cumulative[-1])
        self._compiled: Any = None

    def native(self, module: Any) -> Any:
        """The same for `pwm_fast._native`."""
        if self._compiled is None:
            self._compiled = module.Draw(self.cumulative, self.first_row, self.group, self.threshold)
        return self._compiled

    def rows(self, seed: int, stream: int, step: int, count: int, native: Any) -> np.ndarray:
        """Drawn rows, int64 [count]."""
        if native is not None:
            rows = np.empty(count, np.int64)
            native.draw_rows(seed, stream, step, self.native(native), rows)
            return rows
        bits, other = random_pairs(seed, stream, step, count)
        group = np.searchsorted(self.threshold, other, side="right")
        bounds = self.cumulative[self.group]
        drawn = bounds[group] + scale_to(bits, np.diff(bounds)[group])
        episode = np.searchsorted(self.cumulative, drawn, side="right") - 1
        return self.first_row[episode] + drawn - self.cumulative[episode]
