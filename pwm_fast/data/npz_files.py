"""Episodes in an .npz file, as many programs leave them, read in order and a piece at a time (compressed or not).

Three forms, told by names and shapes (synonyms in `SYNONYMS`):

    obs [N, T+1, S], action [N, T, A], reward [N, T]        action t leads from row t to row t + 1
    obs [N, T, S],   action [N, T, A], reward [N, T]        TD-MPC2's rows: action t led to row t, row 0's mean nothing
    obs [R, S],      action [R, A],    reward [R]           D4RL's flat rows, cut where `terminated` or `truncated` is
                                                            set; `next_obs` gives each episode's last observation, and
                                                            without it the last transition of each is lost

With the first two, `terminated` [N] and `task` [N] (or [N, T]) may be given. Pickled arrays are refused.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from pwm_fast.data.foreign_episodes import (
    MAX_EPISODE_BYTES,
    MAX_TASKS,
    EpisodeSource,
    ForeignEpisode,
)
from pwm_fast.data.stored_zip import ForeignFileError

SYNONYMS = {
    "obs": ("obs", "observations", "observation", "states"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards"),
    "terminated": ("terminated", "terminals", "terminations", "term"),
    "truncated": ("truncated", "timeouts", "truncations"),
    "next_obs": ("next_obs", "next_observations"),
    "task": ("task", "tasks", "task_id"),
}
_PIECE_ROWS = 4096
_READ_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError)


class _Column:
    """An array of the file, read along its first axis."""

    def __init__(self, archive: zipfile.ZipFile, member: str, path: Path):
        self._where = f"{path}: {member.removesuffix('.npy')}"
        self._stream: IO[bytes] = archive.open(member)
        try:
            version = np.lib.format.read_magic(self._stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            self.shape, fortran, self.dtype = read(self._stream)
        except (ValueError, KeyError, *_READ_ERRORS) as error:
            raise ForeignFileError(f"{self._where} is no array that can be read: {error}") from error
        if self.dtype.kind not in "fiub":
            raise ForeignFileError(f"{self._where} holds {self.dtype}, not numbers")
        if fortran and len(self.shape) > 1:
            raise ForeignFileError(f"{self._where} is stored by columns (Fortran order); save it in C order")
        self.row_bytes = self.dtype.itemsize
        for size in self.shape[1:]:
            self.row_bytes *= size
        claimed, there = self.row_bytes * (self.shape[0] if self.shape else 1), archive.getinfo(member).file_size
        if not self.shape or claimed > there:
            raise ForeignFileError(f"{self._where} claims shape {self.shape}, but has {there:,} bytes")

    def read(self, rows: int) -> np.ndarray:
        """The next rows [rows, ...]."""
        size = rows * self.row_bytes
        if size > MAX_EPISODE_BYTES:
            raise ForeignFileError(f"{self._where}: {rows:,} rows at once need {size:,} bytes, too many for an episode")
        try:
            data = self._stream.read(size)
        except _READ_ERRORS as error:
            raise ForeignFileError(f"{self._where} is damaged: {error}") from error
        if len(data) != size:
            raise ForeignFileError(f"{self._where} is truncated")
        return np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])

    def skip(self, rows: int) -> None:
        while rows > 0:
            step = min(rows, max(1, (1 << 22) // max(self.row_bytes, 1)))
            self.read(step)
            rows -= step


class NpzEpisodes(EpisodeSource):
    """Episodes of an .npz file; a unit is a sequence, or a row of the flat form. `task` names the task, if it is one.

    `verify` compares checksums, which reads the file once more. Raises FileNotFoundError, or ForeignFileError for a
    file that has none of the forms.
    """

    def __init__(self, path: str | os.PathLike[str], task: str | None = None, verify: bool = True):
        self.path, self._verify = Path(path), verify
        path = self.path
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        self.name, self.size = path.name, path.stat().st_size
        columns = self._open()
        if missing := [name for name in ("obs", "action", "reward") if name not in columns]:
            raise ForeignFileError(f"{path} has no {', '.join(missing)}; it holds {', '.join(self._held)[:200]}")
        obs, action, reward = (columns[name].shape for name in ("obs", "action", "reward"))
        self._flat = len(obs) == 2
        same = {len(obs), len(action), len(reward) + 1} == {2 if self._flat else 3} and action[:-1] == reward
        longer = 0 if self._flat or len(obs) < 2 or len(action) < 2 else obs[1] - action[1]
        if not same or obs[0] != action[0] or longer not in (0, 1) or not all((*obs, *action)):
            raise ForeignFileError(f"{path}: obs {obs}, action {action} and reward {reward} do not belong together")
        for name, column in columns.items():
            plain = name not in ("terminated", "truncated") or column.shape[1:] in ((), (1,))
            if column.shape[0] != obs[0] or (name == "next_obs" and column.shape != obs) or not plain:
                raise ForeignFileError(f"{path}: {name} is {column.shape}, obs is {obs}")
        if self._flat and not {"terminated", "truncated"} & columns.keys():
            raise ForeignFileError(
                f"{path} has flat rows, and neither terminated nor truncated says where episodes end"
            )
        self._arriving = longer == 0 and not self._flat
        if not self._flat and action[1] < 1 + self._arriving:
            raise ForeignFileError(f"{path}: sequences have {action[1]} rows; at least {1 + self._arriving} are needed")
        self.num_units, self.obs_dim, self.action_dim = obs[0], obs[-1], action[-1]
        self.task_names = [task or path.stem]
        if "task" in columns and not self._flat:
            numbers = self._tasks(columns["task"].read(obs[0]))
            self.task_names = [task or path.stem] if numbers.max() == 0 else self._names(int(numbers.max()))

    def _open(self) -> dict[str, _Column]:
        try:
            archive = zipfile.ZipFile(self.path)
        except _READ_ERRORS as error:
            raise ForeignFileError(f"{self.path} is no .npz file: {error or type(error).__name__}") from error
        self._held = [name.removesuffix(".npy") for name in archive.namelist()]
        found = {}
        for name, synonyms in SYNONYMS.items():
            member = next((f"{synonym}.npy" for synonym in synonyms if synonym in self._held), None)
            if member is not None and member in archive.namelist():
                try:
                    found[name] = _Column(archive, member, self.path)
                except _READ_ERRORS as error:
                    raise ForeignFileError(f"{self.path}: {member} is damaged: {error}") from error
        return found

    def _names(self, last: int) -> list[str]:
        from pwm_fast.data.task_table import set_of, tasks

        known = set_of(self.obs_dim, self.action_dim)
        return [task.name for task in tasks(known)] if known else [f"task-{number}" for number in range(last + 1)]

    def _tasks(self, values: np.ndarray) -> np.ndarray:
        """Task numbers [N] of a column [N] or [N, T], whose row 0 may mean nothing."""
        numbers = values.reshape(len(values), -1)
        last = numbers[:, -1]
        if not (last[:, None] == numbers[:, 1:]).all() or not ((last >= 0) & (last < MAX_TASKS)).all():
            raise ForeignFileError(f"{self.path}: task must be one number in [0, {MAX_TASKS}) for each sequence")
        return last.astype(np.int64)

    def episodes(self, first: int, tasks: frozenset[int] | None) -> Iterator[tuple[int, list[ForeignEpisode]]]:
        if self._verify:  # the checksums, which are compared at each array's end, before anything is given out
            for column in self._open().values():
                column.skip(column.shape[0])
        columns = self._open()
        for column in columns.values():
            column.skip(first)
        if self._flat:
            yield from self._flat_episodes(first, columns)
            return
        for i in range(first, self.num_units):
            row = {name: column.read(1) for name, column in columns.items()}
            number = int(self._tasks(row["task"])[0]) if "task" in row else 0
            ended = bool(np.any(row["terminated"])) if "terminated" in row else False
            obs, action, reward = row["obs"][0], row["action"][0], row["reward"][0]
            if not 0 <= number < len(self.task_names):
                raise ForeignFileError(f"{self.path}: sequence {i} has task {number} of {len(self.task_names)}")
            if self._arriving:
                action, reward = action[1:], reward[1:]
            wanted = tasks is None or number in tasks
            yield i + 1, [ForeignEpisode(obs, action, reward, ended, number)] if wanted else []

    def _flat_episodes(self, done: int, columns: dict[str, _Column]) -> Iterator[tuple[int, list[ForeignEpisode]]]:
        pending: list[dict[str, Any]] = []  # pieces of the episode that has not ended
        held = 0
        while done < self.num_units:
            step = min(_PIECE_ROWS, self.num_units - done - sum(len(piece["obs"]) for piece in pending))
            if step > 0:
                piece = {name: column.read(step) for name, column in columns.items()}
                pending.append(piece)
                held += sum(array.nbytes for array in piece.values())
                if held > MAX_EPISODE_BYTES:
                    raise ForeignFileError(
                        f"{self.path}: no episode ends in {held:,} bytes of rows from row {done:,} on"
                    )
            rows = {name: np.concatenate([piece[name] for piece in pending]) for name in columns}
            ends = np.zeros(len(rows["obs"]), bool)
            for name in ("terminated", "truncated"):
                if name in rows:
                    ends |= rows[name].reshape(len(ends), -1).any(axis=1)
            if step <= 0:
                ends[-1] = True  # the file's end cuts the last one off
            start = 0
            for end in np.flatnonzero(ends):
                stop = int(end) + 1
                yield done + stop, self._flat_episode({name: array[start:stop] for name, array in rows.items()})
                start = stop
            done += start
            pending = [{name: array[start:] for name, array in rows.items()}] if start < len(ends) else []
            held = sum(array.nbytes for array in pending[0].values()) if pending else 0

    @staticmethod
    def _flat_episode(rows: dict[str, np.ndarray]) -> list[ForeignEpisode]:
        obs, action, reward = (rows[name] for name in ("obs", "action", "reward"))
        ended = bool("terminated" in rows and np.any(rows["terminated"][-1]))
        if "next_obs" in rows:
            return [ForeignEpisode(np.concatenate([obs, rows["next_obs"][-1:]]), action, reward, ended, 0)]
        if len(obs) < 2:
            return []
        return [ForeignEpisode(obs, action[:-1], reward[:-1], False, 0)]
