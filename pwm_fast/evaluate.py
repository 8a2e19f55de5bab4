"""python -m pwm_fast.evaluate RUN: run the saved policies in the real simulator again.

With the episodes and the seed of the run's own evaluation (the default) it reproduces summary.json's numbers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.text import Text

from pwm_fast.errors import positive, run_command
from pwm_fast.progress import make_console
from pwm_fast.results import real_returns, result_table, summarise
from pwm_fast.run_folder import SUMMARY, read_summary

EPISODES = 16


@dataclass(frozen=True)
class Options:
    """Evaluate the policies of a run folder in the real simulator."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, or a folder with one policy (policy.safetensors and policy.json)."""
    episodes: int | None = None
    """Episodes per policy; default: as many as the run's own evaluation (else 16)."""
    seed: int | None = None
    """Seed of the start states; default: that of the run's own evaluation (else 0)."""
    threads: int | None = None
    """CPU threads for the simulator; results do not depend on it. Default: all."""
    gif: bool = False
    """Also write RUN/rollout.gif from the best policy's first episode."""


def saved_policies(folder: Path) -> dict[int | None, Path]:
    """Folders of a run's policies by seed: seed_0/, seed_1/, ... where there are several, else the folder itself."""
    found = {}
    for path in folder.glob("seed_*"):
        seed = path.name.removeprefix("seed_")
        if seed.isdigit() and (path / "policy.safetensors").exists():
            found[int(seed)] = path
    return dict(sorted(found.items())) or {None: folder}


def evaluate_run(
    folder: str | Path, episodes: int | None = None, seed: int | None = None, threads: int | None = None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Evaluate all policies of a run; returns the new summary, and the recorded one where the run has it.

    Raises FileNotFoundError where there is no policy, ValueError for damaged files or episodes < 1.
    """
    from pwm_fast.envs import registry
    from pwm_fast.models.policy import Policy

    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; `python -m pwm_fast.extract` makes a run")
    recorded = read_summary(folder) if (folder / SUMMARY).exists() else None
    setting = (recorded or {}).get("evaluation", {})
    episodes = setting.get("episodes", EPISODES) if episodes is None else episodes
    seed = setting.get("seed", 0) if seed is None else seed
    positive("episodes", episodes)
    paths = saved_policies(folder)
    policies = [Policy.load(path) for path in paths.values()]
    task = registry.get(policies[0].task)
    results = [real_returns(policy, task.name, episodes, seed, threads=threads) for policy in policies]
    known = (recorded or {}).get("seeds", [0])
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
    )
    return summary, recorded


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
    summary, recorded = evaluate_run(options.run, options.episodes, options.seed, options.threads)
    console.rule(Text(f"{summary['task']} ({options.run})", style="bold"), align="left")
    console.print(result_table(summary))
    console.print(Text(comparison(summary, recorded)))
    if options.gif:
        folder = Path(options.run)
        console.print(Text(f"wrote {write_gif(folder, summary)}"))
    return 0


def write_gif(folder: Path, summary: dict[str, Any]) -> Path:
    """Render the first episode of the best policy to FOLDER/rollout.gif."""
    from pwm_fast.models.policy import Policy
    from pwm_fast.pictures import rollout_gif

    paths = saved_policies(folder)
    policy = Policy.load(paths.get(summary["best_seed"], folder))
    seed = summary["evaluation"]["seed"]
    result = real_returns(policy, summary["task"], summary["evaluation"]["episodes"], seed, record=True)
    if result.joint_q is None:
        raise ValueError(f"{summary['task']} cannot be drawn: its simulator tells no joint positions")
    path = folder / "rollout.gif"
    rollout_gif(path, summary["task"], result.joint_q)
    return path


if __name__ == "__main__":
    sys.exit(run_command(Options, main, "pwm_fast.evaluate"))
