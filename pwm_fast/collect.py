"""python -m pwm_fast.collect --task humanoid --policy shac --minutes 40 --out DIR: make an episode store.

    --policy shac        dflex tasks: train SHAC through the differentiable simulator and record everything it does
    --policy sac         any other task: train Stable-Baselines3's SAC and record everything it does
    --policy expert      Meta-World: the scripted expert at noise levels from none to random
    --policy planning    dm_control: MPPI in MuJoCo itself, or any task: in a world model (--world-model FILE)
    --policy random, or the folder of a saved policy: record a fixed policy

Several tasks (--task mw-reach mw-drawer-open) share one store, numbered as MT30 and MT80 number them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pwm_fast import backend
from pwm_fast.baselines import physics_planning
from pwm_fast.baselines.actor_policy import load_policy
from pwm_fast.baselines.experts import NOISE_LEVELS, expert_source
from pwm_fast.baselines.model_free import SACConfig
from pwm_fast.baselines.model_planning import default_planning, find_guide, model_source
from pwm_fast.baselines.mppi import with_samples
from pwm_fast.baselines.sac_collection import collect_sac
from pwm_fast.baselines.shac_collection import collect_shac
from pwm_fast.baselines.shac_training import default_config
from pwm_fast.data.collect import NoisyPolicy, RandomActions, Source, collect_episodes, policy_source
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.envs import registry
from pwm_fast.errors import Interrupted, positive, run_command
from pwm_fast.models.world_model import WorldModel
from pwm_fast.progress import make_console, number_text, resume_command

DEFAULT_MINUTES = 40.0
DEFAULT_EPISODES = 256
DFLEX_BATCH, SUITE_BATCH = 64, 24  # episodes simulated at once
SAVED = "a saved policy"
KINDS = ("shac", "sac", "expert", "planning", "random")
USED_BY = {  # which kinds of policy an option is for, where it is not for all
    "minutes": ("shac", "sac"),
    "steps": ("shac", "sac"),
    "evaluation_episodes": ("shac",),
    "checkpoint_minutes": ("shac", "sac"),
    "sac": ("sac",),
    "noise": (SAVED,),
    "noise_levels": ("expert", "planning"),
    "world_model": ("planning",),
    "guide": ("planning",),
    "horizon": ("planning",),
    "samples": ("planning",),
    "processes": ("planning",),
}


@dataclass
class Options:
    """Record episodes into a store that pretrain and extract read."""

    task: tuple[str, ...]
    """Task names (python -m pwm_fast.tasks lists them)."""
    out: Path
    """Folder of the store; what a training needs to go on lies in OUT/shac or OUT/sac."""
    policy: str = "shac"
    """shac, sac, expert, planning, random, or the folder of a saved policy."""
    minutes: float | None = None
    """shac, sac: training time of each task (default 40 unless --steps is given)."""
    steps: int | None = None
    """shac, sac: environment steps; a run is then a function of its seed."""
    episodes: int = DEFAULT_EPISODES
    """How many episodes of each task (shac: of its best policy, at the end)."""
    evaluation_episodes: int = 64
    """shac: episodes per evaluation; the best evaluation decides which policy is kept."""
    noise: float = 0.0
    """A saved policy: standard deviation of the normal noise added to actions."""
    noise_levels: tuple[float, ...] = NOISE_LEVELS
    """expert, planning: shares of random in the actions, episode by episode (0: none, 1: random actions)."""
    sac: SACConfig = field(default_factory=SACConfig)
    """sac: its settings."""
    world_model: Path | None = None
    """planning: plan in this world model, ours or a checkpoint of TD-MPC2, instead of in MuJoCo."""
    guide: Path | None = None
    """planning in a world model: the run of an extraction from it, whose actor and critics guide the search."""
    horizon: int | None = None
    """planning: actions of a plan (default: 3 with a guide, 16 without, 12 in MuJoCo, each kept for 5 steps)."""
    samples: int | None = None
    """planning: action sequences per iteration (default 512 in a world model, 24 in MuJoCo)."""
    processes: int = 1
    """planning in MuJoCo: episodes at once; the data does not depend on it."""
    seed: int = 0
    """Of everything random."""
    num_envs: int | None = None
    """Environments simulated at once (default 64 for dflex tasks, else 24)."""
    threads: int | None = None
    """CPU threads of the simulator (dflex; default 2)."""
    max_transitions: int = 2_000_000
    """Cap of the store; where shac gives more, episodes spread evenly over the training are kept."""
    resume: bool = False
    """Continue the collection in --out."""
    checkpoint_minutes: float = 1.0
    """shac, sac: time between checkpoints."""


def main(options: Options) -> int:
    tasks = [registry.get(name) for name in options.task]
    if not tasks:
        raise ValueError("--task must name at least one task (python -m pwm_fast.tasks lists them), got none")
    for name in (
        "minutes",
        "steps",
        "episodes",
        "num_envs",
        "threads",
        "max_transitions",
        "checkpoint_minutes",
        "horizon",
        "samples",
    ):
        if (value := getattr(options, name)) is not None:
            positive(name, value)
    if not options.noise >= 0:
        raise ValueError(f"noise must be >= 0, got {options.noise}")
    kind = options.policy if options.policy in KINDS else SAVED
    _refuse_unused(options, kind)
    console = make_console()
    console.print(backend.describe())
    try:
        if kind == "shac":
            _collect_shac(tasks, options, console)
        elif kind == "sac":
            _collect_sac(tasks, options, console)
        else:
            _collect_episodes(tasks, kind, options, console)
    except Interrupted as stop:
        command = resume_command("pwm_fast.collect", options.out)
        raise Interrupted(f"{stop}; resume with: {command}", stop.code) from None
    _show(options.out, console)
    return 0


def _refuse_unused(options: Options, kind: str) -> None:
    """Raises ValueError for an option that this kind of policy would not look at."""
    for item in fields(options):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        kinds = USED_BY.get(item.name, (kind,))
        if kind not in kinds and getattr(options, item.name) != default:
            name = item.name.replace("_", "-")
            raise ValueError(f"--{name} is for {' and '.join(kinds)}, not for --policy {options.policy}: leave it out")


def _collect_episodes(tasks: list[registry.Task], kind: str, options: Options, console: Console) -> None:
    """Everything whose episodes are independent of one another."""
    asked = {"task": list(options.task), "policy": options.policy, "noise": options.noise, "seed": options.seed}
    make: Callable[[registry.Task], Source]
    if kind == "expert":
        asked["noise"] = list(options.noise_levels)
        make = lambda task: expert_source(task, options.seed, options.noise_levels)  # noqa: E731
    elif kind == "planning":
        make = _planning(options, asked)
    else:
        make = lambda task: (_random if kind == "random" else _saved)(task, options)  # noqa: E731
    batch = options.num_envs or (DFLEX_BATCH if tasks[0].suite == "dflex" else SUITE_BATCH)
    if kind == "planning" and options.world_model is None:
        batch = options.num_envs or 2 * options.processes
    collect_episodes(
        options.out,
        [make(task) for task in tasks],
        options=asked,
        episodes=options.episodes,
        batch=batch,
        max_transitions=options.max_transitions,
        resume=options.resume,
        console=console,
    )


def _planning(options: Options, asked: dict[str, Any]) -> Callable[[registry.Task], Source]:
    """How to make the episodes of a task, in MuJoCo or in a world model; what was asked for goes into `asked`."""
    names = ("world_model", "guide", "horizon", "samples")
    chosen = {name: getattr(options, name) for name in names}
    asked |= {"noise": list(options.noise_levels)}
    asked |= {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}
    given = {name: value for name, value in chosen.items() if name in ("horizon", "samples") and value is not None}
    if options.world_model is None:
        if options.guide is not None:
            raise ValueError("--guide is for planning in a world model; give --world-model too")
        config = with_samples(physics_planning.DEFAULT, **given)
        return lambda task: physics_planning.physics_source(
            task, options.seed, options.noise_levels, config, processes=options.processes
        )
    model = WorldModel.load(options.world_model)
    guide = find_guide(options.world_model, model, options.guide)

    def source(task: registry.Task) -> Source:
        config = with_samples(default_planning(task, guide is not None), **given)
        return model_source(task, model, options.seed, options.noise_levels, guide, config, options.threads)

    return source


def _random(task: registry.Task, options: Options) -> Source:
    make = lambda seed: RandomActions(task.action_dim, seed)  # noqa: E731
    return policy_source(task, make, "random actions", options.seed, options.threads)


def _saved(task: registry.Task, options: Options) -> Source:
    policy = load_policy(options.policy)
    if (policy.obs_dim, policy.action_dim) != (task.obs_dim, task.action_dim):
        raise ValueError(
            f"{options.policy} is a policy for {policy.task} ({policy.obs_dim} observations, {policy.action_dim} "
            f"actions); task {task.name} has {task.obs_dim} and {task.action_dim}"
        )
    title = f"policy {options.policy}, noise {options.noise:g}"
    make = lambda seed: NoisyPolicy(policy, options.noise, seed)  # noqa: E731
    return policy_source(task, make, title, options.seed, options.threads)


def _collect_shac(tasks: list[registry.Task], options: Options, console: Console) -> None:
    if len(tasks) != 1 or tasks[0].suite != "dflex":
        raise ValueError(f"--policy shac is for one dflex task, got {' '.join(options.task)}; use --policy sac")
    task = tasks[0]
    collect_shac(
        task.name,
        options.out,
        minutes=_minutes(options),
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


def _collect_sac(tasks: list[registry.Task], options: Options, console: Console) -> None:
    collect_sac(
        options.out,
        tasks,
        minutes=_minutes(options),
        steps=options.steps,
        seed=options.seed,
        config=options.sac,
        max_transitions=options.max_transitions,
        resume=options.resume,
        checkpoint_seconds=60 * options.checkpoint_minutes,
        console=console,
    )


def _minutes(options: Options) -> float | None:
    return DEFAULT_MINUTES if options.minutes is None and options.steps is None else options.minutes


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
