"""What goes into an episode store while it is filled: whole episodes out of rollouts, an even choice where there are
too many, and the store's notes on what it is a mixture of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pwm_fast.data import task_table
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter
from pwm_fast.data.layout import META_FILE, StoreError
from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import Episode
from pwm_fast.envs.registry import Task
from pwm_fast.state_files import atomic_file

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


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


def task_numbers(tasks: Sequence[Task]) -> tuple[list[str], dict[str, int]]:
    """A store's task names, and each task's number among them.

    One task is number 0. Several of MT30 or MT80 have their numbers in that set, as world models of the set know them;
    others are numbered as they come.
    """
    mine = [task.name for task in tasks]
    if len(tasks) > 1:
        for name in task_table.SETS:
            if all(name in task.ids for task in tasks):
                return registry.names(name), {task.name: task.ids[name] for task in tasks}
    return mine, {name: number for number, name in enumerate(mine)}


class Recording:
    """An episode store being filled, its cap, and its account of what went in (`mixture`, and the phase of every
    episode in `notes["order"]`).

    Several tasks share the store: observations and actions are padded with zeros to the widest. Raises ValueError for
    a task named twice, StoreError as EpisodeWriter does. Use as a context manager: whatever is not committed is
    discarded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        task: Task | Sequence[Task],
        *,
        max_transitions: int,
        reserved: int = 0,
        append: bool = False,
    ):
        if max_transitions < 1:
            raise ValueError(f"max_transitions must be >= 1, got {max_transitions}")
        self.tasks = [task] if isinstance(task, Task) else list(task)
        names, self._numbers = task_numbers(self.tasks)
        if len(self._numbers) < len(self.tasks):
            raise ValueError(f"tasks must differ, got {', '.join(task.name for task in self.tasks)}")
        self._obs_dim, self._action_dim = (max(getattr(t, n) for t in self.tasks) for n in ("obs_dim", "action_dim"))
        self.writer = EpisodeWriter(path, self._obs_dim, self._action_dim, task_names=names, append=append)
        self.max_transitions = max_transitions
        self.thinning = EvenThinning(max(max_transitions - reserved, 0))
        self.full = False  # an episode has met the cap
        self._returns: dict[str, list[float]] = {}
        self._lengths: dict[str, list[int]] = {}

    @property
    def notes(self) -> dict[str, Any]:
        """What the store's meta says under "collect"; saved by the next commit."""
        return self.writer.meta.setdefault("collect", {})

    def add(self, episode: Episode, phase: str, progress: float | None = None, task: Task | None = None) -> bool:
        """Add an episode that belongs to a phase of the run. False where the cap keeps it out.

        With `progress` it is one of those thinned evenly; without, it goes in as long as there is room. `task` is
        needed where the store holds several.
        """
        task = task or self.tasks[0]
        phase = self.phase_name(phase, task)
        length = len(episode.reward)
        if progress is not None:
            if not self.thinning.keep(length, progress):
                return False
        elif self.writer.num_transitions + length > self.max_transitions:
            self.full = True
            return False
        else:
            self.thinning.kept += length  # leaves less room for those
        obs, action = task_table.fitted(episode.obs, self._obs_dim), task_table.fitted(episode.action, self._action_dim)
        self.writer.add(obs, action, episode.reward, episode.terminated, self._numbers[task.name])
        self._note_order(phase)
        self._returns.setdefault(phase, []).append(float(episode.reward.sum(dtype=np.float64)))
        self._lengths.setdefault(phase, []).append(length)
        return True

    def phase_name(self, phase: str, task: Task) -> str:
        """A phase's name in the account: with its task's, where the store holds several."""
        return phase if len(self.tasks) == 1 else f"{task.name}: {phase}"

    def _note_order(self, phase: str) -> None:
        """`notes["order"]`: runs [phase, episodes] that list the phases of the store's episodes from the first on."""
        order = self.notes.setdefault("order", [])
        if order and order[-1][0] == phase:
            order[-1][1] += 1
        else:
            order.append([phase, 1])

    def add_all(self, episodes: Iterable[Episode], phase: str, progress: float | None = None) -> int:
        """How many of the episodes went in."""
        return sum(self.add(episode, phase, progress) for episode in episodes)

    def adopt(self, phase: str) -> np.ndarray:
        """Count the episodes that are in the store already, by its notes or else as those of `phase`; their returns."""
        store = EpisodeStore.open(self.writer.path)
        returns, lengths = store.statistics()["returns"], store.lengths
        self._returns, self._lengths, start = {}, {}, 0
        for name, count in self.notes.get("order", [[phase, store.num_episodes]]):
            part = slice(start, start + count)
            start += count
            self._returns.setdefault(name, []).extend(returns[part].tolist())
            self._lengths.setdefault(name, []).extend(lengths[part].tolist())
        self.thinning.kept += store.num_transitions
        return returns

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
