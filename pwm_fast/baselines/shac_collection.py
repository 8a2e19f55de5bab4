"""Data from a SHAC run: everything it does, from random to its best policy, recorded into an episode store.

    OUT/                 the episode store (meta.json, obs.f32, ...)
    OUT/shac/            the run: policy.safetensors + .json (the best), metrics.csv, checkpoint.safetensors, run.json

A checkpoint and the store agree: the checkpoint holds the store's header as of its own commit, and resuming takes the
store back to it.
"""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pwm_fast.baselines.actor_policy import ActorPolicy
from pwm_fast.baselines.shac import IterationMetrics, Rollout, SHACConfig
from pwm_fast.baselines.shac_training import Evaluation, SHACTraining
from pwm_fast.data.collect import (
    NoisyPolicy,
    RandomActions,
    derived_seed,
    one_torch_thread,
    record_batches,
    refuse_mismatch,
)
from pwm_fast.data.layout import read_header
from pwm_fast.data.recording import EpisodeAssembler, Recording
from pwm_fast.envs.evaluation import Episode
from pwm_fast.progress import Interrupt, Progress, make_console, number_text
from pwm_fast.run_folder import OPTIONS, RunFolder, versions
from pwm_fast.state_files import read_json, write_json

RUN = "shac"
BEST_NOISE = (0.0, 0.1, 0.2, 0.4)  # standard deviations added to the best policy's actions
RANDOM_PHASE = "random actions"
RANDOM_STREAM, BEST_STREAM = 2, 3


@dataclass(frozen=True)
class CollectionSummary:
    """What a finished collection holds. `best_return` is of fresh episodes, not those that chose the policy."""

    path: Path
    episodes: int
    transitions: int
    random_return: float
    best_return: float
    env_steps: int
    seconds: float

    @staticmethod
    def read(path: Path) -> CollectionSummary | None:
        """From a store's notes; None where the collection has not come to its end."""
        header = read_header(path)
        notes = header.meta.get("collect", {})
        if not notes.get("finished"):
            return None
        figures = {name: notes[name] for name in ("random_return", "best_return", "env_steps", "seconds")}
        return CollectionSummary(path, header.num_episodes, header.num_transitions, **figures)


def collect_shac(
    task: str,
    out: str | Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    config: SHACConfig | None = None,
    threads: int | None = None,
    max_transitions: int = 2_000_000,
    best_episodes: int = 256,
    evaluation_episodes: int = 64,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    console: Console | None = None,
) -> CollectionSummary:
    """Train SHAC on a task for `minutes` or `steps` (of the environment); keep up to `max_transitions` of what it did.

    A resumed run keeps its settings; a larger budget than before goes on where the smaller one ended.
    Raises Interrupted after Ctrl-C, with everything saved; FileExistsError or FileNotFoundError for an `out` that does
    not suit `resume`; ValueError for other options than the run was begun with; OSError or StoreError where the disk
    does not take the data.
    """
    out = Path(out)
    refuse_mismatch(out, resume)
    if resume and config is None and (out / RUN / OPTIONS).exists():
        config = SHACConfig.from_json(read_json(out / RUN / OPTIONS)["config"])
    training = SHACTraining(
        task,
        minutes=minutes,
        steps=steps,
        seed=seed,
        config=config,
        threads=threads,
        evaluation_episodes=evaluation_episodes,
    )
    with Interrupt() as interrupt, ExitStack() as stack, one_torch_thread():
        run = _Run(training, out, best_episodes, checkpoint_seconds, console or make_console(), interrupt)
        return run.complete() if run.open(stack, max_transitions, resume) else run.summary()


class _Run:
    """One process's share of a collection."""

    recording: Recording
    folder: RunFolder
    display: Progress

    def __init__(
        self,
        training: SHACTraining,
        out: Path,
        best_episodes: int,
        checkpoint_seconds: float,
        console: Console,
        interrupt: Interrupt,
    ):
        self.training, self.out, self.best_episodes = training, out, best_episodes
        self.checkpoint_seconds, self.console, self.interrupt = checkpoint_seconds, console, interrupt
        env = training.shac.env
        self.assembler = EpisodeAssembler(env.num_envs, env.task.action_obs)
        self.random_return = float("nan")
        self._saved = 0.0

    def open(self, stack: ExitStack, max_transitions: int, resume: bool) -> bool:
        """Create the store and the run's folder, or find the state to go on from. False: all is done already."""
        task, state = self.training.task, None
        if resume:
            stack.enter_context(self._open_folder())
            state = self.folder.load_checkpoint()
            if state is not None:
                self.training.load_state_dict(state["training"])
                if self.training.finished and CollectionSummary.read(self.out) is not None:
                    return False
                Recording.rewind(self.out, state["recording"])
        reserved = min(self.best_episodes * task.episode_length, max_transitions // 5)
        self.recording = stack.enter_context(
            Recording(self.out, task, max_transitions=max_transitions, reserved=reserved, append=resume)
        )
        if state is not None:
            self.assembler.load_state_dict(state["assembler"])
            self.recording.load_state_dict(state["recording"])
            self.random_return = state["random_return"]
            self._saved = time.monotonic()
            return True
        if resume:  # killed before its first checkpoint: the store holds the random episodes
            self.random_return = float(np.mean(self.recording.adopt(RANDOM_PHASE)))
        else:
            self._record_random()
            stack.enter_context(self._open_folder())
        self._save()
        return True

    def _options(self) -> dict[str, Any]:
        training = self.training
        return {
            "task": training.task.name,
            "seed": training.seed,
            "evaluation_episodes": training.evaluation_episodes,
            "config": asdict(training.config),
        }

    def _open_folder(self) -> RunFolder:
        options = self.out / RUN / OPTIONS
        self.folder = RunFolder(self.out / RUN, resume=options.exists())
        if options.exists():  # settings that a later version has added are at their defaults
            recorded = read_json(options)
            write_json(options, {**recorded, "config": asdict(SHACConfig.from_json(recorded["config"]))})
        self.folder.begin(self._options())
        return self.folder

    def _record_random(self) -> None:
        """Random episodes first: they make the store, and the data's lower end."""
        training = self.training
        batches = record_batches(
            self.recording,
            training.task,
            lambda seed: RandomActions(training.task.action_dim, seed),
            RANDOM_PHASE,
            episodes=training.evaluation_episodes,
            batch=training.evaluation_episodes,
            seed=derived_seed(training.seed, RANDOM_STREAM),
            threads=training.threads,
        )
        (returns,) = batches
        self.random_return = float(returns.mean())
        command = shlex.join(["python", *sys.argv])
        self.recording.notes.update(command=command, policy="shac", **self._options(), versions=versions())
        self.recording.notes["finished"] = False
        self.recording.commit()

    def complete(self) -> CollectionSummary:
        """Train what is left, then record the best policy."""
        training = self.training
        self.display = Progress(
            f"SHAC on {training.task.name}",
            1,
            start=training.shac.env_steps,
            minutes=None if training.minutes is None else training.minutes - training.seconds / 60,
            references={"random": self.random_return, "paper": training.task.paper_return},
            console=self.console,
        )
        with self.display:
            self._show(best=None if training.best is None else training.best.return_mean)
            training.run(lambda: self.interrupt, self._after_iteration, self._after_evaluation)
        self._save()
        steps, episodes = training.shac.env_steps, self.recording.writer.num_episodes
        self.interrupt.raise_if_set(f"stopped after {steps:,} steps; {episodes:,} episodes are saved in {self.out}")
        self._record_best()
        return self.summary()

    def summary(self) -> CollectionSummary:
        """Of the finished collection."""
        summary = CollectionSummary.read(self.out)
        assert summary is not None
        best, random = number_text(summary.best_return), number_text(summary.random_return)
        self.console.print(f"best policy {best}, random {random}; the policy is in {self.out / RUN}")
        return summary

    def _after_iteration(self, rollout: Rollout, metrics: IterationMetrics) -> None:
        columns = (getattr(rollout, name).numpy() for name in EpisodeAssembler.COLUMNS)
        self.recording.add_all(self.assembler.add(*columns), self._phase("training"), self.training.progress)
        self._show(reward=metrics.mean_reward, gradient_norm=metrics.actor_gradient_norm)
        if time.monotonic() - self._saved >= self.checkpoint_seconds:
            self._save()

    def _after_evaluation(self, evaluation: Evaluation, episodes: list[Episode]) -> None:
        training = self.training
        self.recording.add_all(episodes, self._phase("evaluation"), training.progress)
        self.folder.add_metrics(asdict(evaluation))
        result = training.result()
        if evaluation is result.best:
            self.folder.save_policy(result.policy)
        self._show(real=evaluation.return_mean, best=result.best.return_mean)

    def _phase(self, kind: str) -> str:
        tenth = min(int(self.training.progress * 10), 9)
        return f"{kind} {10 * tenth}-{10 * tenth + 10}%"

    def _show(self, **values: float | None) -> None:
        steps, progress = self.training.shac.env_steps, self.training.progress
        self.display.total = max(round(steps / progress), steps, 1) if progress else 1
        self.display.update(steps, **values)

    def _save(self) -> None:
        """Commit the store, then write the checkpoint that belongs to this commit."""
        self.recording.notes["env_steps"] = self.training.shac.env_steps
        self.recording.commit()
        self.folder.save_checkpoint(
            {
                "training": self.training.state_dict(),
                "assembler": self.assembler.state_dict(),
                "recording": self.recording.state_dict(),
                "random_return": self.random_return,
            }
        )
        self._saved = time.monotonic()

    def _record_best(self) -> None:
        """The unfinished training episodes, then the best policy's under several noises. Committed at the very end, so
        that a run killed here repeats it."""
        training, recording = self.training, self.recording
        result = training.result()
        recording.add_all(self.assembler.flush(), "training, cut off at its end")
        episodes = -(-self.best_episodes // len(BEST_NOISE))
        returns = [self._record_noisy(result.policy, level, noise, episodes) for level, noise in enumerate(BEST_NOISE)]
        recording.notes.update(
            finished=True,
            random_return=self.random_return,
            best_return=float(np.mean(returns[0])),
            chosen_at=asdict(result.best),
            seconds=round(training.seconds, 1),
        )
        recording.commit()
        self.folder.save_policy(result.policy)

    def _record_noisy(self, policy: ActorPolicy, level: int, noise: float, episodes: int) -> list[float]:
        """Returns of the policy under a noise; raises Interrupted after Ctrl-C."""
        training = self.training
        returns: list[float] = []
        for part in record_batches(
            self.recording,
            training.task,
            lambda seed: NoisyPolicy(policy, noise, seed),
            f"best policy, noise {noise:g}",
            episodes=episodes,
            batch=training.evaluation_episodes,
            seed=derived_seed(training.seed, BEST_STREAM, level),
            threads=training.threads,
        ):
            returns.extend(part)
            self.interrupt.raise_if_set("stopped while the best policy was being recorded; the training is saved")
        return returns
