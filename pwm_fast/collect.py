"""python -m pwm_fast.collect --task humanoid --policy shac --minutes 40 --out DIR: make an episode store.

`--policy shac` trains SHAC through the differentiable simulator and records everything it does, from random to its
best; `--policy random` and `--policy PATH` (a saved policy's folder) record a fixed policy for --episodes episodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pwm_fast import backend
from pwm_fast.baselines.actor_policy import load_policy
from pwm_fast.baselines.shac_collection import collect_shac
from pwm_fast.baselines.shac_training import default_config
from pwm_fast.data.collect import NoisyPolicy, RandomActions, collect_policy
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.envs import registry
from pwm_fast.errors import Interrupted, positive, run_command
from pwm_fast.progress import make_console, number_text, resume_command

DEFAULT_MINUTES = 40.0


@dataclass
class Options:
    """Record episodes into a store that pretrain and extract read."""

    task: str
    """Task name (python -m pwm_fast.tasks lists them)."""
    out: Path
    """Folder of the store; for shac, the run and its policy go to OUT/shac."""
    policy: str = "shac"
    """shac, random, or the folder of a saved policy."""
    minutes: float | None = None
    """shac: training time, evaluations included (default 40 unless --steps is given)."""
    steps: int | None = None
    """shac: environment steps; the learning-rate schedule then follows them, and a run is a function of its seed."""
    episodes: int = 256
    """random, PATH: how many episodes. shac: how many of its best policy at the end."""
    evaluation_episodes: int = 64
    """shac: episodes per evaluation; the best evaluation decides which policy is kept."""
    noise: float = 0.0
    """PATH: standard deviation of the normal noise added to actions."""
    seed: int = 0
    """Of everything random."""
    num_envs: int | None = None
    """Environments simulated at once (default 64)."""
    threads: int | None = None
    """CPU threads of the simulator (default 2)."""
    max_transitions: int = 2_000_000
    """Cap of the store; where more come, episodes spread evenly over the training are kept."""
    resume: bool = False
    """Continue the collection in --out."""
    checkpoint_minutes: float = 1.0
    """shac: time between checkpoints."""


def main(options: Options) -> int:
    task = registry.get(options.task)
    for name in ("minutes", "steps", "episodes", "num_envs", "threads", "max_transitions", "checkpoint_minutes"):
        if (value := getattr(options, name)) is not None:
            positive(name, value)
    if not options.noise >= 0:
        raise ValueError(f"noise must be >= 0, got {options.noise}")
    console = make_console()
    console.print(backend.describe())
    try:
        (_collect_shac if options.policy == "shac" else _collect_policy)(task, options, console)
    except Interrupted as stop:
        command = resume_command("pwm_fast.collect", options.out)
        raise Interrupted(f"{stop}; resume with: {command}", stop.code) from None
    _show(options.out, console)
    return 0


def _collect_shac(task: registry.Task, options: Options, console: Console) -> None:
    minutes = DEFAULT_MINUTES if options.minutes is None and options.steps is None else options.minutes
    collect_shac(
        task.name,
        options.out,
        minutes=minutes,
        steps=options.steps,
        seed=options.seed,
        config=None if options.num_envs is None else default_config(task.name, options.num_envs),
        threads=options.threads,
        max_transitions=options.max_transitions,
        best_episodes=options.episodes,
        evaluation_episodes=options.evaluation_episodes,
        resume=options.resume,
        checkpoint_seconds=60 * options.checkpoint_minutes,
        console=console,
    )


def _collect_policy(task: registry.Task, options: Options, console: Console) -> None:
    if options.minutes is not None or options.steps is not None:
        raise ValueError("--minutes and --steps are for --policy shac; give --episodes")
    make_policy: Callable[[int], Callable[[np.ndarray], np.ndarray]]
    if options.policy == "random":
        if options.noise:
            raise ValueError("--noise is for a saved policy; --policy random is noise already")
        title = "random actions"
        make_policy = lambda seed: RandomActions(task.action_dim, seed)  # noqa: E731
    else:
        policy = load_policy(options.policy)
        if (policy.obs_dim, policy.action_dim) != (task.obs_dim, task.action_dim):
            raise ValueError(
                f"{options.policy} is a policy for {policy.task} ({policy.obs_dim} observations, {policy.action_dim} "
                f"actions); task {task.name} has {task.obs_dim} and {task.action_dim}"
            )
        title = f"policy {options.policy}, noise {options.noise:g}"
        make_policy = lambda seed: NoisyPolicy(policy, options.noise, seed)  # noqa: E731
    collect_policy(
        options.out,
        task,
        make_policy,
        title=title,
        options={"task": task.name, "policy": options.policy, "noise": options.noise, "seed": options.seed},
        episodes=options.episodes,
        batch=options.num_envs or 64,
        seed=options.seed,
        threads=options.threads,
        max_transitions=options.max_transitions,
        resume=options.resume,
        console=console,
    )


def _show(path: Path, console: Console) -> None:
    """What the store now is a mixture of."""
    store = EpisodeStore.open(path)
    title = f"{path}: {store.num_episodes:,} episodes, {store.num_transitions:,} transitions"
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    for name in ("episodes", "transitions", "length", "return: mean", "median", "best"):
        table.add_column(name, justify="right")
    for row in store.meta["collect"]["mixture"]:
        counts = (f"{row['episodes']:,}", f"{row['transitions']:,}", number_text(row["length_mean"]))
        returns = (row["return_mean"], row["return_quantiles"]["0.5"], row["return_quantiles"]["1"])
        table.add_row(row["phase"], *counts, *map(number_text, returns))
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(run_command(Options, main, "pwm_fast.collect"))
