"""Real returns of policies: one episode per environment, a policy's environments at once, deterministic in the seed."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pwm_fast.envs import registry
from pwm_fast.envs.episode_results import Counting, Episode, EpisodeResults, joined

__all__ = ["Episode", "EpisodeResults", "Policy", "evaluate", "evaluate_population"]

Policy = Callable[[np.ndarray], np.ndarray]  # obs [N, S] -> action [N, A]


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
    _at_least_one("episodes", episodes)
    row = registry.get(task) if isinstance(task, str) else task
    env = row.make_vector(episodes, seed=seed, threads=threads, **options)
    try:
        return _run(env, policy_fn, seed, row.episode_length, record)
    finally:
        env.close()


def _run(env: Any, policy_fn: Policy, seed: int, episode_length: int, record: bool) -> EpisodeResults:
    counting = Counting(env.reset(seed=seed)[0], record)
    poses = [env.joint_q[0].copy()] if record and hasattr(env, "joint_q") else []
    for _ in range(episode_length):
        action = np.asarray(policy_fn(counting.obs), np.float32)
        obs, reward, terminated, truncated, info = env.step(action)
        if poses and counting.running[0]:
            poses.append(env.joint_q[0].copy())
        counting.step(action, obs, reward, terminated, truncated, info.get("success"))
        if not counting.running.any():
            break
    return counting.results(np.stack(poses) if poses else None)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")


GROUP = 16  # environments of a task in one process: more would bring little, and each takes up to 20 MB


@dataclass(frozen=True)
class _Group:
    """Episodes of one policy that run at once in a worker."""

    policy: int
    task: registry.Task
    num_envs: int
    seed: int | list[int]


def _groups(policy: int, task: registry.Task, episodes: int, seed: int) -> list[_Group]:
    if task.suite == "dflex":  # one simulation holds them all, and draws for the whole batch
        return [_Group(policy, task, episodes, seed)]
    from pwm_fast.envs.suite_vector import episode_seeds

    seeds = episode_seeds(seed, episodes)
    parts = [seeds[first : first + GROUP] for first in range(0, episodes, GROUP)]
    return [_Group(policy, task, len(part), part) for part in parts]


def evaluate_population(
    tasks: Sequence[str | registry.Task],
    policy_fns: Sequence[Policy],
    episodes: int,
    seed: int,
    *,
    record: bool = False,
    processes: int | None = None,
) -> list[EpisodeResults]:
    """``evaluate`` for several policies, each on its own task (of any suite), their environments in worker processes.

    The policies run in this process, each on the observations [n, S] of up to 16 episodes (dflex: of all), so they need
    not be sent anywhere; what they compute is up to this process's threads and device. ``processes`` (default: one per
    core, and one more that works while another waits for its policy) take up to 1 GB of memory each. Results do not
    depend on their number, and for up to 16 episodes they are those of ``evaluate`` (``joint_q`` apart, which is not
    recorded). They are spawned: a script needs the usual ``if __name__ == "__main__":``.

    Raises UnknownTask; ValueError as ``evaluate`` does, beginning with the task's name, or for lists of unequal length;
    RuntimeError where a process was killed.
    """
    if len(tasks) != len(policy_fns):
        raise ValueError(f"each task needs its policy: got {len(tasks)} tasks and {len(policy_fns)} policies")
    _at_least_one("episodes", episodes)
    if processes is not None:
        _at_least_one("processes", processes)
    rows = [registry.get(task) if isinstance(task, str) else task for task in tasks]
    groups = [group for number, row in enumerate(rows) for group in _groups(number, row, episodes, seed)]
    results = _in_workers(groups, policy_fns, record, processes) if groups else []
    return [joined([r for g, r in zip(groups, results) if g.policy == number]) for number in range(len(rows))]


def _in_workers(
    groups: list[_Group], policy_fns: Sequence[Policy], record: bool, processes: int | None
) -> list[EpisodeResults]:
    from pwm_fast.envs.processes import Workers, usable_cores

    count = min(processes or usable_cores() + 1, len(groups))
    largest = [max(sizes) for sizes in zip(*((g.num_envs, g.task.obs_dim, g.task.action_dim) for g in groups))]
    # long episodes first, so that the processes end together; tasks that share a model stay side by side
    waiting = deque(sorted(range(len(groups)), key=lambda number: -groups[number].task.episode_length))
    results: dict[int, EpisodeResults] = {}
    with Workers(count, *largest) as workers:
        busy: dict[int, tuple[int, Counting | None, Any]] = {}  # worker -> its group, its episodes, their last action

        def begin(worker: int) -> None:
            number = waiting.popleft()
            workers.begin(worker, groups[number].task, groups[number].num_envs, groups[number].seed)
            busy[worker] = (number, None, None)

        for worker in range(count):
            begin(worker)
        while busy:
            for worker in workers.ready(list(busy)):
                number, counting, action = busy.pop(worker)
                group = groups[number]
                if counting is None:
                    counting = Counting(workers.first_obs(worker), record)
                else:
                    obs, told = workers.stepped(worker)
                    counting.step(action, obs, **told)
                if counting.running.any():
                    action = _acted(policy_fns[group.policy], counting.obs, group)
                    workers.act(worker, action)
                    busy[worker] = (number, counting, action)
                    continue
                results[number] = counting.results()
                if waiting:
                    begin(worker)
    return [results[number] for number in range(len(groups))]


def _acted(policy_fn: Policy, obs: np.ndarray, group: _Group) -> np.ndarray:
    from pwm_fast.envs.suite_vector import check_actions

    try:
        return check_actions(policy_fn(obs), (group.num_envs, group.task.action_dim))
    except ValueError as error:
        raise ValueError(f"{group.task.name}: {error}") from error
