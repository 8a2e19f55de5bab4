"""python -m pwm_fast.pretrain --task humanoid --data DIR --size 5M --steps 10000: learn a world model from episodes.

Several tasks (--task mw-reach mw-drawer-open --data DIR [DIR ...]) make one world model with task embeddings, numbered
and padded as MT30 or MT80, every task with the same share of a batch; each store may hold one task or several.
Writes OUT/world_model.safetensors, OUT/metrics.csv and OUT/checkpoint.safetensors (for --resume, exact).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pwm_fast import backend
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.envs import registry
from pwm_fast.errors import check_device, positive, run_command
from pwm_fast.learning.pretraining import PRESETS
from pwm_fast.learning.pretraining_graph import PretrainingGraph
from pwm_fast.learning.store_training import StoreTraining
from pwm_fast.learning.task_windows import TaskData, TaskSpace, returns
from pwm_fast.models.world_model import WorldModel, WorldModelConfig
from pwm_fast.progress import Interrupt, Progress, resume_command
from pwm_fast.run_folder import RunFolder, latest_path, new_path, versions

LOG_EVERY, VALIDATE_EVERY = 50, 500
TERMINATION_DIM = 128
ENDING = ("dflex", "gymnasium")  # suites whose episodes may end before their time


@dataclass
class Options:
    """Learn a world model from an episode store."""

    task: tuple[str, ...]
    """Task names (python -m pwm_fast.tasks lists them)."""
    data: tuple[Path, ...]
    """Episode stores, e.g. those that pwm_fast.collect wrote."""
    size: str = "5M"
    """World-model size: 1M, 5M, 19M, 48M, 317M."""
    steps: int = 10_000
    """Gradient steps."""
    latent: Literal["observation", "simnorm"] | None = None
    """Latent state: the normalised observation with residual dynamics (default of one task), or TD-MPC2's learned one
    (default of several)."""
    batch_size: int | None = None
    """Windows per step (default: 1024 for observation, 256 for simnorm)."""
    horizon: int | None = None
    """Transitions per window (default: 1 for observation, 16 for simnorm)."""
    out: Path | None = None
    """Folder to write (default: runs/pretrain-TASK, of several tasks runs/pretrain-N-tasks)."""
    resume: bool = False
    """Continue the run in --out exactly."""
    seed: int = 0
    """Of initialisation, split and batches."""
    device: str = "cpu"
    """cpu or cuda; there a step is one captured graph."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of matrix products (tf32: a GPU or AMX), or autocast with float32 parameters (bf16: a GPU)."""
    threads: int | None = None
    """CPU threads (default: all)."""
    checkpoint_minutes: float = 2.0
    """Time between checkpoints."""


def main(options: Options) -> int:
    for name in ("steps", "batch_size", "horizon", "checkpoint_minutes"):
        if getattr(options, name) is not None:
            positive(name, getattr(options, name))
    check_device(options.device, options.precision, [p for p in backend.cpu_precisions() if p != "bf16"])
    tasks = [registry.get(name) for name in options.task]
    space = TaskSpace.of(tasks)
    if options.threads is not None:
        positive("threads", options.threads)
        torch.set_num_threads(options.threads)
    title = tasks[0].name if len(tasks) == 1 else f"{len(tasks)}-tasks"
    out = options.out or (latest_path if options.resume else new_path)(f"pretrain-{title}")
    stores = [EpisodeStore.open(path) for path in options.data]
    data = TaskData.of_tasks(stores, tasks, seed=options.seed)
    torch.manual_seed(options.seed)
    architecture = architecture_of(space, tasks, options.size, options.latent)
    usual = PRESETS[architecture.latent]
    config = replace(
        usual,
        steps=options.steps,
        batch_size=options.batch_size or usual.batch_size,
        horizon=options.horizon or usual.horizon,
        precision=options.precision,
    )
    model = WorldModel(architecture).to(options.device)
    with RunFolder(out, resume=options.resume) as folder:
        folder.begin(_recorded(options), free=("out", "resume", "threads", "checkpoint_minutes"))
        where = f"{options.device} {options.precision}"
        print(f"{backend.describe(options.device)} · {where} · {torch.get_num_threads()} threads")
        print(f"world model {options.size}: {model.num_parameters / 1e6:.2f}M parameters")
        for store in stores:
            print(f"data: {store!r}")
        training = StoreTraining(data, model, config, options.seed)
        state = folder.load_checkpoint() if options.resume else None
        if state is not None:
            training.pretraining.load_state_dict(state)
        _run(training, folder, options, title)
        model.provenance = provenance(options, training, stores)
        model.save(folder.file("world_model.safetensors"))
        _show(model.provenance["validation"])
        print(f"world model: {folder.file('world_model.safetensors')}")
    return 0


def architecture_of(space: TaskSpace, tasks: Sequence[registry.Task], size: str, latent: str | None = None
                    ) -> WorldModelConfig:  # fmt: skip
    """The world model of some tasks. Of several it is TD-MPC2's, with its task embedding and rewards of any scale."""
    options: dict[str, Any] = {}
    if len(space.names) > 1:
        wide = len(space.names) > 30 or size in ("1M", "317M")  # as in the published checkpoints
        options = {"num_tasks": len(space.names), "task_dim": 96 if wide else 64}
    latent = latent or ("simnorm" if options else "observation")
    if options and latent == "simnorm":
        options["reward_symlog"] = True
    if any(task.suite in ENDING for task in tasks):
        options["termination_dim"] = TERMINATION_DIM
    return WorldModelConfig.of_size(size, space.obs_dim, space.action_dim, latent, **options)


def _recorded(options: Options) -> dict[str, Any]:
    """The options as JSON has them, those of one task and store as they always were."""
    recorded = asdict(options) | {"data": [str(path) for path in options.data], "task": list(options.task)}
    recorded["out"] = None if options.out is None else str(options.out)
    return {k: v[0] if k in ("task", "data") and len(v) == 1 else v for k, v in recorded.items()}


def _run(training: StoreTraining, folder: RunFolder, options: Options, task: str) -> None:
    """Steps until the end, with checkpoints; raises Interrupted on Ctrl-C once the state is saved."""
    learner = training.pretraining
    saved = time.monotonic()
    with (
        Interrupt() as interrupt,
        Progress(f"pre-training {task}", options.steps, start=learner.step_count) as progress,
    ):
        graph = PretrainingGraph(learner, LOG_EVERY) if options.device.startswith("cuda") else None
        while learner.step_count < options.steps and not interrupt:
            if graph is None:
                terms = learner.step()
            else:  # up to the next row of metrics
                ahead = min(LOG_EVERY - learner.step_count % LOG_EVERY, options.steps - learner.step_count)
                terms = {name: float(values[-1]) for name, values in graph.run(ahead).items()}
            step = learner.step_count
            row: dict[str, Any] = {}
            if step % LOG_EVERY == 0 or step == options.steps:
                row = {"step": step, "learning_rate": learner.learning_rate(step), **terms}
            if step % VALIDATE_EVERY == 0 or step == options.steps:
                row.update(step=step, **training.validate())
            if row:
                folder.add_metrics(row)
            shown = {k: row.get(k) for k in ("latent_error", "return_r2")}
            progress.update(step, consistency=terms["consistency"], reward=terms["reward"], **shown)
            if time.monotonic() - saved > 60 * options.checkpoint_minutes:
                folder.save_checkpoint(learner.state_dict())
                saved = time.monotonic()
        folder.save_checkpoint(learner.state_dict())
        interrupt.raise_if_set(f"saved; resume with: {resume_command('pwm_fast.pretrain', folder.path)}")


def provenance(options: Options, training: StoreTraining, stores: Sequence[EpisodeStore]) -> dict[str, Any]:
    """What a reader of the model file should know of its making.

    `task` is its only task's name; of several, `tasks` are their numbers by name and `action_dims` their actions.
    """
    config, data = training.pretraining.config, training.data
    names = " ".join(options.task)
    found: dict[str, Any] = {"task": options.task[0]}
    if len(options.task) > 1:
        numbers = {data.space.names[number]: number for number in data.tasks}
        found = {"tasks": numbers, "action_dims": {k: data.space.action_dims[i] for k, i in numbers.items()}}
    by_task = {data.space.names[i]: np.concatenate([returns(part) for part in data.only(i).parts]) for i in data.tasks}
    total = [
        {
            "episodes": len(value),
            "transitions": sum(part.transitions for part in data.only(i).parts),
            "return_mean": float(value.mean()),
            "return_best": float(value.max()),
        }
        for i, value in zip(data.tasks, by_task.values())
    ]
    single = len(total) == 1
    return {
        **found,
        "command": f"python -m pwm_fast.pretrain --task {names} --size {options.size} "
        f"--latent {training.pretraining.model.config.latent} --steps {options.steps} "
        f"--batch-size {config.batch_size} --horizon {config.horizon} --seed {options.seed}"
        + f" --precision {config.precision}" * (config.precision != "fp32"),
        "data": (total[0] if single else dict(zip(by_task, total))) | {"meta": stores[0].meta if len(stores) == 1
                                                                       else [store.meta for store in stores]},
        "validation": training.validate(),
        "versions": versions(),
    }  # fmt: skip


def _show(validation: dict[str, float]) -> None:
    """The held-out numbers, a line a task."""
    tasks = {name.rpartition("/")[0]: None for name in validation}
    for task in tasks:
        numbers = {k.rpartition("/")[2]: v for k, v in validation.items() if k.rpartition("/")[0] == task}
        print(f"held out{' ' * bool(task)}{task}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))


if __name__ == "__main__":
    sys.exit(run_command(Options, main, "pwm_fast.pretrain"))
