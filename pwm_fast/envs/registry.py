"""The table of tasks: names, sizes and the returns that results are compared with. Imports neither torch nor Warp."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pwm_fast.errors import nearest

_ASSETS = Path(__file__).parent.parent / "assets"
_ENVIRONMENTS = {  # one environment of a suite
    "dflex": "pwm_fast.envs.vector:DflexEnv",
    "dm_control": "pwm_fast.envs.dm_control:DmControlEnv",
    "metaworld": "pwm_fast.envs.meta_world:MetaWorldEnv",
    "gymnasium": "pwm_fast.envs.gymnasium_tasks:make_env",
}


class UnknownTask(ValueError):
    """A task or set name that is in no table; the message suggests the nearest one."""


@dataclass(frozen=True)
class Task:
    """A row: entries of an observation and an action, agent steps of an episode, and how often each applies its action.

    ``paper_return``: PWM's return on the task (Georgiev et al. 2024; of MT80 where the task is in MT80), where the
    paper gives one; ``random_return``: mean of uniform actions in our environments (dflex: 256 episodes, others 16).
    ``ids``: the task's number in the multi-task sets that it belongs to. ``random_score``: as ``score`` counts.
    """

    name: str
    suite: str
    title: str
    obs_dim: int
    action_dim: int
    episode_length: int
    paper_return: float | None
    random_return: float | None
    action_repeat: int = 1
    ids: dict[str, int] = field(default_factory=dict, hash=False)
    random_score: float | None = None

    @property
    def gym_id(self) -> str:
        if self.suite == "gymnasium":
            return self.name.removeprefix("gym:")
        return f"pwm_fast/{self.title.replace(' ', '')}-v0"

    def make(self, render_mode: str | None = None, **options: Any) -> Any:
        """One Gymnasium environment of this task: obs float32 [S], actions in [-1, 1]; no autoreset."""
        module, name = _ENVIRONMENTS[self.suite].split(":")
        which = self.name if self.suite == "dflex" else self
        return getattr(import_module(module), name)(which, render_mode=render_mode, **options)

    def make_vector(self, num_envs: int, seed: int = 0, threads: int | None = None, **options: Any) -> Any:
        """A Gymnasium VectorEnv of this task; ``seed`` is used by its first ``reset()`` without one.

        Raises MissingExtra (an ImportError) where a package of the suite is not installed.
        """
        if self.suite == "dflex":
            from pwm_fast.envs.vector import DflexVectorEnv

            return DflexVectorEnv(self.name, num_envs, seed=seed, threads=threads, **options)
        from pwm_fast.envs.suite_vector import SuiteVectorEnv

        return SuiteVectorEnv(self, num_envs, seed=seed, threads=threads, **options)

    def score(self, results: Any) -> float | None:
        """The normalised score of ``EpisodeResults``, in percent: return / 10 (dm_control), or the share of episodes
        that ended in success (Meta-World). None for suites that have no such scale."""
        if self.suite == "dm_control":
            return results.mean / 10
        return 100 * float(results.successes.mean()) if self.suite == "metaworld" else None


def _multi_task() -> Iterator[Task]:
    """The 80 tasks of TD-MPC2's data (``assets/tdmpc2_tasks.csv``), of which the first 30 are MT30."""
    with open(_ASSETS / "published_scores.csv", newline="") as file:
        published = [row for row in csv.DictReader(file) if row["method"] == "PWM"]
    paper = {row["task"]: float(row["return"]) for row in published}  # MT80's rows are last, so theirs stay
    with open(_ASSETS / "tdmpc2_tasks.csv", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            name = row["name"]
            ids = {"mt30": number, "mt80": number} if number < 30 else {"mt80": number}
            obs_dim, action_dim, steps = (int(row[key]) for key in ("obs_dim", "action_dim", "episode_length"))
            random = [float(row[key]) if row.get(key) else None for key in ("random_return", "random_score")]
            yield Task(name, row["suite"], name, obs_dim, action_dim, steps, paper[name], random[0], 2, ids, random[1])


TASKS = {
    task.name: task
    for task in (
        Task("hopper", "dflex", "Hopper", 11, 3, 1000, 5680.0, -36.6),
        Task("ant", "dflex", "Ant", 37, 8, 1000, 9672.0, 107.6),
        Task("humanoid", "dflex", "Humanoid", 76, 21, 1000, 8661.0, 88.6),
        Task("anymal", "dflex", "ANYmal", 49, 12, 1000, None, 125.8),
        Task("snu-humanoid", "dflex", "SNU Humanoid", 53, 152, 1000, None, 22.3),
        *_multi_task(),
    )
}
SETS = ("dflex", "mt30", "mt80", "dm_control", "metaworld")


def get(name: str) -> Task:
    """The row of a task. ``gym:ID`` names any Gymnasium environment of continuous control.

    Raises UnknownTask (a ValueError) that suggests the nearest name, and ValueError for a ``gym:`` environment that
    cannot be used, with the reason.
    """
    if isinstance(name, str) and name.startswith("gym:"):
        from pwm_fast.envs.gymnasium_tasks import gymnasium_task

        return gymnasium_task(name)
    if name not in TASKS:
        hint = "python -m pwm_fast.tasks lists all; gym:ID takes any Gymnasium environment"
        raise UnknownTask(nearest("task", str(name), TASKS, hint=hint))
    return TASKS[name]


def names(set: str | None = None) -> list[str]:
    """All task names, or those of one set (a suite's name, ``mt30`` or ``mt80``), in the order of their numbers.

    Raises UnknownTask for a set that does not exist.
    """
    if set is not None and set not in SETS:
        raise UnknownTask(nearest("set of tasks", str(set), SETS, hint="python -m pwm_fast.tasks lists all"))
    return [task.name for task in TASKS.values() if set in (None, task.suite) or set in task.ids]
