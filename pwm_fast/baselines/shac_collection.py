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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pwm_fast.baselines.actor_policy import ActorPolicy
from pwm_fast.baselines.shac import IterationMetrics, Rollout, SHACConfig
from pwm_fast.baselines.shac_training import Evaluation, SHACTraining
from pwm_fast.data.collect import (
    EpisodeAssembler,
    NoisyPolicy,
    RandomActions,
    Recording,
    derived_seed,
    record_batches,
    refuse_mismatch,
)
from pwm_fast.envs.evaluation import Episode
from pwm_fast.errors import Interrupted
from pwm_fast.progress import Interrupt, Progress, make_console, number_text
from pwm_fast.run_folder import OPTIONS, RunFolder, versions
from pwm_fast.state_files import read_json, write_json

RUN = "shac"
BEST_NOISE = (0.0, 0.1, 0.2, 0.4)  # standard deviations added to the best policy's actions
RANDOM_EPISODES, RANDOM_PHASE = 64, "random actions"
RANDOM_STREAM, BEST_STREAM = 2, 3


@dataclass(frozen=True)
class CollectionSummary:
    """What a finished collection holds. `best_return` is of fresh episodes, not those that chose the policy."""

    path: Path
    episodes: int
    transitions: int
    random_return: float
    best_return: float
    chosen_at: Evaluation
    env_steps: int
    seconds: float


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
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    console: Console | None = None,
) -> CollectionSummary:
    """Train SHAC on a task for `minutes` or `steps` (of the environment); keep up to `max_transitions` of what it did.

    Raises Interrupted after Ctrl-C, with everything saved; FileExistsError or FileNotFoundError for an `out` that does
    not suit `resume`; ValueError for other options than the run was begun with; OSError or StoreError where the disk
    does not take the data.
    """
    out = Path(out)
    refuse_mismatch(out, resume)
    if resume and config is None and (out / RUN / OPTIONS).exists():
        config = SHACConfig.from_json(read_json(out / RUN / OPTIONS)["config"])
    training = SHACTraining(task, minutes=minutes, steps=steps, seed=seed, config=config, threads=threads)
    options = {"task": task, "seed": seed, "config": asdict(training.config)}
    with Interrupt() as interrupt:
        run = _Run(training, out, max_transitions, best_episodes, options, resume, checkpoint_seconds, interrupt)
        with run.recording, run.folder:
            return run.complete(console or make_console())


class _Run:
    """One process's share of a collection."""

    def __init__(
        self,
        training: SHACTraining,
        out: Path,
        max_transitions: int,
        best_episodes: int,
        options: dict[str, Any],
        resume: bool,
        checkpoint_seconds: float,
        interrupt: Interrupt,
    ):
        self.training, self.out, self.best_episodes = training, out, best_episodes
        self.checkpoint_seconds, self.interrupt = checkpoint_seconds, interrupt
        self.env = training.shac.env
        self.assembler = EpisodeAssembler(self.env.num_envs, self.env.task.action_obs)
        task = training.task
        reserved = min(best_episodes * task.episode_length, max_transitions // 5)
        self.random_return = float("nan")
        state = None
        if resume:
            self._open_folder(options)
            state = self.folder.load_checkpoint()
            if state is not None:
                Recording.rewind(out, state["recording"])
        self.recording = Recording(out, task, max_transitions=max_transitions, reserved=reserved, append=resume)
        if state is not None:
            self._load(state)
        elif resume:  # killed before the first checkpoint: the store holds the random episodes
            self.random_return = float(np.mean(self.recording.adopt(RANDOM_PHASE)))
            self._save()
        else:
            self._record_random(options)
            self._open_folder(options)
            self._save()

    def _open_folder(self, options: dict[str, Any]) -> None:
        path = self.out / RUN
        self.folder = RunFolder(path, resume=(path / OPTIONS).exists())
        if (path / OPTIONS).exists():  # settings that a later version has added are at their defaults
            recorded = read_json(path / OPTIONS)
            write_json(path / OPTIONS, {**recorded, "config": asdict(SHACConfig.from_json(recorded["config"]))})
        self.folder.begin(options)

    def _record_random(self, options: dict[str, Any]) -> None:
        """Random episodes first: they make the store, and the data's lower end."""
        task, seed = self.training.task, derived_seed(self.training.seed, RANDOM_STREAM)
        batches = record_batches(
            self.recording,
            task,
            lambda part: RandomActions(task.action_dim, part),
            RANDOM_PHASE,
            episodes=RANDOM_EPISODES,
            batch=RANDOM_EPISODES,
            seed=seed,
            threads=self.training.threads,
        )
        ((_, returns),) = batches
        self.random_return = float(returns.mean())
        self.recording.notes.update(
            command=shlex.join(["python", *sys.argv]), policy="shac", **options, versions=versions(), finished=False
        )
        self.recording.commit()

    def complete(self, console: Console) -> CollectionSummary:
        """Train what is left, then record the best policy."""
        training = self.training
        self.display = Progress(
            f"SHAC on {training.task.name}",
            1,
            start=training.shac.env_steps,
            minutes=training.minutes,
            references={"random": self.random_return, "paper": training.task.paper_return},
            console=console,
        )
        with self.display:
            self._show()
            training.run(lambda: self.interrupt, self._after_iteration, self._after_evaluation)
        if self.interrupt:
            self._save()
            raise Interrupted(
                f"stopped after {training.shac.env_steps:,} environment steps; {self.recording.writer.num_episodes:,} "
                f"episodes are in {self.out}; continue by the same command with --resume"
            )
        self._save()
        return self._record_best(console)

    def _after_iteration(self, rollout: Rollout, metrics: IterationMetrics) -> None:
        columns = (getattr(rollout, name).numpy() for name in EpisodeAssembler.COLUMNS)
        progress = self.training.progress
        self.recording.add_all(self.assembler.add(*columns), self._phase("training"), progress)
        self._show(reward=metrics.mean_reward, gradient_norm=metrics.actor_gradient_norm)
        if time.monotonic() - self._saved >= self.checkpoint_seconds:
            self._save()

    def _after_evaluation(self, evaluation: Evaluation, episodes: list[Episode]) -> None:
        training = self.training
        self.recording.add_all(episodes, self._phase("evaluation"), training.progress)
        self.folder.add_metrics(asdict(evaluation))
        if evaluation is training.best and training.best_policy is not None:
            self.folder.save_policy(training.best_policy)
        self._show(real=evaluation.return_mean, best=training.best.return_mean if training.best else None)

    def _phase(self, kind: str) -> str:
        tenth = min(int(self.training.progress * 10), 9)
        return f"{kind} {10 * tenth}-{10 * tenth + 10}%"

    def _show(self, **values: float | None) -> None:
        training = self.training
        steps = training.shac.env_steps
        self.display.total = max(round(steps / training.progress), steps, 1) if training.progress else 1
        self.display.update(steps, **values)

    def _save(self) -> None:
        """Commit the store, then write the checkpoint that names this commit."""
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

    def _load(self, state: dict[str, Any]) -> None:
        self.training.load_state_dict(state["training"])
        self.assembler.load_state_dict(state["assembler"])
        self.recording.load_state_dict(state["recording"])
        self.random_return = state["random_return"]

    def _record_best(self, console: Console) -> CollectionSummary:
        """The unfinished training episodes, then the best policy's under several noises. Committed at the very end, so
        that a run killed here repeats it."""
        training, recording = self.training, self.recording
        result = training.result()
        recording.add_all(self.assembler.flush(), "training, cut off at its end")
        each = -(-self.best_episodes // len(BEST_NOISE))
        best_return = result.best.return_mean
        for level, noise in enumerate(BEST_NOISE):
            returns = self._record_noisy(result.policy, level, noise, each)
            if noise == 0.0:
                best_return = float(np.mean(returns))
        recording.notes.update(
            finished=True,
            random_return=self.random_return,
            best_return=best_return,
            chosen_at=asdict(result.best),
            seconds=round(training.seconds, 1),
        )
        recording.commit()
        self.folder.save_policy(result.policy)
        summary = CollectionSummary(
            self.out,
            recording.writer.num_episodes,
            recording.writer.num_transitions,
            self.random_return,
            best_return,
            result.best,
            result.env_steps,
            result.seconds,
        )
        console.print(
            f"best policy {number_text(summary.best_return)} (random {number_text(summary.random_return)}); "
            f"{summary.episodes:,} episodes, {summary.transitions:,} transitions in {self.out}"
        )
        return summary

    def _record_noisy(self, policy: ActorPolicy, level: int, noise: float, episodes: int) -> list[float]:
        """Returns of the policy under a noise; raises Interrupted after Ctrl-C."""
        training = self.training
        returns: list[float] = []
        for _, part in record_batches(
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
            self.interrupt.raise_if_set(f"stopped while recording the best policy; continue {self.out} by --resume")
        return returns
