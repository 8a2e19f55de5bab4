"""python -m pwm_fast.extract --task humanoid: a policy from a world model, in minutes.

Uses the shipped world model of the task (or --world-model and --data), learns one policy per seed, looks at the real
simulator between rounds and keeps what was best there, and leaves a run folder with policies, numbers and pictures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from pwm_fast import backend
from pwm_fast.closing import Settings, close
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.packed import unpack
from pwm_fast.envs import registry
from pwm_fast.envs.drawing import prepare_drawing
from pwm_fast.errors import check_device, positive, run_command
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import ExtractionConfig, preset
from pwm_fast.learning.finetuning import RoundConfig, default_rounds
from pwm_fast.learning.job import Budget, Job, make_job
from pwm_fast.learning.members import Member
from pwm_fast.learning.waves import Waves, fits, memory_of
from pwm_fast.models.world_model import WorldModel
from pwm_fast.progress import Interrupt, Phases, Progress, make_console, resume_command
from pwm_fast.run_folder import RunFolder, latest_path, new_path
from pwm_fast.shipped import Prepared, prepared

DRAWN = 3  # tasks of a run, at most, whose episodes are drawn
CLOSING_SECONDS = 40.0  # kept back for the last evaluation and the pictures
PREPARATION_SHARE, PREPARATION_MINUTES = 0.7, 10.0  # of a run's time, where the world model has to be built first
BUILT_SIZE = "1M"


@dataclass(frozen=True)
class Execution:
    """Switches of `ExecutionConfig` that a run may use."""

    fused_kernels: bool = True
    """Fused kernels; off: plain torch operations."""
    graph: bool = True
    """One captured CUDA graph per gradient step."""
    overlap: bool = True
    """The next step's rollout beside this step's critics."""
    persistent: bool = False
    """Whole rollouts and critic epochs in one kernel each."""


@dataclass
class Options:
    """Learn policies from a world model."""

    task: list[str]
    """One task, several, or a set (dflex); python -m pwm_fast.tasks lists them."""
    seeds: int = 1
    """Policies per task, learned at once."""
    steps: int | None = None
    """Gradient steps (default: as many as fit into --minutes)."""
    minutes: float | None = None
    """Time per task, everything included (default: 10, or no limit with --steps)."""
    world_model: Path | None = None
    """World-model file (default: the task's shipped or cached one)."""
    data: list[Path] | None = None
    """Episode stores for start states and rehearsal (default: what comes with the world model)."""
    finetune: bool = False
    """Let the world model learn from the policies' own real episodes, and extract along them."""
    start: Literal["cloned", "scratch"] = "cloned"
    """Where policies start: imitating the best of the data, or random."""
    preset: str = "fast"
    """What extraction computes: fast, paper, published-code."""
    size: str | None = None
    """Size of a world model that has to be built first (default: 1M)."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of matrix products (tf32, on a GPU or a CPU with AMX) or of the world model's networks (bf16)."""
    execution: Execution = field(default_factory=Execution)
    """What makes a gradient step fast, each to be switched off alone; on a GPU."""
    out: Path | None = None
    """Run folder (default: runs/TASK)."""
    resume: bool = False
    """Continue the run in --out."""
    seed: int = 0
    """First policy seed."""
    backend: str | None = None
    """Force native, triton or torch (default: the fastest that runs)."""
    threads: int | None = None
    """CPU threads (default: all)."""
    rounds: RoundConfig = field(default_factory=RoundConfig)
    """What happens in each round."""


def main(options: Options) -> int:
    check(options)
    tasks = [name for given in options.task for name in (registry.names(given) if given in registry.SETS else [given])]
    for name in tasks:
        registry.get(name)
    model = None if options.world_model is None else WorldModel.load(options.world_model, options.device)
    if len(tasks) > 1 and not (model is not None and model.config.num_tasks):
        for name in tasks:
            extract(replace(options, out=options.out and options.out / name), [name], model)
    else:
        extract(options, tasks, model)
    return 0


def check(options: Options) -> None:
    """Raises ValueError for options that cannot work, before anything is built."""
    positive("seeds", options.seeds)
    for name in ("steps", "minutes", "threads"):
        if getattr(options, name) is not None:
            positive(name, getattr(options, name))
    if options.seed < 0:
        raise ValueError(f"seed must be >= 0, got {options.seed}")
    check_device(options.device, options.precision, on_cpu=backend.cpu_precisions())
    if (options.world_model is None) != (options.data is None):
        raise ValueError("--world-model and --data go together: the model and the episodes it starts from")
    preset(options.preset)
    if options.backend is not None:
        backend.resolve(options.backend)
        os.environ[backend.VARIABLE] = options.backend
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def extract(options: Options, tasks: Sequence[str], given: WorldModel | None = None) -> Path:
    """One task, or several of one world model, from start to closing table; returns the run folder."""
    phases, console = Phases(), make_console()
    title = registry.get(tasks[0]).title if len(tasks) == 1 else f"{len(tasks)} tasks"
    minutes = options.minutes or (None if options.steps else 10.0)
    draw = can_draw(tasks, console)
    label = tasks[0] if len(tasks) == 1 else "-".join(options.task)[:60]
    out = options.out or (latest_path(label) if options.resume else new_path(label))
    members = [Member(task, seed) for task in tasks for seed in range(options.seed, options.seed + options.seeds)]
    with RunFolder(out, resume=options.resume) as folder, Interrupt() as interrupt:
        folder.begin(recorded(options, tasks), free=("out", "resume", "threads", "backend", "minutes"))
        with phases("set-up"):
            found = source(options, tasks[0], minutes, console)
            model = given or WorldModel.load(found.world_model, options.device)
            data = [EpisodeStore.open(path) for path in options.data or []]
            data = data or [open_episodes(found.episodes, folder.file("data"))]
            seconds = None if minutes is None else 60 * minutes * len(tasks)
            setting, execution = preset(options.preset), execution_of(options)
            waves = Waves(
                lambda wave, budget: make_wave(options, wave, budget, model, data, setting, execution),
                members, Budget(options.steps, seconds), fits(model, data, setting, execution),
            )  # fmt: skip
            state = folder.load_checkpoint() if options.resume else None
            if state is not None:
                waves.load_state_dict(state)
        console.print(Text(f"{title}: {backend.describe(options.device)} · {options.device} {options.precision} · "
                           f"{torch.get_num_threads()} threads"))  # fmt: skip
        console.print(Text(f"world model: {model.num_parameters / 1e6:.1f}M parameters, {found.origin}"))
        if execution is not None:
            parts = len(waves.waves)
            line = memory_of(model, data, setting, execution).describe(
                torch.cuda.mem_get_info(model.obs_mean.device)[0]
            )
            console.print(Text(line + (f"; {parts} waves" if parts > 1 else "")))
        episodes, transitions = (sum(getattr(d, f"num_{kind}") for d in data) for kind in ("episodes", "transitions"))
        console.print(Text(f"data: {episodes:,} pieces of episodes, {transitions:,} transitions"))
        learn(waves, folder, phases, options, interrupt, title)
        settings = Settings(title, options.threads, options.device, options.precision, options.finetune, draw)
        close(waves, folder, phases, settings, model.provenance.get("data", {}), console)
        return folder.path


def can_draw(tasks: Sequence[str], console: Console) -> bool:
    """Whether the run's end draws MuJoCo's tasks, which chooses its library before its first import; not of many."""
    if not {registry.get(task).suite for task in tasks} <= {"dm_control", "metaworld"} or len(tasks) > DRAWN:
        return False
    try:
        prepare_drawing()
    except RuntimeError as error:
        console.print(Text(f"no rollout.gif: {error}", style="yellow"))
        return False
    return True


def make_wave(
    options: Options,
    wave: Sequence[Member],
    budget: Budget,
    model: WorldModel,
    data: Sequence[EpisodeStore],
    setting: ExtractionConfig,
    execution: ExecutionConfig | None,
) -> Job:
    """The job of some members."""
    tasks, seeds = zip(*wave)
    rounds = options.rounds if options.rounds != RoundConfig() else default_rounds(tasks)
    rounds = rounds if options.finetune else replace(rounds, model_steps=0)
    return make_job(
        tasks, model.copy() if options.finetune else model, data, seeds, budget, setting, rounds, options.seed,
        options.threads, options.start, execution, options.precision,
    )  # fmt: skip


def execution_of(options: Options) -> ExecutionConfig | None:
    """How gradient steps run: operation by operation on the CPU, by the switches on a GPU."""
    on_gpu = options.device.startswith("cuda")
    return ExecutionConfig(**asdict(options.execution), precision=options.precision) if on_gpu else None


def recorded(options: Options, tasks: Sequence[str]) -> dict[str, Any]:
    """The options as JSON values, for run.json."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    return {**plain, "task": tasks[0] if len(tasks) == 1 else list(tasks)}


def source(options: Options, name: str, minutes: float | None, console: Any) -> Prepared:
    """The world model and data to use: those given, shipped, cached, or built now in part of the time."""
    if options.world_model is not None and options.data is not None:
        return Prepared(options.world_model, options.data[0], str(options.world_model))
    found = prepared(name)
    if found is None:
        from pwm_fast.learning.preparation import prepare

        time = PREPARATION_SHARE * (minutes or PREPARATION_MINUTES)
        found = prepare(name, time, options.size or BUILT_SIZE, options.seed, options.threads, console)
    return found


def open_episodes(path: Path, unpacked: Path) -> EpisodeStore:
    """A store, or the store made of a shipped pack."""
    return unpack(path, unpacked) if path.suffix == ".npz" else EpisodeStore.open(path)


def learn(waves: Waves, folder: RunFolder, phases: Phases, options: Options, interrupt: Interrupt, title: str) -> None:
    """Rounds with display, metrics and a checkpoint after each; raises Interrupted on Ctrl-C."""
    budget = waves.budget
    if budget.seconds is not None:  # what set-up took and closing will take comes off the rounds' time
        left = budget.seconds - sum(phases.seconds.values()) - CLOSING_SECONDS
        waves.set_budget(replace(budget, seconds=max(left, 0.2 * budget.seconds)))
    minutes = None if budget.seconds is None else budget.seconds / 60
    tasks = {member.task for member in waves.members}
    row = registry.get(waves.members[0].task)
    references = {"random": row.random_return, "paper": row.paper_return} if len(tasks) == 1 else None

    with Progress(title, waves.total_steps, start=waves.steps_done, minutes=minutes, references=references) as progress:

        def report(row: dict[str, Any]) -> None:
            minutes_passed = (row["seconds"] + phases.seconds.get("set-up", 0.0)) / 60
            arrays = {k: v for k, v in row.items() if k not in ("seconds", "members")}
            for i, member in enumerate(row["members"]):
                name = {"task": member.task} if len(tasks) > 1 else {}
                values = {k: float(v[i]) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
                folder.add_metrics({"minutes": round(minutes_passed, 4), **name, "seed": member.seed, **values})
                if row["diverged"][i]:
                    progress.note(f"{' '.join(name.values())} seed {member.seed} diverged and was stopped as it was "
                                  "before; the others go on".lstrip())  # fmt: skip
            folder.save_checkpoint(waves.state_dict())
            progress.total = waves.total_steps
            progress.update(
                waves.steps_done,
                real=row["real_return"].mean(),
                best=row["best_return"].mean(),
                success=np.nanmean(row["success"]) if "success" in row else None,
                imagined=row["imagined_return"].mean() if "imagined_return" in row else None,
                imagined_over_real=row["imagined_over_real"].mean(),
            )

        finished = waves.run(report, progress.update, lambda: bool(interrupt), phases)
    if not finished:
        interrupt.raise_if_set(f"saved; resume with: {resume_command('pwm_fast.extract', folder.path)}")


if __name__ == "__main__":
    sys.exit(run_command(Options, main, "pwm_fast.extract"))
