"""Writing an episode store: all or nothing per commit. See `episodes.py` for the format."""

import contextlib
import glob
import os
import shutil
import uuid
import zlib
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike

from pwm_fast.data.layout import COLUMNS, META_FILE, Header, StoreError, read_header, sync_directory

try:
    import fcntl
except ImportError:  # no advisory locks on this system: two writers at once are then the caller's care
    fcntl = None  # type: ignore[assignment]


class EpisodeWriter:
    """Creates a store at `path`, or with `append=True` adds to the one there (creating it if there is none).

    Nothing is visible before the first `commit`; a writer that is closed, killed or meets a full disk leaves exactly
    what was committed. As a context manager it commits on a clean exit and discards on an exception. One writer at a
    time. `meta` is the caller's own dictionary: saved with each commit, so notes and data cannot disagree.

    Raises StoreError if the path is taken, is being written by another process, or (append) holds another format:
    other dimensions, or task names that do not continue the ones there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        obs_dim: int,
        action_dim: int,
        *,
        task_names: list[str],
        meta: dict[str, Any] | None = None,
        append: bool = False,
    ) -> None:
        self.path = self._directory = Path(path)
        self._files: dict[str, IO[bytes]] = {}
        if obs_dim < 1 or action_dim < 1:
            raise StoreError(f"obs_dim and action_dim must be >= 1, got {obs_dim} and {action_dim}")
        if not task_names:
            raise StoreError("task_names must name at least one task, got none")
        self._header = Header(int(obs_dim), int(action_dim), [str(name) for name in task_names], meta=dict(meta or {}))
        self._header.to_json()  # refuses unusable meta before anything is written
        _remove_abandoned(self.path)
        try:
            if append and (self.path / META_FILE).exists():
                self._continue(meta)
            else:
                self._create()
        except OSError as error:
            self._release()
            raise StoreError(f"cannot write episode store {self.path}: {error.strerror or error}") from error
        except BaseException:
            self._release()
            raise

    def _create(self) -> None:
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise StoreError(f"{self.path} exists already; append=True adds to a store, or choose another path")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._directory = self.path.parent / f".{self.path.name}.{uuid.uuid4().hex[:12]}.partial"
        self._directory.mkdir()
        for name, column in COLUMNS.items():
            self._files[name] = open(self._directory / column.file, "xb", buffering=0)
        self._lock()

    def _continue(self, meta: dict[str, Any] | None) -> None:
        for name, column in COLUMNS.items():
            self._files[name] = open(self.path / column.file, "r+b", buffering=0)
        self._lock()
        wanted, self._header = self._header, read_header(self.path)
        for name in ("obs_dim", "action_dim"):
            there, here = getattr(self._header, name), getattr(wanted, name)
            if there != here:
                raise StoreError(f"cannot append to {self.path}: its {name} is {there}, got {here}")
        if wanted.task_names[: len(self._header.task_names)] != self._header.task_names:
            raise StoreError(
                f"cannot append to {self.path}: its task names {self._header.task_names} must come first, "
                f"got {wanted.task_names}"
            )
        self._header.task_names = wanted.task_names
        self._header.meta.update(meta or {})
        self._cut()

    def _lock(self) -> None:
        """Held through the open file, so a killed writer leaves no lock behind."""
        if fcntl is not None and not _try_lock(self._files["obs"]):
            raise StoreError(f"episode store {self.path} is being written by another process")

    @property
    def meta(self) -> dict[str, Any]:
        """The caller's notes, saved by the next commit."""
        return self._header.meta

    @property
    def num_episodes(self) -> int:
        """Episodes added, committed or not."""
        return self._header.num_episodes

    @property
    def num_transitions(self) -> int:
        """Transitions added, committed or not."""
        return self._header.num_transitions

    def add(self, obs: ArrayLike, action: ArrayLike, reward: ArrayLike, terminated: bool, task: int = 0) -> None:
        """Adds one episode of T >= 1 transitions: obs [T+1, S], action [T, A], reward [T]; stored as float32.

        `terminated` says whether the last transition ended the episode for good; `task` indexes the task names.
        Raises StoreError for wrong shapes, NaN or infinity, and when the disk does not take it (the episode is then
        not part of the store, and the writer can go on).
        """
        self._require_open()
        entries = self._entries(obs, action, reward, bool(terminated), int(task))
        header, sums = self._header, dict(self._header.checksums)
        try:
            for name, entry in entries.items():
                data = entry.tobytes()
                file = self._files[name]
                file.seek(header.shape(name)[0] * header.entry_bytes(name))
                _write_all(file, data)
                sums[name] = zlib.crc32(data, sums[name])
        except BaseException as error:
            self._cut()
            if isinstance(error, OSError):
                raise self._refusal(error) from error
            raise
        # One assignment, so that an interrupt finds either all of the episode counted or nothing of it.
        self._header = replace(
            header,
            checksums=sums,
            num_rows=header.num_rows + len(entries["obs"]),
            num_episodes=header.num_episodes + 1,
        )

    def _entries(
        self, obs: ArrayLike, action: ArrayLike, reward: ArrayLike, terminated: bool, task: int
    ) -> dict[str, np.ndarray]:
        """The episode as it is stored: T+1 entries per column."""
        header = self._header
        episode = f"episode {header.num_episodes}"
        given = {"obs": obs, "action": action, "reward": reward}
        try:
            with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is refused below
                arrays = {name: np.asarray(value, COLUMNS[name].dtype) for name, value in given.items()}
        except (TypeError, ValueError) as error:
            raise StoreError(f"{episode} is not made of numbers: {error}") from error
        length = arrays["obs"].shape[0] - 1 if arrays["obs"].ndim else 0
        want = {"obs": (length + 1, header.obs_dim), "action": (length, header.action_dim), "reward": (length,)}
        if length < 1 or any(arrays[name].shape != want[name] for name in want):
            raise StoreError(
                f"{episode} must have obs [T+1, {header.obs_dim}], action [T, {header.action_dim}] and reward [T] "
                f"with T >= 1, got {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}"
            )
        if not 0 <= task < len(header.task_names):
            raise StoreError(f"{episode}: task must be in [0, {len(header.task_names)}), got {task}")
        for name, array in arrays.items():
            finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
            if not finite.all():
                raise StoreError(f"{episode}: {name} is NaN or infinite at step {int(np.argmin(finite))}")
        entries = {name: np.zeros((length + 1, *array.shape[1:]), array.dtype) for name, array in arrays.items()}
        for name, array in arrays.items():
            entries[name][: len(array)] = array
        entries["terminated"] = np.zeros(length + 1, COLUMNS["terminated"].dtype)
        entries["terminated"][length - 1] = terminated
        entries["task"] = np.full(length + 1, task, COLUMNS["task"].dtype)
        entries["episode_start"] = np.array([header.num_rows], COLUMNS["episode_start"].dtype)
        return entries

    def commit(self) -> None:
        """Makes every added episode part of the store, durably. Does nothing to a new store that has no episode.

        Raises StoreError when the disk does not take it; what was committed before stays as it was.
        """
        self._require_open()
        if self._header.num_episodes == 0:
            return
        text = self._header.to_json()
        draft = self._directory / f"{META_FILE}.new"
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
            with open(draft, "wb", buffering=0) as file:
                _write_all(file, text.encode())
                os.fsync(file.fileno())
            os.replace(draft, self._directory / META_FILE)
            sync_directory(self._directory)
            if self._directory != self.path:
                os.rename(self._directory, self.path)
                self._directory = self.path
                sync_directory(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise self._refusal(error) from error

    def close(self) -> None:
        """Ends writing; what was not committed is discarded. Closing twice is harmless."""
        if not self._files:
            return
        if self._directory == self.path:
            # What is committed is what the disk says: an interrupt may have come right after meta.json was replaced.
            with contextlib.suppress(StoreError):
                self._header = read_header(self.path)
                self._cut()
        self._release()

    def _cut(self) -> None:
        """Gives back the disk space past the last whole episode. Best effort: such bytes are ignored anyhow."""
        for name, file in self._files.items():
            with contextlib.suppress(OSError):
                file.truncate(self._header.shape(name)[0] * self._header.entry_bytes(name))

    def _release(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._directory != self.path:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _require_open(self) -> None:
        if not self._files:
            raise StoreError(f"the writer of {self.path} is closed")

    def _refusal(self, error: OSError) -> StoreError:
        try:
            safe = read_header(self.path).num_episodes
        except StoreError:
            safe = 0
        return StoreError(
            f"cannot write episode store {self.path}: {error.strerror or error} ({safe} committed episodes are safe)"
        )

    def __enter__(self) -> "EpisodeWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._files:
                self.commit()
        finally:
            self.close()


def _write_all(file: IO[bytes], data: bytes) -> None:
    """An unbuffered write may take only part: a disk that is nearly full takes what fits before it says so."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(path: Path) -> None:
    """Deletes what killed writers of a new store at `path` left in their hidden directories."""
    if fcntl is None:
        return
    for directory in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), open(directory / COLUMNS["obs"].file, "r+b") as file:
            if _try_lock(file):
                shutil.rmtree(directory, ignore_errors=True)
