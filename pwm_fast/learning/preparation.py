"""A world model for a task that has none yet: collect data with SHAC, learn from it, keep both in the user's cache."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from rich.console import Console

from pwm_fast.baselines.shac_collection import collect_shac
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.envs import registry
from pwm_fast.learning.pretraining import PRESETS
from pwm_fast.learning.store_training import StoreTraining
from pwm_fast.models.world_model import WorldModel, WorldModelConfig
from pwm_fast.progress import Interrupt, Progress
from pwm_fast.run_folder import versions
from pwm_fast.shipped import DATA, MODEL, Prepared, cache_root, cached

COLLECTION_SHARE = 0.65  # of the time: the policy can be no better than what the data shows of the task
TERMINATION_DIM = 128
MEASURED_STEPS = 20


def prepare(task: str, minutes: float, size: str, seed: int, threads: int | None, console: Console) -> Prepared:
    """Collect and pre-train within `minutes`; an interrupted call continues where it was.

    Raises Interrupted on Ctrl-C, OSError where the cache cannot be written.
    """
    row, folder = registry.get(task), cache_root() / task
    data = folder / DATA
    started = time.monotonic()
    console.print(f"no world model for {task} yet: building one in {minutes:.1f} minutes, kept in {folder}")
    resume = (data / "meta.json").exists()
    collect_shac(
        task,
        data,
        minutes=COLLECTION_SHARE * minutes,
        seed=seed,
        threads=threads,
        best_episodes=64,
        resume=resume,
        console=console,
    )
    store = EpisodeStore.open(data)
    left = max(60 * minutes - (time.monotonic() - started), 0.3 * 60 * minutes)
    torch.manual_seed(seed)
    model = WorldModel(
        WorldModelConfig.of_size(size, row.obs_dim, row.action_dim, "observation", termination_dim=TERMINATION_DIM)
    )
    training = StoreTraining(store, model, PRESETS[model.config.latent], seed)
    steps = pretrain_for(training, left, f"world model of {task}", console)
    returns = training.statistics["returns"]
    model.provenance = {
        "task": task,
        "command": f"SHAC data ({COLLECTION_SHARE * minutes:.1f} minutes) and {steps} model steps of size {size}",
        "data": {
            "episodes": store.num_episodes,
            "transitions": store.num_transitions,
            "return_mean": float(returns.mean()),
            "return_best": float(returns.max()),
        },
        "validation": training.validate(),
        "versions": versions(),
    }
    model.save(folder / MODEL)
    found = cached(task)
    assert found is not None
    return replace(found, origin=f"built now, in {folder}")


def pretrain_for(training: StoreTraining, seconds: float, title: str, console: Console) -> int:
    """As many model steps as fit into `seconds`, the learning rate decaying over them; returns how many."""
    learner, begun = training.pretraining, time.monotonic()
    for _ in range(MEASURED_STEPS):
        learner.step()
    each = (time.monotonic() - begun) / MEASURED_STEPS
    total = max(int(0.95 * seconds / each), MEASURED_STEPS)
    learner.config = replace(learner.config, steps=total)
    with Interrupt() as interrupt, Progress(title, total, start=MEASURED_STEPS, console=console) as progress:
        while learner.step_count < total and time.monotonic() - begun < seconds and not interrupt:
            terms = learner.step()
            progress.update(learner.step_count, consistency=terms["consistency"], reward=terms["reward"])
        interrupt.raise_if_set("the collected data is kept: run the same command again")
    return learner.step_count
