"""python -m pwm_fast.tasks: the table of tasks and how to run them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from pwm_fast.data.task_table import SETS as MULTI_TASK
from pwm_fast.envs import registry
from pwm_fast.envs.scores import METHODS, published
from pwm_fast.errors import run_command
from pwm_fast.progress import make_console, number_text
from pwm_fast.shipped import cached, shipped


@dataclass(frozen=True)
class Options:
    """List the tasks."""

    set: str | None = None
    """Only the tasks of this set: dflex, mt30, mt80, dm_control or metaworld."""


HEADINGS = {
    "dflex": "differentiable robots",
    "dm_control": "dm_control: MT30, and numbers 0 to 29 of MT80",
    "metaworld": "Meta-World: numbers 30 to 79 of MT80",
}


def model_text(task: str) -> Text:
    """Where the task's world model comes from."""
    if shipped(task):
        return Text("shipped", style="green")
    if cached(task):
        return Text("in this user's cache", style="green")
    return Text("learned on first use" if registry.get(task).suite == "dflex" else "--world-model")


def tasks_table(names: Sequence[str], set: str = "mt80") -> Table:
    """A row per task; published scores are those of a multi-task set."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
    table.add_column("task", style="cyan", no_wrap=True)
    scored = any(registry.get(name).ids for name in names)
    headings = ("number",) * scored + ("obs", "action", "steps", "random", "paper") + METHODS * scored
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("world model", no_wrap=True)
    for name in names:
        task = registry.get(name)
        cells = [str(value) for value in (task.obs_dim, task.action_dim, task.episode_length)]
        returns = (task.random_return, task.paper_return)
        cells += ["-" if value is None else number_text(value) for value in returns]
        if scored:
            runs = [published(set, method).get(name, ()) for method in METHODS]
            cells = [str(task.ids.get(set, "-")), *cells, *(f"{sum(r) / len(r):.1f}" if r else "-" for r in runs)]
        table.add_row(name, *cells, model_text(name))
    return table


def main(options: Options) -> int:
    console = make_console()
    names = registry.names(options.set)
    for suite, heading in HEADINGS.items():
        members = [name for name in names if registry.get(name).suite == suite]
        if members:
            console.rule(Text(heading, style="bold"), align="left")
            console.print(tasks_table(members, options.set if options.set in MULTI_TASK else "mt80"))
            console.print()
    console.print(
        Text("obs, action: entries; steps: length of an episode; random, paper: real return of a random policy")
    )
    console.print(Text("and of PWM in the paper (arXiv 2407.02466). PWM, TD-MPC2: published scores, of 100."))
    console.print(Text("gym:ID is any Gymnasium environment with continuous actions, such as gym:Pendulum-v1."))
    example = next((name for name in names if shipped(name)), names[0])
    files = " --world-model FILE --data DIR" if registry.get(example).ids else ""
    console.print(Text.assemble("Run one: ", (f"python -m pwm_fast.extract --task {example}{files}", "bold")))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, main, "pwm_fast.tasks"))
