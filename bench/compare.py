"""Two results of one benchmark: python bench/compare.py BEFORE.json AFTER.json

Prints every figure's ratio and exits with status 1 if one is worse by more than 5%, is missing, or was wrong. Figures
of different machines are not compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

LIMIT = 0.05
EXACT = ("1-cos", "return")  # checked where they are measured; they are no speeds


def load(path: Path) -> dict[str, Any]:
    """One result file; raises ValueError that says what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a result: {error}") from error
    if not isinstance(found, dict) or "results" not in found or "machine" not in found:
        raise ValueError(f"{path} is no result of bench/gpu.sh: it has no machine and results")
    return found


def compare(before: dict[str, Any], after: dict[str, Any], limit: float = LIMIT) -> tuple[list[str], list[str]]:
    """Lines to print, and what is worse than `limit` allows. Raises ValueError for different machines."""
    names = [found["machine"].get("name", found["machine"].get("device")) for found in (before, after)]
    if names[0] != names[1]:
        raise ValueError(f"figures of different machines cannot be compared: {names[0]} and {names[1]}")
    lines, worse = [], [f"{failure} (wrong)" for failure in after.get("failures", [])]
    for name, old in before["results"].items():
        new = after["results"].get(name)
        if new is None:
            worse.append(f"{name}: missing")
            continue
        if old["unit"] in EXACT:
            continue
        gain = new["value"] / old["value"]
        loss = (1 / gain if old["better"] == "higher" else gain) - 1
        lines.append(f"{name:60s} {old['value']:12.4g} -> {new['value']:12.4g} {old['unit']:8s} {-loss:+7.1%}")
        if not loss <= limit:
            worse.append(f"{name}: {loss:.1%} worse")
    return lines, worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest loss that passes (default 0.05)")
    options = parser.parse_args()
    try:
        lines, worse = compare(load(options.before), load(options.after), options.limit)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))
    for line in worse:
        print(f"WORSE: {line}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
