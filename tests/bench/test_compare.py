"""Comparing two benchmark results: what counts as worse, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPARE = Path(__file__).parents[2] / "bench" / "compare.py"


def result(machine: str = "H200", failures: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"step": (100.0, "us", "lower"), "rate": (50.0, "steps/s", "higher")}
    values |= {"cosine": (1e-6, "1-cos", "lower")}
    figures = {
        name: {"value": changes.get(name, value), "unit": unit, "better": better}
        for name, (value, unit, better) in values.items()
        if changes.get(name, 0) is not None
    }
    return {"machine": {"name": machine}, "failures": list(failures), "results": figures}


def compare(tmp_path: Path, before: Any, after: Any, *options: str) -> subprocess.CompletedProcess[str]:
    for name, found in (("before", before), ("after", after)):
        text = found if isinstance(found, str) else json.dumps(found)
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    command = [sys.executable, str(COMPARE), str(tmp_path / "before.json"), str(tmp_path / "after.json"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "changes, worse",
    [
        ({}, None),
        ({"step": 104.0, "rate": 48.0}, None),
        ({"step": 50.0, "rate": 90.0}, None),
        ({"step": 106.0}, "step: 6.0% worse"),
        ({"rate": 47.0}, "rate: 6.4% worse"),
        ({"cosine": 1e-3}, None),
        ({"rate": None}, "rate: missing"),
        ({"failures": ("gradient 48M bf16: cosine 0.9",)}, "cosine 0.9 (wrong)"),
        ({"step": float("nan")}, "step: nan% worse"),
    ],
)
def test_what_is_worse(tmp_path: Path, changes: dict[str, Any], worse: str | None) -> None:
    done = compare(tmp_path, result(), result(**changes))
    assert done.returncode == (0 if worse is None else 1), done.stderr
    assert worse is None or f"WORSE: {worse}" in done.stderr or worse in done.stderr


def test_the_limit_is_an_option(tmp_path: Path) -> None:
    assert compare(tmp_path, result(), result(step=106.0), "--limit", "0.1").returncode == 0


@pytest.mark.parametrize(
    "after, message",
    [
        (result(machine="A100"), "different machines cannot be compared: H200 and A100"),
        ("{", "cannot be read as a result"),
        ("[]", "has no machine and results"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, after: Any, message: str) -> None:
    done = compare(tmp_path, result(), after)
    assert done.returncode == 2 and message in done.stderr.replace("\n", " ")
