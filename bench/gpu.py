"""Everything that is measured on a GPU, in one call: python bench/gpu.py OUT (see bench/gpu.sh).

Writes OUT/gpu.json (for bench/compare.py) and OUT/gpu.md. Exit status 1 if a number was wrong; speeds never decide it.
`--dry-run` goes through all of it on the CPU with small sizes: its speeds mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_barrier import barriers
from gpu_kernels import kernels
from gpu_ladder import gradients, ladder
from gpu_learning import learning, pretraining
from gpu_timing import Run, ceilings, machine

SECTIONS: dict[str, Callable[[Run], None]] = {
    "ceilings": ceilings,
    "gradients": gradients,
    "learning": learning,
    "kernels": kernels,
    "barrier": barriers,
    "pretraining": pretraining,
    "ladder": ladder,
}
# The goals on an H200, of 10,000 gradient steps with horizon 16 at 48M: seconds.
GOALS = {"48M batch 64 P 1": 10.0, "48M batch 512 P 1": 20.0, "48M batch 64 P 80": 240.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--minutes", type=float, default=6.5, help="what does not fit is left out and named")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU; --dry-run goes through everything without one")
    device = torch.device("cpu" if options.dry_run else "cuda")
    run = Run(device, options.dry_run, time.monotonic() + 60 * options.minutes)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    for name in options.only:
        print(f"{name} ({run.left():.0f} s left)", flush=True)
        begun = time.monotonic()
        try:
            SECTIONS[name](run)
        except Exception as error:  # the other sections' figures are worth having
            traceback.print_exc()
            run.failures.append(f"{name}: {type(error).__name__}: {error}")
        print(f"  took {time.monotonic() - begun:.1f} s", flush=True)
        write(run, options.out)  # what a later section that hangs cannot take away
    for failure in run.failures:
        print(f"WRONG: {failure}", file=sys.stderr)
    return 1 if run.failures else 0


def write(run: Run, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "machine": machine(run.device), "dry_run": run.dry, "failures": run.failures, "results": run.results
    }  # fmt: skip
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(table(found), encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown, with the goals beside what was reached."""
    lines = ["# Measured" + (" (dry run: speeds mean nothing)" if found["dry_run"] else ""), ""]
    lines += [f"* {key}: {value}" for key, value in found["machine"].items()]
    lines += [f"* **wrong**: {failure}" for failure in found["failures"]]
    reached = {
        label: min(
            (r["s_per_10k_steps"] for name, r in found["results"].items()
             if name.startswith(f"ladder/{label}/") and "s_per_10k_steps" in r), default=None,
        )
        for label in GOALS
    }  # fmt: skip
    lines += ["", "| 10,000 steps | goal | measured |", "|---|---|---|"]
    lines += [
        f"| {k} | {goal:.0f} s | {'not measured' if reached[k] is None else f'{reached[k]:.1f} s'} |"
        for k, goal in GOALS.items()
    ]
    lines += ["", "| what | value | unit | notes |", "|---|---|---|---|"]
    for name, r in found["results"].items():
        notes = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in r.items()
            if k not in ("value", "unit", "better")
        )
        lines.append(f"| {name} | {r['value']:.4g} | {r['unit']} | {notes} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
