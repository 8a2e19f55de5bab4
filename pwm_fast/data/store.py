"""Reading an episode store: memory-mapped columns, statistics and the validation split. See `episodes.py`."""

import os
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pwm_fast.data.layout import COLUMNS, StoreError, read_header
from pwm_fast.data.philox import random_bits
from pwm_fast.errors import nearest

SPLIT_STREAM = 2  # the sampler's two streams come before it
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_CHUNK_BYTES = 1 << 26


class EpisodeStore:
    """A store opened read-only at its last commit; episodes committed later are seen by opening it again.

    Attributes (N rows, E episodes): `obs` [N, S], `action` [N, A], `reward` [N] float32, `terminated` [N] uint8,
    `task` [N] int32, all memory-mapped; `episode_start` [E+1] int64, whose last entry is N; `num_rows`,
    `num_episodes`, `num_transitions`, `obs_dim`, `action_dim`, `task_names`, `meta`.

    Opening reads the header and the episode starts and raises StoreError, with the reason, for a store that is
    missing, empty, truncated or inconsistent. `verify` reads everything.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._header = header = read_header(self.path)
        if header.num_episodes == 0:
            raise StoreError(f"episode store {self.path} is empty; add episodes with EpisodeWriter")
        self.num_rows, self.num_episodes = header.num_rows, header.num_episodes
        self.num_transitions = header.num_transitions
        self.obs_dim, self.action_dim = header.obs_dim, header.action_dim
        self.task_names, self.meta = list(header.task_names), dict(header.meta)
        self.obs, self.action, self.reward = self._map("obs"), self._map("action"), self._map("reward")
        self.terminated, self.task = self._map("terminated"), self._map("task")
        self.episode_start = self._episode_starts()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "EpisodeStore":
        """The store at `path`; see the class for what is refused."""
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return EpisodeStore, (self.path,)  # a worker process maps the files again: no data is pickled

    def __repr__(self) -> str:
        return f"EpisodeStore({str(self.path)!r}: {self.num_episodes} episodes, {self.num_transitions} transitions)"

    def _map(self, column: str) -> np.ndarray:
        file, dtype, _, _ = COLUMNS[column]
        return np.memmap(self.path / file, dtype, "r", shape=self._header.shape(column))

    def _episode_starts(self) -> np.ndarray:
        starts = np.array(self._map("episode_start"))
        if zlib.crc32(starts.tobytes()) != self._header.checksums["episode_start"]:
            raise StoreError(
                f"episode store {self.path} is corrupt: {COLUMNS['episode_start'].file} fails its checksum"
            )
        starts = np.append(starts, self.num_rows).astype(np.int64)
        if starts[0] != 0 or np.any(np.diff(starts) < 2):
            episode = 0 if starts[0] != 0 else int(np.argmax(np.diff(starts) < 2))
            raise StoreError(
                f"episode store {self.path} is inconsistent: episode {episode} covers rows {starts[episode]} to "
                f"{starts[episode + 1]}; episodes must follow each other from row 0 with at least 2 rows each"
            )
        return starts

    @property
    def lengths(self) -> np.ndarray:
        """Transitions in each episode: int64 [E]."""
        return np.diff(self.episode_start) - 1

    @cached_property
    def episode_task(self) -> np.ndarray:
        """The task of each episode: int32 [E]."""
        return np.asarray(self.task[self.episode_start[:-1]])

    def task_id(self, task: int | str) -> int:
        """The id of a task given by name or id; raises ValueError for one that the store does not name."""
        if isinstance(task, str):
            if task not in self.task_names:
                raise ValueError(f"episode store {self.path}: {nearest('task', task, self.task_names)}")
            return self.task_names.index(task)
        if not 0 <= task < len(self.task_names):
            raise ValueError(f"episode store {self.path}: task ids must be in [0, {len(self.task_names)}), got {task}")
        return int(task)

    def episode(self, index: int) -> dict[str, np.ndarray]:
        """One episode of T transitions: obs [T+1, S], action [T, A], reward [T], terminated [T], task []."""
        if not 0 <= index < self.num_episodes:
            raise StoreError(f"episode must be in [0, {self.num_episodes}), got {index}")
        first, end = self.episode_start[index], self.episode_start[index + 1]
        columns = {
            name: np.asarray(getattr(self, name)[first : end - 1]) for name in ("action", "reward", "terminated")
        }
        return {"obs": np.asarray(self.obs[first:end]), **columns, "task": np.asarray(self.task[first])}

    def verify(self) -> None:
        """Reads every committed byte; raises StoreError on a failed checksum or a task outside the task names."""
        for name, (file, _, _, _) in COLUMNS.items():
            checksum = 0
            for _, rows in self._chunks(self._map(name)):
                checksum = zlib.crc32(rows.tobytes(), checksum)
                if name == "task" and not (0 <= rows.min() and rows.max() < len(self.task_names)):
                    raise StoreError(
                        f"episode store {self.path} is inconsistent: {file} has tasks from {rows.min()} to "
                        f"{rows.max()}, but there are {len(self.task_names)} task names"
                    )
            if checksum != self._header.checksums[name]:
                raise StoreError(f"episode store {self.path} is corrupt: {file} fails its checksum")

    def _chunks(self, column: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) in pieces that fit in memory."""
        step = max(1, _CHUNK_BYTES // max(1, column[:1].nbytes))
        for first in range(0, len(column), step):
            yield first, np.asarray(column[first : first + step])

    def statistics(self) -> dict[str, Any]:
        """What the data is like. Sums are float64, in pieces; raises StoreError where a value is NaN or infinite.

        returns [E] (undiscounted), lengths [E], terminated [E] (bool), obs_mean, obs_std [S] (std floored at 1e-6, so
        that it can divide), obs_min, obs_max [S], reward_mean, reward_std, reward_quantiles {"0.05": ...},
        action_abs_max, num_episodes, num_transitions.
        """
        return dict(self._statistics)

    @cached_property
    def _statistics(self) -> dict[str, Any]:
        shift = np.asarray(self.obs[0], np.float64)  # keeps the difference of squares below from cancelling
        total, squares = np.zeros(self.obs_dim), np.zeros(self.obs_dim)
        low, high = np.full(self.obs_dim, np.inf), np.full(self.obs_dim, -np.inf)
        for first, rows in self._chunks(self.obs):
            self._require_finite("obs", first, rows)
            centred = rows - shift
            total += centred.sum(axis=0)
            squares += np.square(centred).sum(axis=0)
            low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
        mean = total / self.num_rows
        action_abs_max = 0.0
        for first, rows in self._chunks(self.action):
            self._require_finite("action", first, rows)
            action_abs_max = max(action_abs_max, float(np.abs(rows).max()))
        self._require_finite("reward", 0, self.reward)
        starts, ends = self.episode_start[:-1], self.episode_start[1:]
        is_transition = np.ones(self.num_rows, bool)
        is_transition[ends - 1] = False
        reward = np.where(is_transition, self.reward, 0.0).astype(np.float64)
        transitions = reward[is_transition]
        return {
            "returns": np.add.reduceat(reward, starts),
            "lengths": self.lengths,
            "terminated": np.asarray(self.terminated[ends - 2]) != 0,
            "obs_mean": mean + shift,
            "obs_std": np.sqrt(np.maximum(squares / self.num_rows - np.square(mean), 1e-12)),
            "obs_min": low,
            "obs_max": high,
            "reward_mean": float(transitions.mean()),
            "reward_std": float(transitions.std()),
            "reward_quantiles": {str(q): float(v) for q, v in zip(_QUANTILES, np.quantile(transitions, _QUANTILES))},
            "action_abs_max": action_abs_max,
            "num_episodes": self.num_episodes,
            "num_transitions": self.num_transitions,
        }

    def _require_finite(self, name: str, first: int, rows: np.ndarray) -> None:
        if not np.isfinite(rows.sum(dtype=np.float64)):  # one sum is cheaper than a mask, and NaN survives it
            finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
            if not finite.all():
                row = first + int(np.argmin(finite))
                raise StoreError(f"episode store {self.path} holds NaN or infinity: {name}, row {row}")

    def split(self, validation_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffles the episodes and sets a part aside: (training ids, validation ids), each sorted, int64.

        Whole episodes, because windows of one episode overlap. At least one episode goes to each side when
        validation_fraction > 0, which needs two episodes. The same (store, fraction, seed) gives the same split.
        """
        if not 0.0 <= validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        if validation_fraction > 0 and self.num_episodes < 2:
            raise StoreError(f"episode store {self.path} has 1 episode; a validation split needs at least 2")
        count = round(validation_fraction * self.num_episodes)
        if validation_fraction > 0:
            count = min(max(count, 1), self.num_episodes - 1)
        order = np.argsort(random_bits(seed, SPLIT_STREAM, 0, self.num_episodes), kind="stable")
        return np.sort(order[count:]), np.sort(order[:count])
