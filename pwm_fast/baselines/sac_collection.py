"""SAC's whole replay as data: from random actions to the best that it learns.

    OUT/                              the episode store (meta.json, obs.f32, ...)
    OUT/sac/checkpoint.safetensors    everything that --resume needs beside the store
    OUT/sac/TASK.zip                  the trained model, for `stable_baselines3.SAC.load`

Checkpoints are made between episodes. The replay buffer is not in them: it is what the store holds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pwm_fast.baselines.model_free import SACConfig, SACTraining
from pwm_fast.data.collect import derived_seed, note_options, one_torch_thread, refuse_mismatch
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.recording import Recording
from pwm_fast.envs.evaluation import Episode
from pwm_fast.envs.extras import import_extra
from pwm_fast.envs.registry import Task
from pwm_fast.progress import Interrupt, Progress
from pwm_fast.state_files import load_state, save_state

FOLDER, CHECKPOINT = "sac", "checkpoint.safetensors"


def collect_sac(
    out: str | Path,
    tasks: Sequence[Task],
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    config: SACConfig | None = None,
    max_transitions: int = 2_000_000,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    store_tasks: Sequence[Task] | None = None,
    options: dict[str, Any] | None = None,
    console: Console | None = None,
) -> None:
    """Train SAC on each task for `minutes` or `steps` (whichever is over first, to the end of an episode) and record
    every episode.

    A larger budget than before goes on where the smaller one ended. Each task has an equal share of `max_transitions`,
    and training ends where it is full: a replay that is not whole could not be resumed. `store_tasks` are all the tasks
    of a store that holds the others' episodes already, `options` what its notes say was asked for.
    Raises Interrupted after Ctrl-C, with everything up to the end of the episode saved; FileExistsError or
    FileNotFoundError for an `out` that does not suit `resume`; ValueError for other options than the collection was
    begun with and for tasks whose own physics has gradients (dflex: SHAC); MissingExtra without Stable-Baselines3.
    """
    out, config = Path(out), config or SACConfig()
    refuse_without_sac(tasks, minutes, steps)
    if store_tasks is None:
        refuse_mismatch(out, resume)
    begun = resume and (store_tasks is None or (out / FOLDER / CHECKPOINT).is_file())
    state = _read_state(out) if begun else {"tasks": {}}
    if begun:
        Recording.rewind(out, state["recording"])
    append = resume or store_tasks is not None
    with (
        Recording(out, store_tasks or tasks, max_transitions=max_transitions, append=append) as recording,
        Interrupt() as interrupt,
        one_torch_thread(),
    ):
        asked = {"task": [task.name for task in tasks], "policy": "sac", "seed": seed}
        note_options(recording, options or {**asked, "sac": settings(config)}, append)
        if begun:
            recording.load_state_dict(state["recording"])
        elif append:  # without a checkpoint nobody could tell the others' episodes from SAC's
            recording.adopt("")
            _save_state(out, recording, state["tasks"])
        share = max_transitions // len(recording.tasks)
        for number, task in enumerate(tasks):
            if share < task.episode_length:
                raise ValueError(
                    f"max_transitions must leave room for an episode of {task.episode_length} steps of each task, got "
                    f"{max_transitions} for {len(recording.tasks)} tasks"
                )
            budget = _Budget(minutes, steps, share - task.episode_length)
            training = SACTraining(task, config, derived_seed(seed, number), budget.total + task.episode_length)
            run = _Run(out, recording, training, state["tasks"], budget, checkpoint_seconds, interrupt)
            run.complete(console)
            interrupt.raise_if_set(f"stopped after {training.steps:,} steps of {task.name}; they are saved in {out}")


@dataclass(frozen=True)
class _Budget:
    minutes: float | None
    steps: int | None
    room: int

    @property
    def total(self) -> int:
        return min(self.steps or self.room, self.room)

    def progress(self, training: SACTraining) -> float:
        """From 0 to 1, by steps or by time."""
        late = 0.0 if self.minutes is None else training.seconds / (60 * self.minutes)
        return min(max(training.steps / max(self.total, 1), late), 1.0)


@dataclass
class _Run:
    """One process's share of one task's training."""

    out: Path
    recording: Recording
    training: SACTraining
    states: dict[str, Any]  # of all tasks so far
    budget: _Budget
    checkpoint_seconds: float
    interrupt: Interrupt

    def complete(self, console: Console | None) -> None:
        training, task = self.training, self.training.task
        if task.name in self.states:
            training.load_state_dict(self.states[task.name], list(self._recorded()))
        if self.budget.progress(training) >= 1.0:
            return
        saved, title, best = time.monotonic(), f"SAC on {task.name}", -np.inf
        minutes = None if self.budget.minutes is None else self.budget.minutes - training.seconds / 60
        with Progress(title, self.budget.total, start=training.steps, minutes=minutes, console=console) as display:
            while self.budget.progress(training) < 1.0 and not self.interrupt:
                phase = self._phase()
                episode = training.episode()
                self.recording.add(episode, phase, task=task)
                gained = float(episode.reward.sum(dtype=np.float64))
                best = max(best, gained)
                display.update(training.steps, real=gained, best=best)
                if time.monotonic() - saved >= self.checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
        self._save()
        training.model.save(self.out / FOLDER / f"{task.name.replace('/', '-')}.zip")

    def _phase(self) -> str:
        if self.training.steps < self.training.config.random_steps:
            return "random actions"
        tenth = min(int(self.budget.progress(self.training) * 10), 9)
        return f"training {10 * tenth}-{10 * tenth + 10}%"

    def _save(self) -> None:
        """Commit the store, then write the checkpoint that belongs to this commit."""
        self.recording.commit()
        self.states[self.training.task.name] = self.training.state_dict()
        _save_state(self.out, self.recording, self.states)

    def _recorded(self) -> Iterator[Episode]:
        """This task's episodes in the store, without their padding."""
        store, task = EpisodeStore.open(self.out), self.training.task
        for index in np.flatnonzero(store.episode_task == store.task_names.index(task.name)):
            columns = store.episode(int(index))
            obs, action = columns["obs"][:, : task.obs_dim], columns["action"][:, : task.action_dim]
            yield Episode(obs, action, columns["reward"], bool(columns["terminated"][-1]))


def settings(config: SACConfig) -> dict[str, Any]:
    """The configuration as a store's notes hold it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def refuse_without_sac(tasks: Sequence[Task], minutes: float | None, steps: int | None) -> None:
    """Raises ValueError for a training without end and for tasks that SHAC learns far faster, MissingExtra without
    Stable-Baselines3."""
    if minutes is None and steps is None:
        raise ValueError("SAC needs a budget: give --steps or --minutes")
    for task in tasks:
        if task.suite == "dflex":
            raise ValueError(f"{task.name} is differentiable and SHAC learns it far faster: use --policy shac")
    import_extra("stable_baselines3", "baselines")


def _save_state(out: Path, recording: Recording, tasks: dict[str, Any]) -> None:
    (out / FOLDER).mkdir(exist_ok=True)
    save_state(out / FOLDER / CHECKPOINT, {"tasks": tasks, "recording": recording.state_dict()})


def _read_state(out: Path) -> dict[str, Any]:
    path = out / FOLDER / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {out} is no SAC collection, or was killed before its first "
                                "checkpoint; choose another --out")  # fmt: skip
    return load_state(path)
