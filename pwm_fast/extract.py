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
from rich.text import Text

from pwm_fast import backend
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.packed import unpack
from pwm_fast.envs import registry
from pwm_fast.errors import check_device, positive, run_command
from pwm_fast.learning.captured import RING
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import preset
from pwm_fast.learning.finetuning import RoundConfig
from pwm_fast.learning.job import Budget, Job, make_job
from pwm_fast.learning.memory import population_memory
from pwm_fast.models.world_model import WorldModel
from pwm_fast.pictures import curve, rollout_gif, series
from pwm_fast.progress import Interrupt, Phases, Progress, make_console, resume_command
from pwm_fast.results import print_closing, real_returns, summarise
from pwm_fast.run_folder import RunFolder, latest_path, new_path
from pwm_fast.shipped import Prepared, prepared

EVALUATION_EPISODES, EVALUATION_SEED = 16, 10_000
CLOSING_SECONDS = 40.0  # kept back for the last evaluation and the pictures
PREPARATION_SHARE, PREPARATION_MINUTES = 0.6, 10.0  # of a run's time, where the world model has to be built first
BUILT_SIZE = "1M"
EXPLOITED = 2.0  # imagined over real reward from which the closing table warns


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
    data: Path | None = None
    """Episode store for start states and rehearsal (default: what comes with the world model)."""
    finetune: bool = True
    """Let the world model learn from the policies' own real episodes."""
    start: Literal["cloned", "scratch"] = "cloned"
    """Where policies start: imitating the best of the data, or random."""
    preset: str = "fast"
    """What extraction computes: fast, paper, published-code."""
    size: str | None = None
    """Size of a world model that has to be built first (default: 1M)."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of matrix products (tf32) or of the world model's networks (bf16); below fp32 needs a GPU."""
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
    if options.out is not None and len(tasks) > 1:
        for name in tasks:
            extract(replace(options, out=options.out / name), name)
    else:
        for name in tasks:
            extract(options, name)
    return 0


def check(options: Options) -> None:
    """Raises ValueError for options that cannot work, before anything is built."""
    positive("seeds", options.seeds)
    for name in ("steps", "minutes", "threads"):
        if getattr(options, name) is not None:
            positive(name, getattr(options, name))
    if options.seed < 0:
        raise ValueError(f"seed must be >= 0, got {options.seed}")
    check_device(options.device, options.precision)
    if (options.world_model is None) != (options.data is None):
        raise ValueError("--world-model and --data go together: the model and the episodes it starts from")
    preset(options.preset)
    if options.backend is not None:
        backend.resolve(options.backend)
        os.environ[backend.VARIABLE] = options.backend
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def extract(options: Options, name: str) -> Path:
    """One task from start to closing table; returns the run folder."""
    task, phases, console = registry.get(name), Phases(), make_console()
    minutes = options.minutes or (None if options.steps else 10.0)
    out = options.out or (latest_path(name) if options.resume else new_path(name))
    seeds = list(range(options.seed, options.seed + options.seeds))
    with RunFolder(out, resume=options.resume) as folder, Interrupt() as interrupt:
        folder.begin(recorded(options, name), free=("out", "resume", "threads", "backend", "minutes"))
        with phases("set-up"):
            found = source(options, name, minutes, console)
            model = WorldModel.load(found.world_model, options.device)
            data = open_episodes(found.episodes, folder.file("data"))
            setting = preset(options.preset)
            rounds = options.rounds if options.finetune else replace(options.rounds, model_steps=0)
            seconds = None if minutes is None else 60 * minutes
            job = make_job(
                name, model, data, seeds, Budget(options.steps, seconds), setting, rounds,
                options.seed, options.threads, options.start, execution_of(options),
            )  # fmt: skip
            state = folder.load_checkpoint() if options.resume else None
            if state is not None:
                job.load_state_dict(state)
        console.print(Text(f"{task.title}: {backend.describe(options.device)} · {options.device} {options.precision} · "
                           f"{torch.get_num_threads()} threads"))  # fmt: skip
        console.print(Text(f"world model: {model.num_parameters / 1e6:.1f}M parameters, {found.origin}"))
        if on_gpu(options):
            console.print(Text(memory_line(job, data)))
        console.print(Text(f"data: {data.num_episodes:,} pieces of episodes, {data.num_transitions:,} transitions"))
        learn(job, folder, phases, options, minutes, interrupt, task)
        return close(job, folder, phases, options, model, task, console, seeds)


def execution_of(options: Options) -> ExecutionConfig | None:
    """How gradient steps run: operation by operation on the CPU, by the switches on a GPU."""
    return ExecutionConfig(**asdict(options.execution), precision=options.precision) if on_gpu(options) else None


def on_gpu(options: Options) -> bool:
    return options.device.startswith("cuda")


def recorded(options: Options, name: str) -> dict[str, Any]:
    """The options as JSON values, for run.json."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    return {**plain, "task": name}


def source(options: Options, name: str, minutes: float | None, console: Any) -> Prepared:
    """The world model and data to use: those given, shipped, cached, or built now in part of the time."""
    if options.world_model is not None and options.data is not None:
        return Prepared(options.world_model, options.data, str(options.world_model))
    found = prepared(name)
    if found is None:
        from pwm_fast.learning.preparation import prepare

        time = PREPARATION_SHARE * (minutes or PREPARATION_MINUTES)
        found = prepare(name, time, options.size or BUILT_SIZE, options.seed, options.threads, console)
    return found


def memory_line(job: Job, data: EpisodeStore) -> str:
    """What a policy takes on the GPU, and how many fit. Raises ValueError where the run's do not."""
    learner = job.rounds.extraction
    memory = population_memory(
        learner.world_config, learner.config, start_states=data.num_rows, overlap=True, ring=RING,
        low_precision=learner.precision == "bf16",
    )  # fmt: skip
    free = torch.cuda.mem_get_info(learner.iteration.device)[0]
    if len(learner.seeds) > memory.fits(free):
        raise ValueError(f"{len(learner.seeds)} policies do not fit ({memory.describe(free)}): use fewer --seeds")
    return memory.describe(free)


def open_episodes(path: Path, unpacked: Path) -> EpisodeStore:
    """A store, or the store made of a shipped pack."""
    return unpack(path, unpacked) if path.suffix == ".npz" else EpisodeStore.open(path)


def learn(
    job: Job,
    folder: RunFolder,
    phases: Phases,
    options: Options,
    minutes: float | None,
    interrupt: Interrupt,
    task: registry.Task,
) -> None:
    """Rounds with display, metrics and a checkpoint after each; raises Interrupted on Ctrl-C."""
    extraction = job.rounds.extraction
    if job.budget.seconds is not None:  # what set-up took and closing will take comes off the rounds' time
        left = job.budget.seconds - sum(phases.seconds.values()) - CLOSING_SECONDS
        job.budget = replace(job.budget, seconds=max(left, 0.2 * job.budget.seconds))
    references = {"random": task.random_return, "paper": task.paper_return}

    with Progress(task.title, extraction.total_steps, start=job.steps_done, minutes=minutes,
                  references=references) as progress:  # fmt: skip

        def report(row: dict[str, Any]) -> None:
            minutes_passed = (row["seconds"] + phases.seconds.get("set-up", 0.0)) / 60
            for i, seed in enumerate(extraction.seeds):
                values = {k: float(v[i]) if isinstance(v, np.ndarray) else v for k, v in row.items() if k != "seconds"}
                folder.add_metrics({"minutes": round(minutes_passed, 4), "seed": seed, **values})
                if row["diverged"][i]:
                    progress.note(f"seed {seed} diverged and was stopped as it was before; the others go on")
            folder.save_checkpoint(job.state_dict())
            progress.total = extraction.total_steps
            progress.update(
                row["step"],
                real=row["real_return"].mean(),
                best=row["best_return"].mean(),
                imagined=row["imagined_return"].mean() if "imagined_return" in row else None,
                imagined_over_real=row["imagined_over_real"].mean(),
            )

        finished = job.run(report, progress.update, lambda: bool(interrupt), phases)
    if not finished:
        interrupt.raise_if_set(f"saved; resume with: {resume_command('pwm_fast.extract', folder.path)}")


def close(
    job: Job,
    folder: RunFolder,
    phases: Phases,
    options: Options,
    model: WorldModel,
    task: registry.Task,
    console: Any,
    seeds: Sequence[int],
) -> Path:
    """Last evaluation, files and pictures, closing table."""
    policies = job.rounds.best()
    with phases("evaluation"):
        results = [
            real_returns(p, task.name, EVALUATION_EPISODES, EVALUATION_SEED, record=True, threads=options.threads)
            for p in policies
        ]
    best = int(np.argmax([r.mean for r in results]))
    with phases("files and pictures"):
        for i, seed in enumerate(seeds):
            if len(seeds) > 1:
                folder.save_policy(policies[i], seed)
        folder.save_policy(policies[best])
        data = model.provenance.get("data", {})
        rows = folder.metrics()
        cloned = [row["real_return"] for row in rows if row["step"] == 0]
        cloning = float(np.mean(cloned)) if cloned else None
        levels = {
            "paper": task.paper_return,
            "random": task.random_return,
            "data, best": data.get("return_best"),
            "data, mean": data.get("return_mean"),
            "cloning": cloning,
        }
        curve(folder.file("curve.png"), f"{task.title}: real return while extracting", series(rows, "real_return"),
              series(rows, "imagined_return"), levels=levels)  # fmt: skip
        joint_q = results[best].joint_q
        if joint_q is not None:
            rollout_gif(folder.file("rollout.gif"), task.name, joint_q)
    summary = summarise(
        task=task.name,
        seeds=seeds,
        steps=job.steps_done,
        returns=[r.returns.tolist() for r in results],
        evaluation_seed=EVALUATION_SEED,
        random_return=task.random_return,
        paper_return=task.paper_return,
        seconds=phases.seconds,
        backend=backend.resolve(device=options.device),
        precision=options.precision,
        data_mean=data.get("return_mean"),
        data_best=data.get("return_best"),
        cloning_return=cloning,
        finetune=options.finetune,
    )
    folder.write_summary(summary)
    warnings = []
    gauge = float(np.mean([r["imagined_over_real"] for r in rows[-len(seeds) :]])) if rows else 1.0
    if gauge > EXPLOITED:
        warnings.append(f"imagined reward is {gauge:.1f} times the real one: the policy exploits the model's errors")
    for i, seed in enumerate(seeds):
        if job.rounds.diverged()[i]:
            warnings.append(f"seed {seed} diverged; its policy is the best one before that")
    print_closing(console, summary, folder.path, warnings)
    return folder.path


if __name__ == "__main__":
    sys.exit(run_command(Options, main, "pwm_fast.extract"))
