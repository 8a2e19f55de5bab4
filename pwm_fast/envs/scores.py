"""Normalised scores of MT30 and MT80 beside the published ones: a row per task, and aggregates by rliable.

Published: PWM (Georgiev et al. 2024, 48M parameters, one run per task) and TD-MPC2 (Hansen et al. 2024, 48M, planning,
ten runs per task), in `assets/published_scores.csv`. All scores are in percent: return / 10, or share of successes.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from rich.table import Table

from pwm_fast.envs import registry
from pwm_fast.envs.episode_results import EpisodeResults
from pwm_fast.envs.extras import import_extra

METHODS = ("PWM", "TD-MPC2")
OURS = "ours"
_PUBLISHED = Path(__file__).parent.parent / "assets" / "published_scores.csv"


@cache
def published(set: str, method: str) -> dict[str, tuple[float, ...]]:
    """Scores of each run by task: `set` is "mt30" or "mt80", `method` "PWM" or "TD-MPC2". Empty for other names."""
    with open(_PUBLISHED, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["set"] == set and row["method"] == method]
    return {row["task"]: tuple(float(score) for score in row["scores"].split()) for row in rows}


@dataclass(frozen=True)
class Aggregate:
    """Mean and interquartile mean over all runs and tasks, each with its 95% interval of a stratified bootstrap (over
    runs, within tasks; none for a single run)."""

    runs: int
    mean: float
    iqm: float
    mean_interval: tuple[float, float] | None
    iqm_interval: tuple[float, float] | None


@dataclass(frozen=True)
class ScoreTable:
    """Scores [task][run] of one set's tasks, in the order of their numbers; `returns` beside them, for reading."""

    set: str
    scores: dict[str, tuple[float, ...]]
    returns: dict[str, tuple[float, ...]]

    def rows(self) -> list[dict[str, str | float | int | None]]:
        """A row per task: task, set, runs, return, score (means over runs), random, PWM, TD-MPC2."""
        return [
            {
                "task": name,
                "set": self.set,
                "runs": len(scores),
                "return": float(np.mean(self.returns[name])),
                "score": float(np.mean(scores)),
                "random": registry.get(name).random_score,
                **{method: _mean(published(self.set, method).get(name)) for method in METHODS},
            }
            for name, scores in self.scores.items()
        ]

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """The rows, with a header."""
        rows = self.rows()
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def aggregates(self, repetitions: int = 2000, seed: int = 0) -> dict[str, Aggregate]:
        """Of our scores and the published ones on the same tasks.

        Raises MissingExtra without rliable, ValueError where our tasks have different numbers of runs.
        """
        methods = {OURS: self.scores}
        for method in METHODS:
            known = published(self.set, method)
            methods[method] = {name: known[name] for name in self.scores if name in known}
        return {name: aggregate(list(scores.values()), repetitions, seed) for name, scores in methods.items() if scores}

    def table(self) -> Table:
        """The rows for a terminal, and a closing line of means."""
        table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
        table.add_column("task", style="cyan", no_wrap=True)
        for heading in ("return", "score", "random", *METHODS):
            table.add_column(heading, justify="right", no_wrap=True)
        keys = ("return", "score", "random", *METHODS)
        rows = self.rows()
        for row in rows:
            table.add_row(str(row["task"]), *(_text(row[key]) for key in keys))
        table.add_section()
        means = [[row[key] for row in rows if row[key] is not None] for key in keys[1:]]
        texts = [_text(_mean(column)) if len(column) == len(rows) else "-" for column in means]
        table.add_row(f"mean of {len(rows)}", "", *texts, style="bold")
        return table


def _mean(values: Sequence | None) -> float | None:
    return float(np.mean(values)) if values else None


def _text(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, (int, float)) else "-"


def score_table(results: Mapping[str, EpisodeResults | Sequence[EpisodeResults]], set: str | None = None) -> ScoreTable:
    """The scores of episodes by task: one result per run (policy, seed), or a list of several runs'.

    `set`: "mt30" or "mt80", whose published scores stand beside; default: mt30 where all tasks are in it.
    Raises UnknownTask for a task of no multi-task set, or that is not in `set`; ValueError without results.
    """
    if not results:
        raise ValueError("there are no results to make a table of scores from")
    numbered = {name: registry.get(name).ids for name in results}
    chosen = set or ("mt30" if all("mt30" in ids for ids in numbered.values()) else "mt80")
    for name, ids in numbered.items():
        if chosen not in ids:
            raise registry.UnknownTask(f"{name} is not in {chosen}; its scores have no published ones beside them")
    scores, returns = {}, {}
    for name in sorted(results, key=lambda name: numbered[name][chosen]):
        runs = results[name]
        runs = [runs] if isinstance(runs, EpisodeResults) else runs
        task = registry.get(name)
        scores[name] = tuple(float(task.score(run) or 0.0) for run in runs)
        returns[name] = tuple(run.mean for run in runs)
    return ScoreTable(chosen, scores, returns)


def aggregate(scores: Sequence[Sequence[float]], repetitions: int = 2000, seed: int = 0) -> Aggregate:
    """Of scores [task][run], by rliable (Agarwal et al. 2021).

    Raises MissingExtra without rliable, ValueError where tasks have different numbers of runs.
    """
    library, metrics = (import_extra(f"rliable.{name}", "mt80") for name in ("library", "metrics"))
    if len({len(runs) for runs in scores}) != 1:
        counts = sorted({len(runs) for runs in scores})
        raise ValueError(f"every task needs the same number of runs for an aggregate, got {counts}")
    matrix = np.asarray(scores, np.float64).T  # [runs, tasks], as rliable has them

    def both(values: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_mean(values), metrics.aggregate_iqm(values)])

    mean, iqm = both(matrix)
    if len(matrix) == 1:
        return Aggregate(1, float(mean), float(iqm), None, None)
    before = np.random.get_state()  # noqa: NPY002 (what rliable 1.2 draws from, whatever generator it is given)
    np.random.seed(seed)  # noqa: NPY002
    try:
        _, intervals = library.get_interval_estimates({OURS: matrix}, both, reps=repetitions)
    finally:
        np.random.set_state(before)  # noqa: NPY002
    low, high = intervals[OURS]
    return Aggregate(
        len(matrix), float(mean), float(iqm), (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))
    )
