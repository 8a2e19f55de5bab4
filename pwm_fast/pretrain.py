"""python -m pwm_fast.pretrain --task humanoid --data DIR --size 5M --steps 10000: learn a world model from episodes.

Writes OUT/world_model.safetensors, OUT/metrics.csv and OUT/checkpoint.safetensors (for --resume, exact).
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pwm_fast import backend
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.envs import registry
from pwm_fast.errors import check_device, positive, run_command
from pwm_fast.learning.pretraining import PRESETS, StoreTraining
from pwm_fast.learning.pretraining_graph import PretrainingGraph
from pwm_fast.models.world_model import WorldModel, WorldModelConfig
from pwm_fast.progress import Interrupt, Progress, resume_command
from pwm_fast.run_folder import RunFolder, latest_path, new_path, versions

LOG_EVERY, VALIDATE_EVERY = 50, 500
TERMINATION_DIM = 128


@dataclass
class Options:
    """Learn a world model from an episode store."""

    task: str
    """Task name (python -m pwm_fast.tasks lists them)."""
    data: Path
    """Episode store, e.g. one that pwm_fast.collect wrote."""
    size: str = "5M"
    """World-model size: 1M, 5M, 19M, 48M, 317M."""
    steps: int = 10_000
    """Gradient steps."""
    latent: Literal["observation", "simnorm"] = "observation"
    """Latent state: the normalised observation with residual dynamics, or TD-MPC2's learned one."""
    batch_size: int | None = None
    """Windows per step (default: 1024 for observation, 256 for simnorm)."""
    horizon: int | None = None
    """Transitions per window (default: 1 for observation, 16 for simnorm)."""
    out: Path | None = None
    """Folder to write (default: runs/pretrain-TASK)."""
    resume: bool = False
    """Continue the run in --out exactly."""
    seed: int = 0
    """Of initialisation, split and batches."""
    device: str = "cpu"
    """cpu or cuda; there a step is one captured graph."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of matrix products (tf32), or autocast with float32 parameters (bf16); below fp32 needs a GPU."""
    threads: int | None = None
    """CPU threads (default: all)."""
    checkpoint_minutes: float = 2.0
    """Time between checkpoints."""


def main(options: Options) -> int:
    for name in ("steps", "batch_size", "horizon", "checkpoint_minutes"):
        if getattr(options, name) is not None:
            positive(name, getattr(options, name))
    check_device(options.device, options.precision)
    task = registry.get(options.task)
    if options.threads is not None:
        positive("threads", options.threads)
        torch.set_num_threads(options.threads)
    name = f"pretrain-{task.name}"
    out = options.out or (latest_path(name) if options.resume else new_path(name))
    store = EpisodeStore.open(options.data)
    if (store.obs_dim, store.action_dim) != (task.obs_dim, task.action_dim):
        raise ValueError(
            f"{options.data} has {store.obs_dim} observations and {store.action_dim} actions, task {task.name} has "
            f"{task.obs_dim} and {task.action_dim}: is it another task's data?"
        )
    torch.manual_seed(options.seed)
    architecture = WorldModelConfig.of_size(
        options.size, task.obs_dim, task.action_dim, options.latent, termination_dim=TERMINATION_DIM
    )
    usual = PRESETS[options.latent]
    config = replace(
        usual,
        steps=options.steps,
        batch_size=options.batch_size or usual.batch_size,
        horizon=options.horizon or usual.horizon,
        precision=options.precision,
    )
    model = WorldModel(architecture).to(options.device)
    with RunFolder(out, resume=options.resume) as folder:
        recorded = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
        folder.begin(recorded, free=("out", "resume", "threads", "checkpoint_minutes"))
        where = f"{options.device} {options.precision}"
        print(f"{backend.describe(options.device)} · {where} · {torch.get_num_threads()} threads")
        print(f"world model {options.size}: {model.num_parameters / 1e6:.2f}M parameters · data: {store!r}")
        training = StoreTraining(store, model, config, options.seed)
        state = folder.load_checkpoint() if options.resume else None
        if state is not None:
            training.pretraining.load_state_dict(state)
        _run(training, folder, options, task.name)
        model.provenance = provenance(task.name, options, training, store)
        model.save(folder.file("world_model.safetensors"))
        print(f"world model: {folder.file('world_model.safetensors')}")
    return 0


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


def provenance(task: str, options: Options, training: StoreTraining, store: EpisodeStore) -> dict[str, Any]:
    """What a reader of the model file should know of its making."""
    config = training.pretraining.config
    returns = np.asarray(training.statistics["returns"])
    return {
        "task": task,
        "command": f"python -m pwm_fast.pretrain --task {task} --size {options.size} --latent {options.latent} "
        f"--steps {options.steps} --batch-size {config.batch_size} --horizon {config.horizon} --seed {options.seed}"
        + f" --precision {config.precision}"
        * (config.precision != "fp32"),
        "data": {
            "episodes": store.num_episodes,
            "transitions": store.num_transitions,
            "return_mean": float(returns.mean()),
            "return_best": float(returns.max()),
            "meta": store.meta,
        },
        "validation": training.validate(),
        "versions": versions(),
    }


if __name__ == "__main__":
    sys.exit(run_command(Options, main, "pwm_fast.pretrain"))
