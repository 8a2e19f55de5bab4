"""A whole extraction: rounds until the steps or the minutes are used up, then the best policies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from pwm_fast.data.episodes import EpisodeStore, WindowSampler
from pwm_fast.data.task_table import fitted
from pwm_fast.envs import registry
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import Extraction, ExtractionConfig
from pwm_fast.learning.finetuning import ExtractionRounds, RoundConfig, Timed
from pwm_fast.learning.members import find_source, task_number
from pwm_fast.learning.precision import check_precision
from pwm_fast.models.world_model import WorldModel

Report = Callable[[dict[str, Any]], None]
"""Called after every round with `round`, `step`, `seconds` and arrays [P]: real_return, imagined_return, ..."""


STARTS = ("cloned", "scratch")
LOOKS = 50  # at reality in a run of many steps
LEARNING_SHARE = 0.5  # of the time of a look: a frozen model's rounds that take less become longer
# A good actor waits for its critics, moves gently (with 4e-5 the humanoid runs faster than it can for a while), and
# explores little: noise of 0.2 makes the best ones fall.
CLONED: dict[str, Any] = {"actor_lr": 1e-5, "final_lr": 1e-6, "actor_delay": 10, "min_log_std": -3.0}


@dataclass(frozen=True)
class Budget:
    """When to stop: after `steps` gradient steps, or after `seconds`, whichever is given and comes first.

    With steps alone a run depends on nothing but its seeds. With seconds the learning-rate schedule follows an
    estimate of how many steps will fit, renewed after every round.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise ValueError("a budget needs steps or minutes, got neither")
        for name in ("steps", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")


class Job:
    """Runs rounds within a budget; `run` may be called again after `load_state_dict`."""

    def __init__(self, rounds: ExtractionRounds, budget: Budget, start: str = "cloned"):
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
        self.rounds, self.budget, self.start = rounds, budget, start
        self.seconds = 0.0  # spent in rounds, over all processes that worked on this run
        if budget.steps is not None:
            rounds.stretch = max(1, budget.steps // (LOOKS * rounds.config.cycles * rounds.config.extraction_steps))
        self._schedule(first_guess=budget.steps or 100 * rounds.config.cycles * rounds.config.extraction_steps)

    @property
    def steps_done(self) -> int:
        return int(self.rounds.extraction.iteration)

    def _schedule(self, first_guess: int | None = None) -> None:
        """Set the length of the learning-rate schedule from the time that rounds take."""
        total = first_guess or self.rounds.extraction.total_steps
        if self.budget.seconds is not None and self.steps_done:
            left = max(self.budget.seconds - self.seconds, 0.0)
            fits = self.steps_done + int(self.steps_done * left / self.seconds)
            total = min(fits, self.budget.steps or fits)
        self.rounds.extraction.set_total_steps(max(total, 1))

    def finished(self) -> bool:
        b = self.budget
        return (b.steps is not None and self.steps_done >= b.steps) or (
            b.seconds is not None and self.seconds >= b.seconds
        )

    def run(
        self,
        report: Report = lambda row: None,
        on_step: Callable[[int], None] = lambda step: None,
        stop: Callable[[], bool] = lambda: False,
        timed: Timed = lambda name: nullcontext(),
    ) -> bool:
        """Rounds until the budget is spent; True then, False if `stop` asked to end before.

        `report` is called at the end of every round, when the state is consistent and may be saved.
        """
        rounds = self.rounds
        begun, before = time.monotonic(), self.seconds

        def spent() -> bool:
            late = self.budget.seconds is not None and before + time.monotonic() - begun >= self.budget.seconds
            on_step(self.steps_done)
            return stop() or late

        def finish(metrics: dict[str, Any]) -> None:
            number = rounds.rounds_done
            rounds.finish_round()
            self.seconds = before + time.monotonic() - begun
            self._schedule()
            row = {"round": number, "step": self.steps_done, "seconds": self.seconds, **metrics}
            report({**row, "best_return": rounds.best_return.copy(), "diverged": rounds.diverged()})

        if self.start == "cloned" and rounds.rounds_done == 0:
            with timed("cloning"):
                rounds.start_from_clones()
            with timed("real episodes"):
                finish(rounds.look_at_reality())
        while not self.finished():
            left = None if self.budget.steps is None else self.budget.steps - self.steps_done
            start = time.monotonic()
            metrics = rounds.learn(left, spent, timed)
            if stop():
                return False
            learned = time.monotonic()
            with timed("real episodes"):
                metrics |= rounds.look_at_reality()
            if self.budget.steps is None and learned - start < LEARNING_SHARE * (time.monotonic() - learned):
                rounds.stretch *= 2
            finish(metrics)
            if rounds.diverged().all():
                break
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds.state_dict(), "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds.load_state_dict(state["rounds"])
        self.seconds = float(state["seconds"])
        self._schedule()


def make_job(
    tasks: str | Sequence[str],
    world_model: WorldModel,
    data: EpisodeStore | Sequence[EpisodeStore],
    seeds: Sequence[int],
    budget: Budget,
    extraction: ExtractionConfig,
    rounds: RoundConfig,
    seed: int = 0,
    threads: int | None = None,
    start: str = "cloned",
    execution: ExecutionConfig | None = None,
    precision: str = "fp32",
) -> Job:
    """A job for one policy per entry of `seeds`, all of one task or each of its own.

    A world model of many tasks may learn them side by side; its data and it are padded to its widest task. `start`:
    actors imitate the best of the data first ("cloned"), or are random ("scratch"). `execution`: how steps run; by
    default on CUDA as a captured graph with all that is fast, elsewhere operation by operation. `precision` as of
    `Extraction`, where no `execution` says it; below fp32 it must first pass its gradient check on this model and data.
    Raises ValueError where model, data and task do not fit each other or a precision does not pass, StoreError for data
    with NaN, RuntimeError for an execution that cannot run here.
    """
    names = [tasks] * len(seeds) if isinstance(tasks, str) else list(tasks)
    if len(names) != len(seeds):
        raise ValueError(f"tasks must name the {len(seeds)} policies, got {len(names)}")
    rows = {name: registry.get(name) for name in names}
    stores = [data] if isinstance(data, EpisodeStore) else list(data)
    numbers = {name: task_number(world_model, row) for name, row in rows.items()}
    sources = {name: find_source(stores, row) for name, row in rows.items()}
    for source in sources.values():
        source.store.statistics()  # reads all of it, so that a NaN is found before work begins
    if start == "cloned":
        extraction = replace(extraction, **CLONED)
    if extraction.terminations and not world_model.has_termination:
        extraction = replace(extraction, terminations=False)
    if execution is None and world_model.obs_mean.is_cuda:
        execution = ExecutionConfig(precision=precision)
    task_ids = torch.tensor([numbers[name] for name in names]) if world_model.config.num_tasks else None
    precision = precision if execution is None else execution.precision
    if precision != "fp32":
        source = sources[names[0]]
        states = WindowSampler(source.store, 1, seed=seed, tasks=source.task).start_states(0, extraction.batch_size)
        obs = torch.from_numpy(fitted(states, world_model.config.obs_dim)[None]).to(world_model.obs_mean)
        check_precision(world_model, extraction, obs, precision, None if task_ids is None else task_ids[:1])
    own = [(rows[name].obs_dim, rows[name].action_dim) for name in names]
    whole = (world_model.config.obs_dim, world_model.config.action_dim)
    learner = Extraction(
        world_model, extraction, task_ids, seeds, tasks=names, precision=precision,
        dims=None if all(size == whole for size in own) else own,
    )  # fmt: skip
    made = ExtractionRounds(world_model, learner, stores, rounds, seed, threads, execution)
    return Job(made, budget, start)
