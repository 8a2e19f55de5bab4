"""Minari data sets, through the `minari` library (extra `minari`): by name (`minari:D4RL/door/human-v2`) or folder.

Observations of several parts are laid end to end, in the order of their space; actions are brought to [-1, 1] from
their space's bounds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pwm_fast.data.foreign_episodes import EpisodeSource, ForeignEpisode
from pwm_fast.data.stored_zip import ForeignFileError

PREFIX = "minari:"


def is_minari(source: str | os.PathLike[str]) -> bool:
    """Whether `source` names a Minari data set or is the folder of one."""
    text = os.fspath(source)
    return text.startswith(PREFIX) or any((Path(text) / part / "metadata.json").is_file() for part in ("", "data"))


class MinariData(EpisodeSource):
    """A Minari data set; a unit is an episode. `task` names the task (default: the data set's name).

    Raises ImportError that says how to install the library, FileNotFoundError, and ForeignFileError for spaces that
    are not continuous.
    """

    def __init__(self, source: str | os.PathLike[str], task: str | None = None):
        try:
            import minari
        except ImportError as error:
            raise ImportError("Minari data needs the library: pip install 'pwm_fast[minari]'") from error
        text = os.fspath(source)
        try:
            if text.startswith(PREFIX):
                self._data: Any = minari.load_dataset(text.removeprefix(PREFIX))
            else:
                folder = Path(text)
                self._data = minari.MinariDataset(folder if (folder / "metadata.json").is_file() else folder / "data")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{text} is no Minari data set on this machine: {error}") from error
        except (OSError, ValueError, KeyError) as error:
            raise ForeignFileError(f"{text} cannot be read as a Minari data set: {error}") from error
        self.name = self._data.spec.dataset_id
        self.size = int(self._data.total_steps)
        self.num_units = int(self._data.total_episodes)
        self.task_names = [task or self.name]
        self._observation, action = self._data.observation_space, self._data.action_space
        self.obs_dim = _width(self._observation, f"{self.name}: its observation space")
        self.action_dim = _width(action, f"{self.name}: its action space")
        if not hasattr(action, "low"):
            raise ForeignFileError(f"{self.name}: its action space is {action}, not a box")
        low, high = (np.asarray(bound, np.float64).reshape(-1) for bound in (action.low, action.high))
        if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
            raise ForeignFileError(f"{self.name}: its actions have no finite bounds, so that [-1, 1] cannot hold them")
        self._middle, self._half = (high + low) / 2, (high - low) / 2

    def episodes(self, first: int, tasks: frozenset[int] | None) -> Iterator[tuple[int, list[ForeignEpisode]]]:
        for i in range(first, self.num_units):
            (episode,) = self._data.iterate_episodes([i])
            obs = _flat(self._observation, episode.observations)
            length = len(obs) - 1
            action = np.asarray(episode.actions, np.float64).reshape(length, -1)
            ended = bool(np.asarray(episode.terminations).reshape(-1)[-1])
            reward = np.asarray(episode.rewards).reshape(length)
            yield i + 1, [ForeignEpisode(obs, (action - self._middle) / self._half, reward, ended, 0)]


def _parts(space: Any) -> list[tuple[Any, Any]] | None:
    """(key, space) of the parts of a compound space; None for a plain one."""
    parts = getattr(space, "spaces", None)
    if parts is None:
        return None
    return list(parts.items()) if hasattr(parts, "items") else list(enumerate(parts))


def _width(space: Any, what: str) -> int:
    """Entries of a continuous space laid flat."""
    if (parts := _parts(space)) is not None:
        return sum(_width(part, what) for _, part in parts)
    if not hasattr(space, "low") or np.dtype(space.dtype).kind != "f":
        raise ForeignFileError(f"{what} has a part {space}; only boxes of real numbers are read")
    return int(np.prod(space.shape, dtype=np.int64))


def _flat(space: Any, values: Any) -> np.ndarray:
    """Rows [T+1, S] of an episode's observations."""
    if (parts := _parts(space)) is not None:
        return np.concatenate([_flat(part, values[key]) for key, part in parts], axis=1)
    return np.asarray(values).reshape(len(values), -1)
