"""Filling an episode store from policies: whole episodes out of rollouts, an even choice where there are too many, and
the store's notes on what it is a mixture of."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter
from pwm_fast.data.layout import META_FILE, StoreError
from pwm_fast.envs.evaluation import Episode, evaluate
from pwm_fast.envs.registry import Task
from pwm_fast.progress import Interrupt, Progress
from pwm_fast.run_folder import versions
from pwm_fast.state_files import atomic_file

COMMIT_SECONDS = 10.0
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


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


class EpisodeAssembler:
    """Cuts the steps of N environments, which come in windows, into whole episodes.

    `shown_action`: how many entries at the end of an observation show the last action. A differentiable environment
    leaves them 0; here they get the action that was applied, as a plain environment shows it (0 at an episode's start).
    """

    COLUMNS = ("obs", "action", "reward", "terminated", "truncated", "final_obs")  # of `add`, in order

    def __init__(self, num_envs: int, shown_action: int = 0):
        self.shown_action = shown_action
        self._pieces: list[list[Episode]] = [[] for _ in range(num_envs)]

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        final_obs: np.ndarray,
    ) -> list[Episode]:
        """Take H steps, all [H, N, ...] (`final_obs` is before any reset); the episodes that ended, in their order."""
        ended: list[tuple[int, int, Episode]] = []
        for env in range(obs.shape[1]):
            start = 0
            for end in [*np.flatnonzero(terminated[:, env] | truncated[:, env]), None]:
                stop = len(obs) if end is None else int(end) + 1
                if stop > start:
                    steps = slice(start, stop)
                    rows = np.concatenate([obs[steps, env], final_obs[stop - 1, env][None]])
                    applied = action[steps, env].clip(-1.0, 1.0)
                    fell = end is not None and bool(terminated[end, env])
                    self._pieces[env].append(Episode(rows, applied, reward[steps, env].copy(), fell))
                if end is not None:
                    ended.append((int(end), env, self._joined(env)))
                start = stop
        return [episode for _, _, episode in sorted(ended, key=lambda item: item[:2])]

    def _joined(self, env: int) -> Episode:
        pieces, self._pieces[env] = self._pieces[env], []
        obs = np.concatenate([*(piece.obs[:-1] for piece in pieces), pieces[-1].obs[-1:]])
        action = np.concatenate([piece.action for piece in pieces])
        if self.shown_action:
            obs[0, -self.shown_action :] = 0.0
            obs[1:, -self.shown_action :] = action[:, -self.shown_action :]
        return Episode(obs, action, np.concatenate([piece.reward for piece in pieces]), pieces[-1].terminated)

    def flush(self) -> list[Episode]:
        """The episodes still under way, cut off where they are; they end without termination."""
        return [self._joined(env) for env, pieces in enumerate(self._pieces) if pieces]

    def state_dict(self) -> dict[str, Any]:
        """Everything under way, and nothing else."""
        whole = [(env, self._joined(env)) for env, pieces in enumerate(self._pieces) if pieces]
        for env, episode in whole:
            self._pieces[env] = [episode]
        return {"envs": [env for env, _ in whole]} | {
            name: [getattr(episode, name) for _, episode in whole] for name in ("obs", "action", "reward")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for pieces in self._pieces:
            pieces.clear()
        for env, obs, action, reward in zip(*(state[name] for name in ("envs", "obs", "action", "reward"))):
            self._pieces[env] = [Episode(obs, action, reward, False)]


class EvenThinning:
    """Chooses episodes so that those kept fill `capacity` transitions and lie evenly over the run.

    The share to keep follows from what came so far and the run's progress; a running balance turns it into decisions
    that depend on no episode's own length.
    """

    def __init__(self, capacity: int):
        self.capacity, self.kept, self.offered, self._balance = capacity, 0, 0, 0.0

    def keep(self, length: int, progress: float) -> bool:
        """Whether to keep an episode of `length` transitions that ended at `progress` in [0, 1]."""
        self.offered += length
        still_to_come = self.offered * (1.0 - progress) / max(progress, 1e-6)
        share = min((self.capacity - self.kept) / (still_to_come + length), 1.0)
        keep = self._balance >= 0.0 and self.kept + length <= self.capacity
        self._balance += share * length - keep * length
        self.kept += keep * length
        return keep

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "offered": self.offered, "balance": self._balance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.offered, self._balance = state["kept"], state["offered"], state["balance"]


class Recording:
    """An episode store being filled, its cap, and its account of what went in (`mixture`).

    Raises StoreError as EpisodeWriter does. Use as a context manager: whatever is not committed is discarded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        task: Task,
        *,
        max_transitions: int,
        reserved: int = 0,
        append: bool = False,
    ):
        if max_transitions < 1:
            raise ValueError(f"max_transitions must be >= 1, got {max_transitions}")
        self.writer = EpisodeWriter(path, task.obs_dim, task.action_dim, task_names=[task.name], append=append)
        self.max_transitions = max_transitions
        self.thinning = EvenThinning(max(max_transitions - reserved, 0))
        self.full = False  # an episode has met the cap
        self._returns: dict[str, list[float]] = {}
        self._lengths: dict[str, list[int]] = {}

    @property
    def notes(self) -> dict[str, Any]:
        """What the store's meta says under "collect"; saved by the next commit."""
        return self.writer.meta.setdefault("collect", {})

    def add(self, episode: Episode, phase: str, progress: float | None = None) -> bool:
        """Add an episode that belongs to a phase of the run. False where the cap keeps it out.

        With `progress` it is one of those thinned evenly; without, it goes in as long as there is room.
        """
        length = len(episode.reward)
        if progress is not None:
            if not self.thinning.keep(length, progress):
                return False
        elif self.writer.num_transitions + length > self.max_transitions:
            self.full = True
            return False
        else:
            self.thinning.kept += length  # leaves less room for those
        self.writer.add(episode.obs, episode.action, episode.reward, episode.terminated)
        self._returns.setdefault(phase, []).append(float(episode.reward.sum(dtype=np.float64)))
        self._lengths.setdefault(phase, []).append(length)
        return True

    def add_all(self, episodes: Iterable[Episode], phase: str, progress: float | None = None) -> int:
        """How many of the episodes went in."""
        return sum(self.add(episode, phase, progress) for episode in episodes)

    def adopt(self, phase: str) -> np.ndarray:
        """Count the episodes that are in the store already as those of a phase; their returns."""
        store = EpisodeStore.open(self.writer.path)
        statistics = store.statistics()
        self._returns[phase], self._lengths[phase] = statistics["returns"].tolist(), store.lengths.tolist()
        self.thinning.kept += store.num_transitions
        return statistics["returns"]

    def mixture(self) -> list[dict[str, Any]]:
        """A row per phase: episodes, transitions, mean length, mean return and its quantiles."""
        return [
            {
                "phase": phase,
                "episodes": len(returns),
                "transitions": sum(self._lengths[phase]),
                "length_mean": float(np.mean(self._lengths[phase])),
                "return_mean": float(np.mean(returns)),
                "return_quantiles": {f"{q:g}": float(np.quantile(returns, q)) for q in QUANTILES},
            }
            for phase, returns in self._returns.items()
        ]

    def commit(self) -> None:
        """Makes all of it durable, the account included."""
        self.notes["mixture"] = self.mixture()
        self.writer.commit()

    def state_dict(self) -> dict[str, Any]:
        """The state as of the last commit; call it right after one."""
        return {
            "meta": (self.writer.path / META_FILE).read_text(encoding="utf-8"),
            "thinning": self.thinning.state_dict(),
            "returns": {phase: np.asarray(values) for phase, values in self._returns.items()},
            "lengths": {phase: np.asarray(values) for phase, values in self._lengths.items()},
        }

    @staticmethod
    def rewind(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
        """Take a store that nobody is writing back to where `state_dict` was taken: later episodes are forgotten.

        A store only ever grows, so its header alone says how much of it counts.
        """
        header = os.path.join(path, META_FILE)
        if not os.path.exists(header):
            raise StoreError(f"no episode store at {path}: there is no {META_FILE}")
        with atomic_file(header) as file:
            file.write(state["meta"].encode())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.thinning.load_state_dict(state["thinning"])
        self._returns = {phase: values.tolist() for phase, values in state["returns"].items()}
        self._lengths = {phase: values.tolist() for phase, values in state["lengths"].items()}

    def close(self) -> None:
        self.writer.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    first: int = 0,
) -> Iterable[tuple[int, np.ndarray]]:
    """Record `episodes` episodes in batches of `batch` environments; yields (episodes done, the batch's returns).

    `make_policy(seed)` gives a fresh policy for each batch. Batch k depends on (seed, k) only: `first` skips the
    episodes of earlier batches, so that a run continues where it was.
    """
    for start in range(first, episodes, batch):
        count = min(batch, episodes - start)
        part = derived_seed(seed, start)
        results = evaluate(task, make_policy(derived_seed(seed, start, 1)), count, part, record=True, threads=threads)
        recording.add_all(results.episodes or [], phase)
        yield start + count, results.returns


def refuse_mismatch(out: Path, resume: bool) -> None:
    """Raises FileExistsError where a new store would meet another, FileNotFoundError where there is none to resume."""
    exists = (out / META_FILE).exists()
    if exists and not resume:
        raise FileExistsError(f"{out} holds data already; continue it by --resume, or choose another --out")
    if resume and not exists:
        raise FileNotFoundError(f"nothing to resume in {out}: leave out --resume to begin there")


def collect_policy(
    out: str | os.PathLike[str],
    task: Task,
    make_policy: Callable[[int], Callable[[np.ndarray], np.ndarray]],
    *,
    title: str,
    options: dict[str, Any],
    episodes: int,
    batch: int = 64,
    seed: int = 0,
    threads: int | None = None,
    max_transitions: int = 2_000_000,
    resume: bool = False,
    console: Console | None = None,
) -> Recording:
    """Record a fixed policy into a new store, or continue one; the closed recording tells what is in it.

    `options` says what was asked for: it is noted in the store, and a resumed run must be given the same.
    Raises Interrupted after Ctrl-C with all whole batches committed, FileExistsError, FileNotFoundError, StoreError,
    and ValueError for other options than before.
    """
    out = Path(out)
    refuse_mismatch(out, resume)
    with (
        Recording(out, task, max_transitions=max_transitions, append=resume) as recording,
        Interrupt() as interrupt,
        one_torch_thread(),
    ):
        notes = recording.notes
        for name, value in options.items():
            before = notes.get(name)
            if resume and before != value:
                raise ValueError(f"{out} was begun with {name} {before!r}, got {value!r}; choose another --out")
        if resume:
            recording.adopt(title)
        notes.update(command=shlex.join(["python", *sys.argv]), versions=versions(), **options)
        first, committed = notes.setdefault("episodes_done", 0), time.monotonic()
        budget = {"episodes": episodes, "batch": batch, "seed": seed, "threads": threads, "first": first}
        with Progress(title, episodes, start=first, console=console) as display:
            for notes["episodes_done"], returns in record_batches(recording, task, make_policy, title, **budget):
                display.update(notes["episodes_done"], real=float(returns.mean()))
                if time.monotonic() - committed > COMMIT_SECONDS:
                    recording.commit()
                    committed = time.monotonic()
                if interrupt or recording.full:
                    break
        recording.commit()
        done = notes["episodes_done"]
        interrupt.raise_if_set(f"stopped; {done:,} of {episodes:,} episodes are saved in {out}")
    return recording
