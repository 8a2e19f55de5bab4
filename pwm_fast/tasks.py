"""python -m pwm_fast.tasks: the table of tasks and how to run them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from pwm_fast.envs import registry
from pwm_fast.errors import run_command
from pwm_fast.progress import make_console, number_text
from pwm_fast.shipped import cached, shipped


@dataclass(frozen=True)
class Options:
    """List the tasks."""

    set: str | None = None
    """Only the tasks of this set, e.g. dflex."""


def model_text(task: str) -> Text:
    """Where the task's world model comes from."""
    if shipped(task):
        return Text("shipped", style="green")
    return Text("in this user's cache", style="green") if cached(task) else Text("learned on first use")


def tasks_table(names: Sequence[str]) -> Table:
    """A row per task."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
    table.add_column("task", style="cyan", no_wrap=True)
    table.add_column("set")
    for heading in ("obs", "action", "steps", "random", "paper"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("world model", no_wrap=True)
    for name in names:
        task = registry.get(name)
        values = (task.random_return, task.paper_return)
        table.add_row(
            name,
            task.suite,
            str(task.obs_dim),
            str(task.action_dim),
            str(task.episode_length),
            *("-" if value is None else number_text(value) for value in values),
            model_text(name),
        )
    return table


def main(options: Options) -> int:
    console = make_console()
    names = registry.names(options.set)
    console.print(tasks_table(names))
    example = next((name for name in names if shipped(name)), names[0])
    console.print()
    console.print(
        Text("obs, action: entries; steps: length of an episode; random, paper: real return of a random policy")
    )
    console.print(Text("and of PWM in the paper (arXiv 2407.02466).", end=" "))
    console.print(Text.assemble("Run one: ", (f"python -m pwm_fast.extract --task {example}", "bold")))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, main, "pwm_fast.tasks"))
