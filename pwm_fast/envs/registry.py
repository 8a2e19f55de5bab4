"""The table of tasks: names, sizes and the returns that results are compared with. Imports neither torch nor Warp."""

from dataclasses import dataclass
from typing import Any

from pwm_fast.errors import nearest


class UnknownTask(ValueError):
    """A task or set name that is in no table; the message suggests the nearest one."""


@dataclass(frozen=True)
class Task:
    """A row. ``paper_return``: PWM's score on the task (Georgiev et al. 2024), where the paper gives one;
    ``random_return``: mean of 256 episodes of uniform actions in our simulator, seed 0."""

    name: str
    suite: str
    title: str
    obs_dim: int
    action_dim: int
    episode_length: int
    paper_return: float | None
    random_return: float | None

    @property
    def gym_id(self) -> str:
        return f"pwm_fast/{self.title.replace(' ', '')}-v0"

    def make_vector(self, num_envs: int, seed: int = 0, threads: int | None = None, **options: Any) -> Any:
        """A Gymnasium VectorEnv of this task; ``seed`` is used by its first ``reset()`` without one."""
        from pwm_fast.envs.vector import DflexVectorEnv

        return DflexVectorEnv(self.name, num_envs, seed=seed, threads=threads, **options)


TASKS = {
    task.name: task
    for task in (
        Task("hopper", "dflex", "Hopper", 11, 3, 1000, 5680.0, -36.6),
        Task("ant", "dflex", "Ant", 37, 8, 1000, 9672.0, 107.6),
        Task("humanoid", "dflex", "Humanoid", 76, 21, 1000, 8661.0, 88.6),
        Task("anymal", "dflex", "ANYmal", 49, 12, 1000, None, 125.8),
        Task("snu-humanoid", "dflex", "SNU Humanoid", 53, 152, 1000, None, 22.3),
    )
}
SETS = ("dflex",)


def get(name: str) -> Task:
    """The row of a task. Raises UnknownTask (a ValueError) that suggests the nearest name."""
    if name not in TASKS:
        raise UnknownTask(nearest("task", str(name), TASKS, hint="python -m pwm_fast.tasks lists all"))
    return TASKS[name]


def names(set: str | None = None) -> list[str]:
    """All task names, or those of one set (a suite's name). Raises UnknownTask for a set that does not exist."""
    if set is not None and set not in SETS:
        raise UnknownTask(nearest("set of tasks", str(set), SETS, hint="python -m pwm_fast.tasks lists all"))
    return [task.name for task in TASKS.values() if set in (None, task.suite)]
