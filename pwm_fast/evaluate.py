"""python -m pwm_fast.evaluate RUN [RUN ...]: run saved policies in their real simulators again.

One run, with the episodes and the seed of its own evaluation (the default), reproduces summary.json's numbers. Several,
or the folder of a run of many tasks, give a table of scores beside the published ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pwm_fast.envs import registry
from pwm_fast.errors import positive, run_command
from pwm_fast.progress import make_console, number_text
from pwm_fast.results import EPISODES, SUITE_EPISODES, real_returns, result_table, summarise
from pwm_fast.run_folder import SUMMARY, read_summary

if TYPE_CHECKING:
    from pwm_fast.envs.evaluation import EpisodeResults

WEIGHTS = "policy.safetensors"


@dataclass(frozen=True)
class Options:
    """Evaluate saved policies in the real simulator."""

    run: Annotated[list[str], tyro.conf.Positional]
    """Run folders, or folders with one policy each (policy.safetensors and policy.json)."""
    episodes: int | None = None
    """Episodes per policy; default: as many as the run's own evaluation (else 16, MT30 and MT80: 10)."""
    seed: int | None = None
    """Seed of the start states; default: that of the run's own evaluation (else 0)."""
    threads: int | None = None
    """CPU threads for the simulator, or processes for several runs; results do not depend on it. Default: all."""
    gif: bool = False
    """Also write RUN/rollout.gif from the best policy's first episode."""
    csv: Path | None = None
    """Write the table of several runs to this file."""


def saved_policies(folder: Path) -> dict[int | None, Path]:
    """Folders of a run's policies by seed: seed_0/, seed_1/, ... where there are several, else the folder itself."""
    found = {}
    for path in folder.glob("seed_*"):
        seed = path.name.removeprefix("seed_")
        if seed.isdigit() and (path / WEIGHTS).exists():
            found[int(seed)] = path
    return dict(sorted(found.items())) or {None: folder}


def runs_in(folders: Sequence[str | Path]) -> list[Path]:
    """The runs of one task each: the folders themselves, or those inside a folder that has no policy of its own.

    Raises FileNotFoundError where a folder does not exist or has no policy anywhere.
    """
    found = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist; `python -m pwm_fast.extract` makes a run")
        inside = sorted(path for path in folder.iterdir() if _has_policies(path)) if folder.is_dir() else []
        found += [folder] if _has_policies(folder) or not inside else inside
    return found


def _has_policies(folder: Path) -> bool:
    return folder.is_dir() and any((path / WEIGHTS).exists() for path in saved_policies(folder).values())


def evaluate_run(
    folder: str | Path, episodes: int | None = None, seed: int | None = None, threads: int | None = None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Evaluate all policies of a run of one task; returns the new summary, and the recorded one where the run has it.

    Raises FileNotFoundError where there is no policy, ValueError for damaged files or episodes < 1.
    """
    from pwm_fast.models.policy import Policy

    (folder,) = runs_in([folder])
    recorded = read_summary(folder) if (folder / SUMMARY).exists() else None
    paths = saved_policies(folder)
    policies = [Policy.load(path) for path in paths.values()]
    task = registry.get(policies[0].task)
    setting = (recorded or {}).get("evaluation", {})
    usual = EPISODES if task.suite == "dflex" else SUITE_EPISODES
    episodes = setting.get("episodes", usual) if episodes is None else episodes
    seed = setting.get("seed", 0) if seed is None else seed
    positive("episodes", episodes)
    results = [real_returns(policy, task.name, episodes, seed, threads=threads) for policy in policies]
    known = (recorded or {}).get("seeds", [0])
    scores = [score for score in map(task.score, results) if score is not None]
    summary = summarise(
        task=task.name,
        seeds=[known[0] if name is None else name for name in paths],
        steps=(recorded or {}).get("steps", 0),
        returns=[np.asarray(result.returns).tolist() for result in results],
        evaluation_seed=seed,
        random_return=task.random_return,
        paper_return=task.paper_return,
        seconds={},
        backend=(recorded or {}).get("backend", ""),
        precision=(recorded or {}).get("precision", ""),
        **({"score": float(np.mean(scores))} if scores else {}),
    )
    return summary, recorded


def evaluate_runs(
    folders: Sequence[str | Path], episodes: int | None = None, seed: int = 0, processes: int | None = None
) -> dict[str, list[EpisodeResults]]:
    """Evaluate the policies of several runs side by side, in processes: results by task, one per policy.

    Raises what `evaluate_run` raises.
    """
    from pwm_fast.data.collect import one_torch_thread
    from pwm_fast.envs.evaluation import evaluate_population
    from pwm_fast.models.policy import Policy

    if episodes is not None:
        positive("episodes", episodes)
    policies = [Policy.load(path) for folder in runs_in(folders) for path in saved_policies(folder).values()]
    with one_torch_thread():
        results = evaluate_population(
            [policy.task for policy in policies],
            [policy.act for policy in policies],
            SUITE_EPISODES if episodes is None else episodes,
            seed,
            processes=processes,
        )
    found: dict[str, list[EpisodeResults]] = {}
    for policy, result in zip(policies, results):
        found.setdefault(policy.task, []).append(result)
    return found


def comparison(summary: dict[str, Any], recorded: dict[str, Any] | None) -> str:
    """One line on how the numbers relate to the run's own."""
    if recorded is None:
        return "the run has no summary.json to compare with"
    if summary["evaluation"] != recorded["evaluation"] or summary["seeds"] != recorded["seeds"]:
        before = f"{recorded['return_mean']:,.1f} ± {recorded['return_std']:,.1f}"
        return f"summary.json: {before} (other episodes or seed, so the numbers differ by chance)"
    if summary["returns"] == recorded["returns"]:
        return "reproduces summary.json exactly"
    difference = np.abs(np.subtract(summary["returns"], recorded["returns"])).max()
    return f"differs from summary.json by up to {difference:.3g}: another machine or other versions"


def main(options: Options) -> int:
    console = make_console()
    folders = runs_in(options.run)
    if len(folders) > 1:
        show_runs(console, options, folders)
        return 0
    if options.gif:
        prepare_gif(folders[0])
    summary, recorded = evaluate_run(folders[0], options.episodes, options.seed, options.threads)
    console.rule(Text(f"{summary['task']} ({folders[0]})", style="bold"), align="left")
    console.print(result_table(summary))
    console.print(Text(comparison(summary, recorded)))
    if options.gif:
        console.print(Text(f"wrote {write_gif(folders[0], summary)}"))
    return 0


def show_runs(console: Console, options: Options, folders: Sequence[Path]) -> None:
    """Table and CSV of several runs: scores of multi-task tasks beside the published ones, returns of all others."""
    from pwm_fast.envs.scores import OURS, score_table

    if options.gif:
        raise ValueError(f"--gif draws one run, got {len(folders)}")
    results = evaluate_runs(folders, options.episodes, options.seed or 0, options.threads)
    scored = {task: runs for task, runs in results.items() if registry.get(task).ids}
    others = {task: runs for task, runs in results.items() if task not in scored}
    if options.csv is not None and not scored:
        raise ValueError("--csv holds scores of MT30 and MT80, and none of these runs is of their tasks")
    if others:
        table = Table("task", "return", box=None, pad_edge=False, padding=(0, 2), header_style="bold")
        for task, runs in others.items():
            returns = np.concatenate([run.returns for run in runs])
            table.add_row(task, f"{number_text(returns.mean())} ± {number_text(returns.std())}")
        console.print(table)
    if not scored:
        return
    scores = score_table(scored)
    console.print(scores.table())
    if len({len(runs) for runs in scored.values()}) == 1:
        for method, found in scores.aggregates().items():
            interval = "" if found.iqm_interval is None else " [{:.1f}, {:.1f}]".format(*found.iqm_interval)
            label = "these runs" if method == OURS else f"{method}, published"
            console.print(Text(f"{label}: mean {found.mean:.1f}, interquartile mean {found.iqm:.1f}{interval}"))
    if options.csv is not None:
        scores.write_csv(options.csv)
        console.print(Text(f"wrote {options.csv}"))


def prepare_gif(folder: Path) -> None:
    """Raises RuntimeError at once where a run cannot be drawn; MuJoCo chooses what draws at its first import."""
    from pwm_fast.envs.drawing import prepare_drawing
    from pwm_fast.models.policy import Policy

    policy = next(iter(saved_policies(folder).values()))
    if registry.get(Policy.load(policy).task).suite in ("dm_control", "metaworld"):
        prepare_drawing()


def write_gif(folder: Path, summary: dict[str, Any]) -> Path:
    """Render the first episode of the best policy to FOLDER/rollout.gif."""
    from pwm_fast import pictures
    from pwm_fast.models.policy import Policy

    paths, path = saved_policies(folder), folder / "rollout.gif"
    policy = Policy.load(paths.get(summary["best_seed"], folder))
    task, seed = registry.get(summary["task"]), summary["evaluation"]["seed"]
    if task.suite == "dflex":
        result = real_returns(policy, task.name, summary["evaluation"]["episodes"], seed, record=True)
        assert result.joint_q is not None
        pictures.rollout_gif(path, task.name, result.joint_q)
    else:
        from pwm_fast.envs.drawing import drawn_episode

        pictures.write_gif(path, drawn_episode(task, policy.act, seed))
    return path


if __name__ == "__main__":
    sys.exit(run_command(Options, main, "pwm_fast.evaluate"))
