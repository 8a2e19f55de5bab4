"""All policies of a run, tasks x seeds: in one job, or in several one after another where memory holds no more.

`extract_policies` is the library's entry; the command `python -m pwm_fast.extract` adds files and a display.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.learning.captured import RING
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import ExtractionConfig, preset
from pwm_fast.learning.finetuning import RoundConfig, Timed, default_rounds
from pwm_fast.learning.job import Budget, Job, Report, make_job
from pwm_fast.learning.members import Member
from pwm_fast.learning.memory import PopulationMemory, population_memory, split
from pwm_fast.models.policy import Policy
from pwm_fast.models.world_model import WorldModel


class Finished(NamedTuple):
    """One policy, the best of its run, and how that ended."""

    policy: Policy
    steps: int
    diverged: bool


class Waves:
    """Jobs made by `make` for at most `fits` members at once; each gets an equal part of the budget's seconds.

    `fits` None: all at once. Raises ValueError where not even one fits, and what `make` raises.
    """

    def __init__(
        self,
        make: Callable[[Sequence[Member], Budget], Job],
        members: Sequence[Member],
        budget: Budget,
        fits: int | None = None,
    ):
        self.members, self._make = list(members), make
        self.waves = split(len(self.members), len(self.members) if fits is None else fits)
        self.wave, self._done = 0, list[Finished]()
        self._seconds = 0.0  # that earlier waves took
        self.budget = budget
        self.job = self._begin()

    def set_budget(self, budget: Budget) -> None:
        """What all jobs together may use."""
        self.budget = budget
        self.job.budget = self._share()

    def _share(self) -> Budget:
        seconds = self.budget.seconds
        return Budget(self.budget.steps, None if seconds is None else seconds / len(self.waves))

    def _begin(self) -> Job:
        return self._make(self.present, self._share())

    @property
    def present(self) -> list[Member]:
        """The members at work."""
        return [self.members[i] for i in self.waves[self.wave]]

    @property
    def steps_done(self) -> int:
        """Gradient steps, of all waves so far."""
        return self.job.steps_done + sum(self._done[wave[0]].steps for wave in self.waves[: self.wave])

    @property
    def total_steps(self) -> int:
        """Gradient steps of all waves, as far as they can be foreseen."""
        return (
            self.steps_done
            + (len(self.waves) - self.wave) * self.job.rounds.extraction.total_steps
            - self.job.steps_done
        )

    def run(
        self,
        report: Report = lambda row: None,
        on_step: Callable[[int], None] = lambda step: None,
        stop: Callable[[], bool] = lambda: False,
        timed: Timed = lambda name: nullcontext(),
    ) -> bool:
        """All jobs to their end; True then, False if `stop` asked to end before. Arguments as of `Job.run`.

        Reported seconds are those of all waves, and `members` whom the arrays are of.
        """

        def of_all(row: dict[str, Any]) -> None:
            report({**row, "seconds": self._seconds + row["seconds"], "members": self.present})

        while self.job.run(of_all, on_step, stop, timed):
            if self.wave + 1 == len(self.waves):
                return True
            self._done += self._results()
            self._seconds += self.job.seconds
            self.wave += 1
            del self.job  # its memory before that of the next
            self.job = self._begin()
        return False

    def _results(self) -> list[Finished]:
        rounds, steps = self.job.rounds, self.job.steps_done
        return [Finished(p, steps, bool(d)) for p, d in zip(rounds.best(), rounds.diverged(), strict=True)]

    def finished(self) -> list[Finished]:
        """The best policy of every member so far, in their order; of those whose wave has come."""
        return self._done + self._results()

    def state_dict(self) -> dict[str, Any]:
        done = [{**f._asdict(), "policy": f.policy.tensors(), "of": f.policy.description} for f in self._done]
        return {"wave": self.wave, "done": done, "seconds": self._seconds, "job": self.job.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def restored(policy: dict[str, Tensor], of: dict[str, Any], steps: int, diverged: bool) -> Finished:
            return Finished(Policy.from_tensors(policy, of), int(steps), bool(diverged))

        self._done, self._seconds = [restored(**row) for row in state["done"]], float(state["seconds"])
        if self.wave != int(state["wave"]):
            self.wave = int(state["wave"])
            del self.job
            self.job = self._begin()
        self.job.load_state_dict(state["job"])


def extract_policies(
    world_model: WorldModel | str | Path,
    data: EpisodeStore | str | Path | Sequence[EpisodeStore | str | Path],
    tasks: Sequence[str],
    seeds: int | Sequence[int] = 1,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    finetune: bool = False,
    config: ExtractionConfig | str = "fast",
    rounds: RoundConfig | None = None,
    start: str = "cloned",
    execution: ExecutionConfig | None = None,
    report: Report = lambda row: None,
) -> dict[str, list[Policy]]:
    """Learn policies from a world model: for every task a list with the best policy of each seed.

    `seeds` is how many, or which. `minutes` or `steps` bound each task (default 10 minutes); tasks of a world model
    that knows several are learned side by side. `config` is a preset's name or a configuration; `finetune` lets the
    world model learn from the policies' own real episodes, a task at a time.
    Raises ValueError (unknown task, wrong shapes), FileNotFoundError (model or data missing).
    """
    model = world_model if isinstance(world_model, WorldModel) else WorldModel.load(world_model)
    given = [data] if isinstance(data, (EpisodeStore, str, Path)) else list(data)
    stores = [each if isinstance(each, EpisodeStore) else EpisodeStore.open(each) for each in given]
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    seconds = None if minutes is None and steps is not None else 60.0 * (minutes or 10.0)
    setting = preset(config) if isinstance(config, str) else config
    each = rounds or default_rounds(tasks)
    each = each if finetune else replace(each, model_steps=0)

    def make(members: Sequence[Member], budget: Budget) -> Job:
        names, own = zip(*members)
        used = model.copy() if finetune else model
        return make_job(names, used, stores, own, budget, setting, each, start=start, execution=execution)

    together = model.config.num_tasks > 0 and not finetune
    out: dict[str, list[Policy]] = {task: [] for task in tasks}
    for group in [list(tasks)] if together else [[task] for task in tasks]:
        members = [Member(task, seed) for task in group for seed in chosen]
        budget = Budget(steps, None if seconds is None else seconds * len(group))
        waves = Waves(make, members, budget, fits(model, stores, setting, execution))
        waves.run(report)
        for member, result in zip(members, waves.finished(), strict=True):
            out[member.task].append(result.policy)
    return out


def fits(
    model: WorldModel, data: Sequence[EpisodeStore], config: ExtractionConfig, execution: ExecutionConfig | None = None
) -> int | None:
    """How many policies a GPU's free memory holds at once; None on the CPU."""
    if not model.obs_mean.is_cuda:
        return None
    free = torch.cuda.mem_get_info(model.obs_mean.device)[0]
    return memory_of(model, data, config, execution or ExecutionConfig()).fits(free)


def memory_of(
    model: WorldModel, data: Sequence[EpisodeStore], config: ExtractionConfig, execution: ExecutionConfig
) -> PopulationMemory:
    """What a run's policies take on a GPU."""
    return population_memory(
        model.config, config, start_states=sum(d.num_rows for d in data), overlap=execution.overlap, ring=RING,
        low_precision=execution.precision == "bf16",
    )  # fmt: skip
