"""What every reader of other programs' data gives: episodes as our store takes them, with a place to go on from.

TD-MPC2, and PWM after it, keep rows whose action and reward *led to* the row's observation. Such a row t belongs to the
transition from t - 1, and row 0's action and reward are meaningless: NaN in some files, uninitialised memory in others,
so they are dropped by their place and never told by their value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from pwm_fast.data.safe_unpickling import Inert
from pwm_fast.data.stored_zip import ForeignFileError
from pwm_fast.data.torch_files import StoredTensor, walk

MAX_EPISODE_BYTES = 1 << 28  # a unit of a file is held in memory; anything longer is no episode
MAX_TASKS = 10_000


class ForeignEpisode(NamedTuple):
    """obs [T+1, S], action [T, A], reward [T] of one episode; `task` indexes the source's task names."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: bool
    task: int


class EpisodeSource(ABC):
    """One file or data set, opened. A unit is whatever it can go on from: a sequence, an episode, a row."""

    name: str
    size: int  # bytes of a file; with the name, what a resumed conversion knows its source by
    obs_dim: int
    action_dim: int
    task_names: list[str]
    num_units: int

    @abstractmethod
    def episodes(self, first: int, tasks: frozenset[int] | None) -> Iterator[tuple[int, list[ForeignEpisode]]]:
        """From unit `first` on: (units done, the episodes in them), of these tasks only (None: of all).

        Raises ForeignFileError where the data is damaged.
        """


def find_columns(tree: Any, names: tuple[str, ...]) -> dict[str, StoredTensor] | None:
    """The columns of a TensorDict in what `open_torch_file` gave, however its version pickled it; None without one."""
    for node in walk(tree):
        items = node.items if isinstance(node, Inert) else node
        if isinstance(items, dict) and all(isinstance(items.get(name), StoredTensor) for name in names):
            return {str(name): value for name, value in items.items() if isinstance(value, StoredTensor)}
    return None


def sequence_shape(columns: dict[str, StoredTensor], where: object) -> tuple[int, int, int, int]:
    """(N, T, S, A) of columns obs [N, T, S], action [N, T, A], reward [N, T] or [N, T, 1], and others [N, T, ...].

    Raises ForeignFileError that names the column that does not fit.
    """
    obs, action = columns["obs"].shape, columns["action"].shape
    if len(obs) != 3 or len(action) != 3 or not all(obs) or not all(action):
        raise ForeignFileError(f"{where}: obs and action must be [N, T, entries], got {obs} and {action}")
    for name, column in columns.items():
        if column.shape[:2] != obs[:2] or (name == "reward" and column.shape[2:] not in ((), (1,))):
            raise ForeignFileError(f"{where}: {name} is {column.shape}, obs is {obs}")
    if obs[1] < 2 or obs[1] * (obs[2] + action[2]) * 4 > MAX_EPISODE_BYTES:
        raise ForeignFileError(f"{where}: sequences have {obs[1]:,} rows; at least 2 are needed, as many as fit memory")
    return obs[0], obs[1], obs[2], action[2]


def arriving_rows(
    obs: np.ndarray, action: np.ndarray, reward: np.ndarray, terminated: np.ndarray | None, task: int
) -> list[ForeignEpisode]:
    """Episodes out of rows obs [T, S], action [T, A], reward [T] whose actions led to them.

    Where `terminated` [T] says that a row ended its episode, another begins at the next row; rows after an end that
    hold no observation (NaN) are padding.
    """
    if terminated is None:
        return [ForeignEpisode(obs, action[1:], reward[1:], False, task)]
    ends = (np.flatnonzero(terminated[1:]) + 2).tolist()
    start = ends[-1] if ends else 0
    observed = np.isfinite(obs[start:]).all(axis=1)
    padded = bool(len(observed)) and not observed[-1]
    last = start + int(np.argmin(observed)) if padded else len(obs)
    episodes = []
    for first, stop in pairwise([0, *ends, last]):
        if stop - first >= 2:
            arrived = slice(first + 1, stop)
            episodes.append(ForeignEpisode(obs[first:stop], action[arrived], reward[arrived], stop in ends, task))
    return episodes
