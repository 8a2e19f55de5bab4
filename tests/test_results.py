"""The summary's numbers and the closing table."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pwm_fast.results import print_closing, summarise


def summary(returns, **more):
    seeds = list(range(len(returns)))
    fixed = {"task": "humanoid", "steps": 500, "evaluation_seed": 7, "backend": "native", "precision": "fp32"}
    seconds = {"extraction": 120.0, "evaluation": 30.0}
    return summarise(
        seeds=seeds, returns=returns, random_return=70.0, paper_return=8661.0, seconds=seconds, **fixed, **more
    )


def test_the_summary_has_every_promised_field():
    found = summary([[1.0, 2.0], [5.0, 8.0]], data_best=7171.0)
    promised = (
        "task seeds steps return_mean return_std returns random_return paper_return seconds backend precision versions"
    )
    assert set(promised.split()) <= set(found)
    assert found["return_mean"] == 4.0 and found["return_std"] == pytest.approx(np.std([1, 2, 5, 8]))
    assert found["best_seed"] == 1 and found["evaluation"] == {"seed": 7, "episodes": 2}
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("returns", [[], [[]], [1.0]], ids=["no seed", "no episode", "flat"])
def test_a_summary_of_nothing_is_refused(returns):
    with pytest.raises(ValueError, match="returns must be"):
        summary(returns)


def test_the_closing_table_sets_the_return_beside_its_references(tmp_path: Path):
    (tmp_path / "policy.safetensors").write_bytes(b"")
    (tmp_path / "seed_0").mkdir()
    console = Console(file=io.StringIO(), width=160)
    print_closing(console, summary([[4000.0, 5000.0], [6000.0, 7000.0]], data_mean=2310.0), tmp_path, ["a warning"])
    text = console.file.getvalue()
    for part in (
        "5,500 ± 1,118",
        "2 seeds x 2 episodes, 64% of the paper's",
        "seed 1",
        "the best, saved at the top",
        "random policy",
        "70.0",
        "8,661",
        "2,310",
        "extraction 2:00, evaluation 0:30",
        "! a warning",
        "the best policy",
        "the policies of all 1 seeds",
    ):
        assert part in text, part
    assert "behaviour cloning" not in text and "metrics.csv" not in text
