"""The files of an episode store: the table of columns and the header `meta.json`. See `episodes.py` for the format."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = "pwm_fast.episodes"
VERSION = 1
META_FILE = "meta.json"


class StoreError(ValueError):
    """An episode store, or data meant for one, that cannot be used; the message says why."""


class Column(NamedTuple):
    file: str
    dtype: str  # little-endian on every machine
    per: str  # what has one entry: "row" or "episode"
    width: str | None  # the header field that gives the length of an entry; None for scalars


COLUMNS = {
    "obs": Column("obs.f32", "<f4", "row", "obs_dim"),
    "action": Column("action.f32", "<f4", "row", "action_dim"),
    "reward": Column("reward.f32", "<f4", "row", None),
    "terminated": Column("terminated.u8", "|u1", "row", None),
    "task": Column("task.i32", "<i4", "row", None),
    "episode_start": Column("episode_start.i64", "<i8", "episode", None),
}


@dataclass
class Header:
    """The contents of meta.json: what is committed. `checksums` are the CRC-32 of each column's committed bytes."""

    obs_dim: int
    action_dim: int
    task_names: list[str]
    num_rows: int = 0
    num_episodes: int = 0
    checksums: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_transitions(self) -> int:
        return self.num_rows - self.num_episodes

    def shape(self, column: str) -> tuple[int, ...]:
        """The committed shape of a column."""
        _, _, per, width = COLUMNS[column]
        count = self.num_rows if per == "row" else self.num_episodes
        return (count,) if width is None else (count, getattr(self, width))

    def entry_bytes(self, column: str) -> int:
        """Bytes of one row (or episode) of a column."""
        _, dtype, _, width = COLUMNS[column]
        return int(dtype[2:]) * (1 if width is None else getattr(self, width))

    def to_json(self) -> str:
        """Raises StoreError if the caller's `meta` holds something that JSON does not have."""
        fields = {"format": FORMAT, "version": VERSION, **self.__dict__, "num_transitions": self.num_transitions}
        try:
            return json.dumps(fields, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise StoreError(f"meta must hold only what JSON can: {error}") from error


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks meta.json and the sizes of the column files. Raises StoreError with the reason."""
    path = Path(path)
    try:
        fields = json.loads((path / META_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"no episode store at {path}: there is no {META_FILE}") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"episode store {path}: {META_FILE} cannot be read: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise StoreError(f"{path} is not an episode store: {META_FILE} does not say format {FORMAT!r}")
    if fields.get("version") != VERSION:
        raise StoreError(
            f"episode store {path} has version {fields.get('version')!r}; this release reads version {VERSION}"
        )
    header = _checked(path, fields)
    for name, (file, _, per, _) in COLUMNS.items():
        committed = header.shape(name)[0] * header.entry_bytes(name)
        try:
            size = (path / file).stat().st_size
        except OSError as error:
            raise StoreError(f"episode store {path}: {file} cannot be read: {error.strerror}") from error
        if size < committed:
            raise StoreError(
                f"episode store {path} is truncated: {file} has {size} bytes, but its {header.shape(name)[0]} "
                f"committed {per}s need {committed}; restore the file or collect the data again"
            )
    return header


def _checked(path: Path, fields: dict[str, Any]) -> Header:
    """The header from parsed JSON; every field has its type and range, or StoreError."""

    def refuse(reason: str) -> None:
        raise StoreError(f"episode store {path} is inconsistent: {reason}")

    for name, least in (("obs_dim", 1), ("action_dim", 1), ("num_rows", 0), ("num_episodes", 0)):
        value = fields.get(name)
        if type(value) is not int or value < least:
            refuse(f"{META_FILE} gives {name} = {value!r}, which must be an integer >= {least}")
    rows, episodes = fields["num_rows"], fields["num_episodes"]
    if rows < 2 * episodes or (rows > 0) != (episodes > 0):
        refuse(f"{episodes} episodes cannot have {rows} rows (an episode has at least 2)")
    names, sums, meta = fields.get("task_names"), fields.get("checksums"), fields.get("meta")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        refuse(f"{META_FILE} gives task_names = {names!r}, which must be a list of at least one name")
    if not isinstance(sums, dict) or set(sums) != set(COLUMNS) or not all(type(s) is int for s in sums.values()):
        refuse(f"{META_FILE} must give a checksum for each of {', '.join(COLUMNS)}")
    if not isinstance(meta, dict):
        refuse(f"{META_FILE} gives meta = {meta!r}, which must be an object")
    return Header(**{name: fields[name] for name in Header.__dataclass_fields__})


def sync_directory(path: Path) -> None:
    """Makes a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
