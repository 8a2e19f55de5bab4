"""What episodes gave: counted while they run, one per environment, and kept as returns, successes and recordings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Episode:
    """One whole episode as the store takes it: obs [T + 1, S], action [T, A], reward [T], and whether it ended in a
    fall."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: bool


@dataclass(frozen=True)
class EpisodeResults:
    """returns [n], lengths [n]; with ``record``: the episodes, and joint_q [T + 1, nq] of environment 0 for
    pictures (dflex). successes [n]: whether an episode's last step was one of success, where the task tells it."""

    returns: np.ndarray
    lengths: np.ndarray
    episodes: list[Episode] | None = None
    joint_q: np.ndarray | None = None
    successes: np.ndarray | None = None

    @property
    def mean(self) -> float:
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        return float(self.returns.std())


class Counting:
    """The first episode of each of N environments, while they run; whatever they do after it is ignored."""

    def __init__(self, obs: np.ndarray, record: bool):
        self.obs, self.running = obs, np.ones(len(obs), bool)
        self._returns, self._lengths = np.zeros(len(obs)), np.zeros(len(obs), np.int64)
        self._fell = np.zeros(len(obs), bool)
        self._successes: np.ndarray | None = None
        self._history: list[tuple] | None = [] if record else None

    def step(
        self,
        action: np.ndarray,
        obs: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        success: np.ndarray | None = None,
    ) -> None:
        """Take what a step gave: all [N, ...], `obs` after it."""
        running = self.running
        if self._history is not None:
            self._history.append((self.obs, action.clip(-1.0, 1.0), reward, obs))
        self._returns += np.where(running, reward, 0.0)
        self._lengths += running
        self._fell |= running & terminated
        if success is not None:
            before = False if self._successes is None else self._successes
            self._successes = np.where(running, success, before).astype(bool)
        self.running = running & ~(terminated | truncated)
        self.obs = obs

    def results(self, joint_q: np.ndarray | None = None) -> EpisodeResults:
        """What the steps so far amount to."""
        whole = None
        if self._history is not None:
            seen = np.stack([*(step[0] for step in self._history), self._history[-1][3]], 1)  # [N, T + 1, S]
            acted, earned = (np.stack([step[column] for step in self._history], 1) for column in (1, 2))  # [N, T, ...]
            whole = [
                Episode(seen[e, : n + 1].copy(), acted[e, :n].copy(), earned[e, :n].copy(), bool(self._fell[e]))
                for e, n in enumerate(self._lengths)
            ]
        return EpisodeResults(self._returns, self._lengths, whole, joint_q, self._successes)


def joined(parts: Sequence[EpisodeResults]) -> EpisodeResults:
    """The results of several groups of episodes of one task as one."""
    if len(parts) == 1:
        return parts[0]
    episodes = None if parts[0].episodes is None else [episode for part in parts for episode in part.episodes or ()]
    told = [part.successes for part in parts if part.successes is not None]
    returns, lengths = (np.concatenate([getattr(part, name) for part in parts]) for name in ("returns", "lengths"))
    return EpisodeResults(returns, lengths, episodes, None, np.concatenate(told) if told else None)
