"""What a run achieved: the summary that is saved, and the table that closes a command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pwm_fast.errors import positive
from pwm_fast.progress import clock_text, number_text
from pwm_fast.run_folder import FILES, versions

EPISODES, SUITE_EPISODES = 16, 10  # of dflex and of the other suites, as TD-MPC2 evaluates them

if TYPE_CHECKING:
    from pwm_fast.envs.evaluation import EpisodeResults
    from pwm_fast.models.policy import Policy


def summarise(
    *,
    task: str,
    seeds: Sequence[int],
    steps: int,
    returns: Sequence[Sequence[float]],
    evaluation_seed: int,
    random_return: float | None,
    paper_return: float | None,
    seconds: Mapping[str, float],
    backend: str,
    precision: str,
    **more: Any,
) -> dict[str, Any]:
    """The content of summary.json.

    `returns` [seeds][episodes] are undiscounted real returns of each seed's policy; `return_mean` and `return_std` are
    over all of them. `more` (data_mean, data_best, cloning_return, ...) is kept as it is.
    """
    table = np.asarray(returns, dtype=np.float64)
    if table.ndim != 2 or len(table) != len(seeds) or not table.size:
        raise ValueError(f"returns must be [{len(seeds)} seeds, episodes], got shape {list(table.shape)}")
    means = table.mean(1)
    return {
        "task": task,
        "seeds": list(seeds),
        "steps": steps,
        "return_mean": float(table.mean()),
        "return_std": float(table.std()),
        "returns": table.tolist(),
        "best_seed": seeds[int(means.argmax())],
        "random_return": random_return,
        "paper_return": paper_return,
        "evaluation": {"seed": evaluation_seed, "episodes": table.shape[1]},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "backend": backend,
        "precision": precision,
        "versions": versions(),
        **more,
    }


def result_table(summary: Mapping[str, Any]) -> Table:
    """Real return beside everything it should be compared with."""
    seeds, returns = summary["seeds"], np.asarray(summary["returns"])
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    paper = summary.get("paper_return")
    share = f", {summary['return_mean'] / paper:.0%} of the paper's" if paper else ""
    runs = f"{len(seeds)} seeds x " if len(seeds) > 1 else ""
    spread = f"{number_text(summary['return_mean'])} ± {number_text(summary['return_std'])}"
    table.add_row(
        Text("real return", style="bold"), Text(spread, style="bold green"), f"{runs}{returns.shape[1]} episodes{share}"
    )
    if summary.get("score") is not None:
        table.add_row("score", Text(f"{summary['score']:.1f}", style="bold green"), "of 100, as TD-MPC2 and PWM count")
    if len(seeds) > 1:
        for seed, row in zip(seeds, returns):
            best = "the best, saved at the top" if seed == summary.get("best_seed") else ""
            table.add_row(f"  seed {seed}", f"{number_text(row.mean())} ± {number_text(row.std())}", best)
    for label, key, remark in (
        ("random policy", "random_return", ""),
        ("the paper's PWM", "paper_return", "arXiv 2407.02466"),
        ("data, mean", "data_mean", "episodes the world model learned from"),
        ("data, best", "data_best", ""),
        ("behaviour cloning", "cloning_return", "on the same data"),
    ):
        if summary.get(key) is not None:
            table.add_row(label, number_text(summary[key]), remark)
    seconds = summary.get("seconds") or {}
    if seconds:
        by_phase = ", ".join(f"{name} {clock_text(value)}" for name, value in seconds.items())
        table.add_row("time", clock_text(sum(seconds.values())), by_phase)
    return table


def files_table(folder: Path, names: Iterable[str] = FILES) -> Table:
    """The files a run left and what they are."""
    table = Table.grid(padding=(0, 3))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(style="dim")
    for name in names:
        if (folder / name).exists():
            table.add_row(str(folder / name), FILES.get(name, ""))
    others = sorted(path.name for path in folder.glob("seed_*") if path.is_dir())
    if others:
        table.add_row(f"{folder / others[0]} ...", f"the policies of all {len(others)} seeds")
    return table


def print_closing(console: Console, summary: Mapping[str, Any], folder: Path, warnings: Iterable[str] = ()) -> None:
    """The closing table of a command."""
    console.print()
    console.rule(Text(summary["task"], style="bold"), align="left")
    console.print(result_table(summary))
    for warning in warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    console.print()
    console.print(files_table(folder))


def real_returns(
    policy: Policy, task: str, episodes: int, seed: int, *, record: bool = False, threads: int | None = None
) -> EpisodeResults:
    """Run a policy in its real simulator, one episode per environment; the number in summary.json comes from here.

    Deterministic in (policy, task, episodes, seed): the networks run on one thread, so that sums keep their order;
    `threads` (of the simulator) change nothing. `record` also returns the episodes and the joint positions of the
    first environment, for pictures.
    """
    import torch

    from pwm_fast.envs.evaluation import evaluate

    positive("episodes", episodes)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return evaluate(task, policy.act, episodes, seed, record=record, threads=threads)
    finally:
        torch.set_num_threads(before)
