"""The end of an extraction: every policy in its real environment, files, pictures, and the closing table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pwm_fast import backend
from pwm_fast.data.collect import one_torch_thread
from pwm_fast.envs import registry
from pwm_fast.envs.drawing import drawn_episode
from pwm_fast.envs.evaluation import EpisodeResults, evaluate_population
from pwm_fast.envs.scores import Aggregate, score_table
from pwm_fast.learning.waves import Finished, Waves
from pwm_fast.models.policy import Policy
from pwm_fast.pictures import curve, rollout_gif, series, write_gif
from pwm_fast.progress import Phases
from pwm_fast.results import EPISODES, SUITE_EPISODES, files_table, print_closing, real_returns, result_table, summarise
from pwm_fast.run_folder import SCORES, SUMMARY, RunFolder
from pwm_fast.state_files import write_json

SEED = 10_000
EXPLOITED = 2.0  # imagined over real reward from which the closing table warns


@dataclass(frozen=True)
class Settings:
    """What of a run's options its end needs."""

    title: str
    threads: int | None
    device: str
    precision: str
    finetune: bool
    draw: bool = True  # pictures of MuJoCo's tasks too


def close(
    waves: Waves,
    folder: RunFolder,
    phases: Phases,
    settings: Settings,
    data: Mapping[str, Any],
    console: Console,
) -> None:
    """Last evaluation, files and pictures, closing table. `data`: what the world model's file says of its data."""
    finished, tasks = waves.finished(), list(dict.fromkeys(member.task for member in waves.members))
    with phases("evaluation"):
        results = last_episodes([f.policy for f in finished], [m.task for m in waves.members], settings.threads)
    summaries = {}
    for task in tasks:
        own = [i for i, member in enumerate(waves.members) if member.task == task]
        summaries[task] = close_task(
            registry.get(task), [waves.members[i].seed for i in own], [finished[i] for i in own],
            [results[i] for i in own], folder,
            "" if len(tasks) == 1 else task, phases, settings, data,
        )  # fmt: skip
    rows = folder.metrics()
    with phases("files and pictures"):
        summary = summaries[tasks[0]]
        levels = None
        if len(tasks) == 1:
            levels = {
                "paper": summary["paper_return"],
                "random": summary["random_return"],
                "data, best": summary["data_best"],
                "data, mean": summary["data_mean"],
                "cloning": summary["cloning_return"],
            }
        curve(folder.file("curve.png"), f"{settings.title}: real return while extracting", series(rows, "real_return"),
              series(rows, "imagined_return"), levels=levels)  # fmt: skip
    warnings = []
    last = rows[-len(waves.present) :]
    gauges = [r["imagined_over_real"] for r in last if np.isfinite(r["imagined_over_real"])]
    gauge = float(np.mean(gauges)) if gauges else 1.0
    if gauge > EXPLOITED:
        warnings.append(f"imagined reward is {gauge:.1f} times the real one: the policy exploits the model's errors")
    for member, result in zip(waves.members, finished, strict=True):
        if result.diverged:
            warnings.append(f"{member.task} seed {member.seed} diverged; its policy is the best one before that")
    for summary in summaries.values():
        summary["seconds"] = {name: round(value, 3) for name, value in phases.seconds.items()}
    if len(tasks) == 1:
        folder.write_summary(summaries[tasks[0]])
        print_closing(console, summaries[tasks[0]], folder.path, warnings)
    else:
        by_task = {task: [r for r, m in zip(results, waves.members) if m.task == task] for task in tasks}
        close_many(console, summaries, by_task, folder, warnings)


@one_torch_thread()
def last_episodes(policies: Sequence[Policy], tasks: Sequence[str], threads: int | None) -> list[EpisodeResults]:
    """The last episodes of all policies: those of dflex one policy after the other, others in worker processes."""
    if all(registry.get(task).suite == "dflex" for task in tasks):
        pairs = zip(policies, tasks, strict=True)
        return [real_returns(p, task, EPISODES, SEED, record=True, threads=threads) for p, task in pairs]
    return evaluate_population(tasks, [p.act for p in policies], SUITE_EPISODES, SEED, processes=threads)


def close_task(
    task: registry.Task,
    seeds: Sequence[int],
    finished: Sequence[Finished],
    results: Sequence[EpisodeResults],
    folder: RunFolder,
    place: str,
    phases: Phases,
    settings: Settings,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Save a task's policies in the run's folder or in its part `place`; the summary of their episodes."""
    data = data.get(task.name, data)  # of a model of several tasks each task's own
    best = max(range(len(results)), key=lambda i: (task.score(results[i]) or 0.0, results[i].mean))
    with phases("files and pictures"):
        for seed, f in zip(seeds, finished, strict=True):
            if len(seeds) > 1:
                folder.save_policy(f.policy, seed, place)
        folder.save_policy(finished[best].policy, task=place)
        picture, joint_q = folder.file(place) / "rollout.gif", results[best].joint_q
        if joint_q is not None:
            rollout_gif(picture, task.name, joint_q)
        elif settings.draw:
            write_gif(picture, drawn_episode(task, finished[best].policy.act, SEED))
    cloned = [
        row["real_return"]
        for row in folder.metrics()
        if row["step"] == 0 and row.get("task", task.name) == task.name and "real_return" in row
    ]
    return summarise(
        task=task.name,
        seeds=seeds,
        steps=max(f.steps for f in finished),
        returns=[r.returns.tolist() for r in results],
        score=None if task.score(results[0]) is None else float(np.mean([task.score(r) for r in results])),
        evaluation_seed=SEED,
        random_return=task.random_return,
        paper_return=task.paper_return,
        seconds=phases.seconds,
        backend=backend.resolve(device=settings.device),
        precision=settings.precision,
        data_mean=data.get("return_mean"),
        data_best=data.get("return_best"),
        cloning_return=float(np.mean(cloned)) if cloned else None,
        finetune=settings.finetune,
    )


def close_many(
    console: Console,
    summaries: Mapping[str, dict[str, Any]],
    results: Mapping[str, Sequence[EpisodeResults]],
    folder: RunFolder,
    warnings: Sequence[str],
) -> None:
    """Each task's summary in its folder; of tasks of MT30 and MT80 their scores beside the published ones."""
    for task, summary in summaries.items():
        write_json(folder.file(task) / SUMMARY, summary)
    total: dict[str, Any] = {
        name: {"return_mean": s["return_mean"], "score": s["score"]} for name, s in summaries.items()
    }
    summary = {"tasks": total, "seconds": next(iter(summaries.values()))["seconds"]}
    console.print()
    if all(registry.get(task).ids for task in results):
        table = score_table(results)
        table.write_csv(folder.file(SCORES))
        console.print(table.table())
        try:
            summary["aggregates"] = {name: asdict(found) for name, found in table.aggregates().items()}
        except (ImportError, ValueError) as error:
            warnings = [*warnings, f"no aggregates: {error}"]
        else:
            console.print(aggregates_table(table.aggregates()))
    else:
        for task, found in summaries.items():
            console.rule(Text(task, style="bold"), align="left")
            console.print(result_table(found))
    folder.write_summary(summary)
    for warning in warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    console.print()
    console.print(files_table(folder.path))


def aggregates_table(aggregates: Mapping[str, Aggregate]) -> Table:
    """Means and interquartile means of whole sets of scores, with their intervals."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
    for heading in ("over all tasks and runs", "runs", "mean", "95%", "IQM", "95%"):
        table.add_column(heading, justify="left" if not table.columns else "right", no_wrap=True)
    for name, found in aggregates.items():
        intervals = [
            "-" if i is None else f"{i[0]:.1f} to {i[1]:.1f}" for i in (found.mean_interval, found.iqm_interval)
        ]
        table.add_row(name, str(found.runs), f"{found.mean:.1f}", intervals[0], f"{found.iqm:.1f}", intervals[1])
    return table
