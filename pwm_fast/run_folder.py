"""The folder of one run: options, metrics, checkpoint, policies, summary; nothing in it is ever half-written.

run.json                   the options the run was begun with
metrics.csv                a row per logged step
checkpoint.safetensors     the whole state for an exact resume
policy.safetensors, .json  the best policy; seed_0/, seed_1/, ... hold each seed's where there are several; of several
                           tasks each has a folder of its own with all these
summary.json               the result
curve.png, rollout.gif     pictures
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from safetensors import SafetensorError

from pwm_fast.errors import Interrupted
from pwm_fast.state_files import (
    PART,
    atomic_file,
    load_state,
    read_json,
    replacing,
    save_state,
    write_error,
    write_json,
)

try:
    import fcntl
except ImportError:  # Windows: no lock, everything else works
    fcntl = None  # type: ignore[assignment]

OPTIONS, METRICS, CHECKPOINT, SUMMARY = "run.json", "metrics.csv", "checkpoint.safetensors", "summary.json"
LOCK, SCORES = ".lock", "scores.csv"
POLICY_FILES = ("policy.safetensors", "policy.json")
FILES = {
    "policy.safetensors": "the best policy (Policy.load), its text part in policy.json",
    SCORES: "a row per task, beside the published scores",
    "summary.json": "returns, settings, time by phase, versions",
    "metrics.csv": "every logged step",
    "curve.png": "real and imagined return against time",
    "rollout.gif": "the robot under the best policy",
    "checkpoint.safetensors": "everything --resume needs",
}
_OWN = (OPTIONS, METRICS, CHECKPOINT, SUMMARY, *POLICY_FILES)


class SavesItself(Protocol):
    """What `save_policy` takes: `Policy`, or anything that writes itself into a folder."""

    def save(self, path: Path) -> object: ...


def new_path(name: str, root: str | Path = "runs") -> Path:
    """The first unused of root/NAME, root/NAME-2, root/NAME-3, ..."""
    path, count = Path(root) / name, 1
    while path.exists():
        count += 1
        path = Path(root) / f"{name}-{count}"
    return path


def latest_path(name: str, root: str | Path = "runs") -> Path:
    """The run that `new_path` made last; FileNotFoundError where there is none."""
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = [(int(m.group(1) or 1), p) for p in Path(root).glob("*") if (m := pattern.fullmatch(p.name)) and p.is_dir()]
    if not found:
        raise FileNotFoundError(f"no run of {name} in {root}/ to resume: name it by --out, or leave out --resume")
    return max(found)[1]


class RunFolder:
    """Create a run's folder, or with `resume` open it again.

    Raises FileExistsError where another run lies there, FileNotFoundError where there is nothing to resume, OSError
    where nothing can be written, BlockingIOError where another process is at work on it; all before any work begins.
    Close it, or use it as a context manager, to release the lock.
    """

    def __init__(self, path: str | Path, resume: bool = False):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file; choose another --out")
        present = [name for name in _OWN if (self.path / name).exists()]
        if present and not resume:
            raise FileExistsError(f"{self.path} holds another run; continue it by --resume, or choose another --out")
        if resume and not present:
            raise FileNotFoundError(f"nothing to resume in {self.path}: leave out --resume to begin a run there")
        self._is_new, self._is_made = not present, not self.path.exists()
        self._lock = self._claim()
        for part in [p for where in ("", "seed_*/", "*/seed_*/") for p in self.path.glob(f"{where}.*{PART}")]:
            # a killed process left it
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        self._columns: list[str] | None = None
        self._rows = 0
        if not (self.path / CHECKPOINT).exists():
            self._truncate(0)

    def _claim(self) -> io.BufferedWriter:
        """Prove that the folder takes files, and keep other processes out.

        A POSIX record lock ends with its process however that dies, and worker processes do not inherit it.
        """
        lock = self.path / LOCK
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(lock, "wb")  # held open for as long as the run lasts
            if fcntl is not None:
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    handle.close()
                    raise BlockingIOError(f"another process is at work on {self.path}; choose another --out") from None
                except OSError:  # a file system without locks
                    pass
            probe = self.path / f".probe{PART}"
            probe.write_bytes(b"pwm_fast")
            probe.unlink()
        except BlockingIOError:
            raise
        except OSError as error:
            raise write_error(self.path, error) from error
        return handle

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """A run that fails before it has done anything leaves nothing, so that it can simply be started again."""
        failed = isinstance(error, Exception) and not isinstance(error, Interrupted)
        if failed and self._is_new and not any((self.path / name).exists() for name in _OWN if name != OPTIONS):
            for name in (OPTIONS, LOCK):
                (self.path / name).unlink(missing_ok=True)
            if self._is_made and not any(self.path.iterdir()):
                self.path.rmdir()
        self.close()

    def file(self, name: str) -> Path:
        return self.path / name

    # options ----------------------------------------------------------------------------------------------------

    def begin(self, options: Mapping[str, Any], free: tuple[str, ...] = ()) -> None:
        """Record the run's options, or on resume check that they are the recorded ones.

        Those named in `free` may change between the two. Raises ValueError that names the option, both values and the
        mend.
        """
        path = self.path / OPTIONS
        options = json.loads(json.dumps(dict(options), default=str))  # as they will be read back
        if not path.exists():
            write_json(path, options)
            return
        recorded = read_json(path)
        for name, value in options.items():
            if name not in free and name in recorded and recorded[name] != value:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{self.path} was begun with {flag} {recorded[name]}, got {value}; resume with the same value, "
                    "or choose another --out"
                )

    def options(self) -> dict[str, Any]:
        """The options the run was begun with."""
        return read_json(self.path / OPTIONS)

    # metrics ----------------------------------------------------------------------------------------------------

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.csv. New names add columns; missing ones stay blank."""
        if self._columns is None or any(name not in self._columns for name in row):
            self._widen(row)
        assert self._columns is not None
        self._append(_csv_line([row.get(name) for name in self._columns]))
        self._rows += 1

    def metrics(self) -> list[dict[str, Any]]:
        """All rows; numbers as numbers, blanks left out."""
        path = self.path / METRICS
        if not path.exists():
            return []
        with open(path, newline="") as file:
            return [{k: _number(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]

    def _append(self, line: str) -> None:
        path = self.path / METRICS
        try:
            with open(path, "a", newline="") as file:
                file.write(line)
        except OSError as error:
            self._cut(self._rows)  # no torn row stays
            raise write_error(path, error) from error

    def _widen(self, row: Mapping[str, Any]) -> None:
        rows = self.metrics()
        self._columns = [*(self._columns or []), *(name for name in row if name not in (self._columns or []))]
        with atomic_file(self.path / METRICS) as file:
            file.write(_csv_line(self._columns).encode())
            for old in rows:
                file.write(_csv_line([old.get(name) for name in self._columns]).encode())

    def _truncate(self, rows: int) -> None:
        """Keep the first `rows` rows: those of the state that is resumed."""
        path = self.path / METRICS
        if not path.exists():
            if rows:
                raise FileNotFoundError(f"{path} is missing: the checkpoint expects {rows} rows in it")
            return
        if rows == 0:
            path.unlink()
            self._columns, self._rows = None, 0
            return
        self._cut(rows)
        with open(path, newline="") as file:
            self._columns = next(csv.reader(file))
        self._rows = rows

    def _cut(self, rows: int) -> None:
        """Drop whatever follows the header and `rows` rows, a torn last line included."""
        with open(self.path / METRICS, "rb+") as file:
            found = sum(1 for line in (file.readline() for _ in range(rows + 1)) if line.endswith(b"\n"))
            if found < rows + 1:
                held = max(found - 1, 0)
                raise ValueError(f"{file.name} holds {held} rows, the checkpoint expects {rows}: was it edited?")
            file.truncate(file.tell())

    # state and results ------------------------------------------------------------------------------------------

    def save_checkpoint(self, tree: Mapping[str, Any]) -> None:
        """Write the state for a resume; the rows of metrics.csv that belong to it are noted and made durable."""
        path = self.path / METRICS
        if path.exists():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        save_state(self.path / CHECKPOINT, {"metrics_rows": self._rows, "state": dict(tree)})

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last saved state, and metrics.csv cut back to it; None where the run had not come to its first one."""
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        tree = load_state(path)
        self._truncate(tree["metrics_rows"])
        return tree["state"]

    def save_policy(self, policy: SavesItself, seed: int | None = None, task: str = "") -> None:
        """Save into the folder, or its seed_N/, in that of a task where one is given; each file is replaced whole."""
        target = self.path / task / ("" if seed is None else f"seed_{seed}")
        staging = self.path / f".policy{PART}"
        staging.mkdir(exist_ok=True)
        try:
            target.mkdir(parents=True, exist_ok=True)
            try:
                policy.save(staging)
            except (OSError, SafetensorError) as error:
                raise write_error(target / POLICY_FILES[0], error) from error
            for source in sorted(staging.iterdir()):
                with replacing(target / source.name) as part:
                    os.replace(source, part)
        finally:
            shutil.rmtree(staging)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path / SUMMARY, dict(summary))


def read_summary(path: str | Path) -> dict[str, Any]:
    """summary.json of a run folder; FileNotFoundError says what to do."""
    path = Path(path) / SUMMARY
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {path.parent} holds no finished run")
    return read_json(path)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("pwm_fast", "torch", "numpy", "warp-lang", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _csv_line(values: list[Any]) -> str:
    buffer = io.StringIO()
    row = ["" if v is None else f"{v:.8g}" if isinstance(v, float) else v for v in values]
    csv.writer(buffer, lineterminator="\n").writerow(row)
    return buffer.getvalue()


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
