"""Other programs' episodes into our store: one unit at a time, so that memory holds one and the file stays mapped.

Every commit notes in the store's meta how far it came, in the same atomic step as the episodes, so a conversion that
was stopped or killed at any moment goes on exactly. Episodes with NaN or infinite numbers are left out and counted.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pwm_fast.data.foreign_episodes import EpisodeSource, ForeignEpisode, find_columns
from pwm_fast.data.layout import META_FILE, StoreError, read_header
from pwm_fast.data.minari_files import MinariData, is_minari
from pwm_fast.data.npz_files import NpzEpisodes
from pwm_fast.data.pwm_files import DflexData
from pwm_fast.data.stored_zip import ForeignFileError
from pwm_fast.data.task_table import select
from pwm_fast.data.tdmpc2_files import COLUMNS as CHUNK_COLUMNS
from pwm_fast.data.tdmpc2_files import Chunk
from pwm_fast.data.torch_files import open_torch_file
from pwm_fast.data.writer import EpisodeWriter
from pwm_fast.progress import Interrupt, Progress

COMMIT_SECONDS = 10.0
TORCH_SUFFIXES = (".pt", ".pth")
Opener = Callable[[], EpisodeSource]


def episode_sources(source: str | os.PathLike[str], task: str | None = None, verify: bool = True) -> list[Opener]:
    """How to open what `source` names: a file, a folder of files (chunk_0.pt, chunk_1.pt, ...), or a Minari data set.

    Raises FileNotFoundError, and ForeignFileError for a folder without such files.
    """
    if is_minari(source):
        return [lambda: MinariData(source, task)]
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if (path / META_FILE).is_file():
        raise ForeignFileError(f"{path} is an episode store already")
    files = [path]
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in (*TORCH_SUFFIXES, ".npz")]
        files.sort(key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)])
        if not files:
            raise ForeignFileError(f"{path} holds neither .pt nor .npz files, nor a Minari data set")
    return [lambda file=file: open_episodes(file, task, verify) for file in files]  # type: ignore[misc]


def open_episodes(path: Path, task: str | None = None, verify: bool = True) -> EpisodeSource:
    """The episodes in a file, by what it holds. Raises FileNotFoundError and ForeignFileError."""
    if path.suffix == ".npz":
        return NpzEpisodes(path, task, verify)
    tree = open_torch_file(path, verify)
    kind = Chunk if find_columns(tree, CHUNK_COLUMNS) is not None and task is None else DflexData
    if find_columns(tree, CHUNK_COLUMNS[:3]) is None:
        raise ForeignFileError(f"{path} holds no episodes: there is no table with columns obs, action and reward")
    return Chunk(path, verify, tree) if kind is Chunk else DflexData(path, task, verify, tree)


def convert_episodes(
    openers: Sequence[Opener],
    destination: str | os.PathLike[str],
    *,
    tasks: list[str] | None = None,
    resume: bool = False,
    notes: dict[str, Any] | None = None,
    commit_seconds: float = COMMIT_SECONDS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a new store, or go on with one; returns its account (`meta["convert"]`): sources, tasks, what was left out.

    `tasks` selects by name, set or suite (`task_table.select`); task numbers stay those of the source, as a world
    model trained on it has them. `notes` go into the account.
    Raises Interrupted after Ctrl-C with everything committed, FileExistsError, FileNotFoundError, StoreError, and
    ValueError for damaged sources, sources that do not belong together, or other options than before.
    """
    destination = Path(destination)
    first = openers[0]()
    names, dims = first.task_names, (first.obs_dim, first.action_dim)
    listed: list[dict[str, Any]] = []
    for i, opener in enumerate(openers):  # all of them, so that a bad one is not found hours later
        source = first if i == 0 else opener()
        if (source.obs_dim, source.action_dim) != dims:
            raise ForeignFileError(
                f"{source.name} has {source.obs_dim} observations and {source.action_dim} actions, {first.name} has "
                f"{dims[0]} and {dims[1]}: they belong into different stores"
            )
        names = max(names, source.task_names, key=len)
        listed.append({"name": source.name, "size": source.size, "units": source.num_units})
    total = sum(entry["units"] for entry in listed)
    options = {"sources": listed, "tasks": tasks}
    chosen = None if tasks is None else frozenset(select(tasks, names))
    _refuse(destination, resume, options)
    with EpisodeWriter(destination, *dims, task_names=names, append=resume) as writer, Interrupt() as interrupt:
        account = writer.meta.setdefault("convert", {**options, "done": [0, 0], "left_out": 0, "by_task": {}})
        account.update(notes or {})
        begun = sum(entry["units"] for entry in listed[: account["done"][0]]) + account["done"][1]
        committed = time.monotonic()
        with Progress(f"converting {first.name}", total, start=begun, console=console) as progress:
            try:
                while account["done"][0] < len(openers) and not interrupt:
                    number, unit = account["done"]
                    before = sum(entry["units"] for entry in listed[:number])
                    source = first if number == 0 else openers[number]()
                    for unit, episodes in source.episodes(unit, chosen):  # noqa: B020
                        for episode in episodes:
                            _add(writer, account, names[episode.task], episode)
                        account["done"] = [number, unit]
                        progress.update(before + unit, transitions=writer.num_transitions)
                        if time.monotonic() - committed >= commit_seconds:
                            writer.commit()
                            committed = time.monotonic()
                        if interrupt:
                            break
                    else:
                        account["done"] = [number + 1, 0]
            except ForeignFileError:
                writer.commit()  # what came before the damage is good
                raise
        writer.commit()
        interrupt.raise_if_set(f"stopped; {writer.num_episodes:,} episodes are saved in {destination}")
        if writer.num_episodes == 0:
            left = f"{account['left_out']} held NaN or infinite numbers" if account["left_out"] else "none was found"
            raise ForeignFileError(f"{first.name} gave no episode for {destination}: {left}")
        return account


def _add(writer: EpisodeWriter, account: dict[str, Any], name: str, episode: ForeignEpisode) -> None:
    if not all(np.isfinite(array).all() for array in episode[:3]):
        account["left_out"] += 1
        return
    writer.add(*episode)
    gain, length = float(np.sum(episode.reward, dtype=np.float64)), len(episode.reward)
    row = account["by_task"].setdefault(name, {"episodes": 0, "transitions": 0, "return_sum": 0.0, "return_best": gain})
    row["episodes"] += 1
    row["transitions"] += length
    row["return_sum"] += gain
    row["return_best"] = max(row["return_best"], gain)


def _refuse(destination: Path, resume: bool, options: dict[str, Any]) -> None:
    """Errors for a destination that does not fit the wish to begin or to go on."""
    if not resume:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise FileExistsError(f"{destination} exists already; go on with it by --resume, or choose another DST")
        return
    if not (destination / META_FILE).exists():
        raise FileNotFoundError(f"nothing to resume in {destination}: leave out --resume to begin there")
    before = read_header(destination).meta.get("convert")
    if not isinstance(before, dict):
        raise StoreError(f"{destination} was not made by convert; choose another DST")
    for name, value in options.items():
        if before.get(name) != value:
            raise ValueError(f"{destination} was begun with {name} {before.get(name)}, got {value}; choose another DST")
