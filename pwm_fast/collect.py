"""python -m pwm_fast.collect --task humanoid --policy shac --minutes 40 --out DIR: make an episode store.

    --policy shac        dflex tasks: train SHAC through the differentiable simulator and record everything it does
    --policy sac         any other task: train Stable-Baselines3's SAC and record everything it does
    --policy expert      Meta-World: the scripted expert at noise levels from none to random
    --policy planning    dm_control: MPPI in MuJoCo itself, or any task: in a world model (--world-model FILE)
    --policy random, or the folder of a saved policy: record a fixed policy

Several tasks share one store, numbered as MT30 and MT80 number them, and may each have a policy of their own:
--task mw-reach mw-drawer-open cartpole-swingup --policy expert expert sac.
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
from pwm_fast.baselines.sac_collection import collect_sac, refuse_without_sac, settings
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
NUMBERS = ("minutes", "steps", "episodes", "num_envs", "threads", "max_transitions", "checkpoint_minutes", "horizon",
           "samples", "processes")  # fmt: skip
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
    policy: tuple[str, ...] = ("shac",)
    """shac, sac, expert, planning, random, or the folder of a saved policy; one for all tasks, or one for each."""
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
    for name in NUMBERS:
        if (value := getattr(options, name)) is not None:
            positive(name, value)
    if not options.noise >= 0:
        raise ValueError(f"noise must be >= 0, got {options.noise}")
    if len(options.policy) not in (1, len(tasks)):
        raise ValueError(f"--policy must name one for all tasks or one for each, got {len(options.policy)} policies")
    policies = list(options.policy) * (len(tasks) if len(options.policy) == 1 else 1)
    _refuse_unused(options, {_kind(policy) for policy in policies})
    console = make_console()
    console.print(backend.describe())
    try:
        if "shac" in policies:
            _collect_shac(tasks, options, console)
        else:
            _collect(tasks, policies, options, console)
    except Interrupted as stop:
        command = resume_command("pwm_fast.collect", options.out)
        raise Interrupted(f"{stop}; resume with: {command}", stop.code) from None
    _show(options.out, console)
    return 0


def _kind(policy: str) -> str:
    return policy if policy in KINDS else SAVED


def _refuse_unused(options: Options, kinds: set[str]) -> None:
    """Raises ValueError for an option that none of these kinds of policy would look at."""
    for item in fields(options):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        users = USED_BY.get(item.name)
        if users and not kinds & set(users) and getattr(options, item.name) != default:
            name, given = item.name.replace("_", "-"), " ".join(options.policy)
            raise ValueError(f"--{name} is for {' and '.join(users)}, not for --policy {given}: leave it out")


def _collect(tasks: list[registry.Task], policies: list[str], options: Options, console: Console) -> None:
    """Episodes that are independent of one another first, then what SAC learns from."""
    asked: dict[str, Any] = {"task": list(options.task), "policy": " ".join(options.policy), "seed": options.seed}
    names = ("noise", "world_model", "guide", "horizon", "samples")
    asked |= {name: str(v) if isinstance(v := getattr(options, name), Path) else v for name in names}
    asked |= {"noise_levels": list(options.noise_levels), "sac": settings(options.sac)}
    learning = [task for task, policy in zip(tasks, policies) if policy == "sac"]
    if learning:
        refuse_without_sac(learning, _minutes(options), options.steps)
    pairs = [(task, policy) for task, policy in zip(tasks, policies) if policy != "sac"]
    batch = options.num_envs or (DFLEX_BATCH if tasks[0].suite == "dflex" else SUITE_BATCH)
    if "planning" in policies and options.world_model is None:
        batch = options.num_envs or 2 * options.processes
    if pairs:
        collect_episodes(
            options.out,
            _sources(pairs, options),
            options=asked,
            episodes=options.episodes,
            batch=batch,
            max_transitions=options.max_transitions,
            resume=options.resume,
            tasks=tasks,
            console=console,
        )
    if learning:
        collect_sac(
            options.out,
            learning,
            minutes=_minutes(options),
            steps=options.steps,
            seed=options.seed,
            config=options.sac,
            max_transitions=options.max_transitions,
            resume=options.resume,
            checkpoint_seconds=60 * options.checkpoint_minutes,
            store_tasks=tasks if pairs else None,
            options=asked,
            console=console,
        )


def _sources(pairs: list[tuple[registry.Task, str]], options: Options) -> list[Source]:
    """What gives the episodes of each task."""
    planning = _planning(options) if any(policy == "planning" for _, policy in pairs) else None
    sources = []
    for task, policy in pairs:
        if policy == "expert":
            sources.append(expert_source(task, options.seed, options.noise_levels))
        elif policy == "planning":
            assert planning is not None
            sources.append(planning(task))
        else:
            sources.append(_random(task, options) if policy == "random" else _saved(task, policy, options))
    return sources


def _planning(options: Options) -> Callable[[registry.Task], Source]:
    """How to make the episodes of a task, in MuJoCo or in a world model."""
    given = {name: v for name in ("horizon", "samples") if (v := getattr(options, name)) is not None}
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


def _saved(task: registry.Task, path: str, options: Options) -> Source:
    policy = load_policy(path)
    if (policy.obs_dim, policy.action_dim) != (task.obs_dim, task.action_dim):
        raise ValueError(
            f"{path} is a policy for {policy.task} ({policy.obs_dim} observations, {policy.action_dim} "
            f"actions); task {task.name} has {task.obs_dim} and {task.action_dim}"
        )
    title = f"policy {path}, noise {options.noise:g}"
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
