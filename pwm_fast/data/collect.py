"""Filling an episode store: from fixed policies, or from anything else that gives episodes in batches, for one task or
several. A batch depends on nothing but its number, so a stopped collection goes on as if nothing had happened."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from pwm_fast.data.layout import META_FILE
from pwm_fast.data.recording import Recording
from pwm_fast.envs.evaluation import Episode, evaluate
from pwm_fast.envs.registry import Task
from pwm_fast.progress import Interrupt, Progress
from pwm_fast.run_folder import versions

COMMIT_SECONDS = 10.0


def derived_seed(seed: int, *path: int) -> int:
    """A seed for one part of a run: independent for different paths, the same on every machine."""
    # the length goes in because SeedSequence takes (7,) and (7, 0) for the same
    return int(np.random.SeedSequence((len(path), seed, *path)).generate_state(1, np.uint32)[0])


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Small matrices gain nothing from more threads, those that wait would take the simulator's cores, and sums keep
    their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class RandomActions:
    """A policy that knows nothing: even rows draw uniformly, odd rows smoothly (correlated over about 10 steps)."""

    def __init__(self, action_dim: int, seed: int, correlation: float = 0.9):
        self._dim, self._correlation = action_dim, correlation
        self._random = np.random.Generator(np.random.Philox(seed))
        self._smooth: np.ndarray | None = None

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """obs [N, S] -> action [N, A] in [-1, 1]."""
        shape = (len(obs), self._dim)
        uniform, normal = self._random.uniform(-1.0, 1.0, shape), self._random.standard_normal(shape)
        rho = self._correlation
        self._smooth = normal if self._smooth is None else rho * self._smooth + np.sqrt(1 - rho * rho) * normal
        action = np.where(np.arange(len(obs))[:, None] % 2 == 0, uniform, np.tanh(1.5 * self._smooth))
        return action.astype(np.float32)


def noise_level(levels: Sequence[float], number: int) -> float:
    """The share of random actions in episode `number`: each level in turn, for a pair of episodes (one of a pair has
    jumping noise, the other one smooth noise)."""
    return float(levels[number // 2 % len(levels)])


def noise_phase(title: str, level: float) -> str:
    """A noise level's name in a store's account."""
    return "random actions" if level == 1.0 else f"{title}, noise {level:g}"


def check_noise_levels(levels: Sequence[float]) -> None:
    """Raises ValueError unless all levels are in [0, 1], and there are any."""
    if not levels or not all(0.0 <= level <= 1.0 for level in levels):
        raise ValueError(f"noise levels must be from 0 (no noise) to 1 (random actions), got {list(levels)}")


class NoisyPolicy:
    """A policy's deterministic actions plus normal noise of a standard deviation, clipped to [-1, 1]."""

    def __init__(self, policy: Any, noise: float, seed: int):
        self._policy, self._noise = policy, noise
        self._random = np.random.Generator(np.random.Philox(seed))

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        action = self._policy.act(obs)
        if self._noise:
            action = action + self._noise * self._random.standard_normal(action.shape).astype(np.float32)
        return np.clip(action, -1.0, 1.0)


def record_batches(
    recording: Recording,
    task: Task,
    make_policy: Callable[[int], Callable[[np.ndarray], np.ndarray]],
    phase: str,
    *,
    episodes: int,
    batch: int,
    seed: int,
    threads: int | None = None,
) -> Iterator[np.ndarray]:
    """Record `episodes` episodes of a policy (`policy_source`) in batches; yields each batch's returns."""
    source = policy_source(task, make_policy, phase, seed, threads)
    for first in range(0, episodes, batch):
        made = [episode for _, episode in source.batch(first, min(batch, episodes - first))]
        recording.add_all(made, phase)
        yield np.array([episode.reward.sum(dtype=np.float64) for episode in made])


def refuse_mismatch(out: Path, resume: bool) -> None:
    """Raises FileExistsError where a new store would meet another, FileNotFoundError where there is none to resume."""
    exists = (out / META_FILE).exists()
    if exists and not resume:
        raise FileExistsError(f"{out} holds data already; continue it by --resume, or choose another --out")
    if resume and not exists:
        raise FileNotFoundError(f"nothing to resume in {out}: leave out --resume to begin there")


Batch = Callable[[int, int], Iterable[tuple[str, Episode]]]
"""(first, count) -> the episodes first, ..., first + count - 1 of a collection, each with its phase."""


@dataclass(frozen=True)
class Source:
    """Episodes of one task, in batches that depend on nothing but their own episodes' numbers."""

    task: Task
    title: str
    batch: Batch


def policy_source(
    task: Task,
    make_policy: Callable[[int], Callable[[np.ndarray], np.ndarray]],
    title: str,
    seed: int,
    threads: int | None = None,
) -> Source:
    """Episodes of a policy; `make_policy(seed)` gives a fresh one for each batch."""

    def batch(first: int, count: int) -> Iterator[tuple[str, Episode]]:
        part, policy = derived_seed(seed, first), make_policy(derived_seed(seed, first, 1))
        results = evaluate(task, policy, count, part, record=True, threads=threads)
        return ((title, episode) for episode in results.episodes or [])

    return Source(task, title, batch)


def note_options(recording: Recording, options: dict[str, Any], resume: bool) -> None:
    """Write down what was asked for; raises ValueError where a resumed collection was begun with something else."""
    notes = recording.notes
    for name, value in options.items():
        if resume and notes.get(name) != value:
            path, before = recording.writer.path, notes.get(name)
            raise ValueError(f"{path} was begun with {name} {before!r}, got {value!r}; choose another --out")
    notes.update(command=shlex.join(["python", *sys.argv]), versions=versions(), **options)


def collect_episodes(
    out: str | os.PathLike[str],
    sources: Sequence[Source],
    *,
    options: dict[str, Any],
    episodes: int,
    batch: int = 64,
    max_transitions: int = 2_000_000,
    resume: bool = False,
    tasks: Sequence[Task] | None = None,
    console: Console | None = None,
) -> Recording:
    """Record `episodes` episodes of each source into a new store, or continue one; the closed recording tells what is
    in it.

    `options` says what was asked for: it is noted in the store, and a resumed run must be given the same. `tasks` are
    all that the store is for, where others than the sources' come later. Of the cap `max_transitions`, each task has
    an equal share, and what earlier ones left.
    Raises Interrupted after Ctrl-C with all whole batches committed, FileExistsError, FileNotFoundError, StoreError,
    and ValueError for other options than before.
    """
    out = Path(out)
    refuse_mismatch(out, resume)
    tasks = tasks or [source.task for source in sources]
    with (
        Recording(out, tasks, max_transitions=max_transitions, append=resume) as recording,
        Interrupt() as interrupt,
        one_torch_thread(),
    ):
        note_options(recording, options, resume)
        if resume:
            recording.adopt(sources[0].title)
        done = recording.notes.setdefault("episodes_done", {})
        for number, source in enumerate(sources):
            recording.max_transitions = max_transitions * (number + 1) // len(tasks)
            recording.full = False
            _record(recording, source, done, episodes, batch, interrupt, console)
            if interrupt:
                break
        recording.commit()
        total = sum(done.values())
        interrupt.raise_if_set(f"stopped; {total:,} of {episodes * len(sources):,} episodes are saved in {out}")
    return recording


def _record(
    recording: Recording,
    source: Source,
    done: dict[str, int],
    episodes: int,
    batch: int,
    interrupt: Interrupt,
    console: Console | None,
) -> None:
    """One source's episodes from where it was, committed now and then."""
    name, committed = source.task.name, time.monotonic()
    begun = done.setdefault(name, 0)
    with Progress(recording.phase_name(source.title, source.task), episodes, start=begun, console=console) as display:
        for first in range(begun, episodes, batch):
            count, returns = min(batch, episodes - first), []
            for phase, episode in source.batch(first, count):
                recording.add(episode, phase, task=source.task)
                returns.append(float(episode.reward.sum(dtype=np.float64)))
            done[name] = first + count
            display.update(first + count, real=float(np.mean(returns)))
            if time.monotonic() - committed > COMMIT_SECONDS:
                recording.commit()
                committed = time.monotonic()
            if interrupt or recording.full:
                return
