"""Real returns of a policy: one episode per environment, all environments at once, deterministic in the seed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pwm_fast.envs import registry

Policy = Callable[[np.ndarray], np.ndarray]  # obs [N, S] -> action [N, A]


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


def evaluate(
    task: str | registry.Task,
    policy_fn: Policy,
    episodes: int,
    seed: int,
    *,
    record: bool = False,
    threads: int | None = None,
    **options: Any,
) -> EpisodeResults:
    """Run ``episodes`` episodes of ``policy_fn`` in as many environments; ``options`` go to the task's ``make_vector``.

    Raises UnknownTask, and ValueError for ``episodes`` < 1 or a policy whose actions are non-finite or wrongly shaped.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be >= 1, got {episodes}")
    row = registry.get(task) if isinstance(task, str) else task
    env = row.make_vector(episodes, seed=seed, threads=threads, **options)
    try:
        return _run(env, policy_fn, episodes, seed, row.episode_length, record)
    finally:
        env.close()


def _run(env: Any, policy_fn: Policy, episodes: int, seed: int, episode_length: int, record: bool) -> EpisodeResults:
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    running, fell = np.ones(episodes, bool), np.zeros(episodes, bool)
    successes: np.ndarray | None = None
    obs, _ = env.reset(seed=seed)
    history: list[tuple] = []
    poses = [env.joint_q[0].copy()] if record and hasattr(env, "joint_q") else []
    for _ in range(episode_length):
        action = np.asarray(policy_fn(obs), np.float32)
        next_obs, reward, terminated, truncated, info = env.step(action)
        if record:
            history.append((obs, action.clip(-1.0, 1.0), reward, next_obs))
            if poses and running[0]:
                poses.append(env.joint_q[0].copy())
        returns += np.where(running, reward, 0.0)
        lengths += running
        fell |= running & terminated
        if "success" in info:
            successes = np.where(running, info["success"], False if successes is None else successes).astype(bool)
        running &= ~(terminated | truncated)
        obs = next_obs
        if not running.any():
            break
    if not record:
        return EpisodeResults(returns, lengths, successes=successes)
    seen = np.stack([*(step[0] for step in history), history[-1][3]], 1)  # [N, T + 1, S]
    acted, earned = (np.stack([step[column] for step in history], 1) for column in (1, 2))  # [N, T, ...]
    whole = [
        Episode(seen[e, : n + 1].copy(), acted[e, :n].copy(), earned[e, :n].copy(), bool(fell[e]))
        for e, n in enumerate(lengths)
    ]
    return EpisodeResults(returns, lengths, whole, np.stack(poses) if poses else None, successes)
