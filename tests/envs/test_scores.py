"""Scores beside the published ones, and aggregates that reproduce the published figures."""

import csv

import numpy as np
import pytest

from pwm_fast.envs import registry
from pwm_fast.envs.episode_results import EpisodeResults
from pwm_fast.envs.scores import METHODS, aggregate, published, score_table

pytest.importorskip("rliable", reason="rliable is not installed (extra mt80)")


def result(returns, successes=None):
    successes = None if successes is None else np.array(successes, bool)
    return EpisodeResults(np.array(returns, float), np.full(len(returns), 100), successes=successes)


@pytest.mark.parametrize(
    ("set", "method", "runs", "mean", "iqm"),
    [
        ("mt30", "PWM", 1, 76.8, 86.4),
        ("mt30", "TD-MPC2", 10, 59.8, 68.1),
        ("mt80", "PWM", 1, 81.8, 91.3),
        ("mt80", "TD-MPC2", 10, 67.8, 84.6),
    ],
)
def test_published_scores_add_up_to_the_papers_figures(set, method, runs, mean, iqm):
    scores = published(set, method)
    assert list(scores) == registry.names(set) and {len(s) for s in scores.values()} == {runs}
    found = aggregate(list(scores.values()), repetitions=50)
    assert found.runs == runs
    assert found.mean == pytest.approx(mean, abs=0.06) and found.iqm == pytest.approx(iqm, abs=0.06)
    assert (found.mean_interval is None) == (runs == 1) == (found.iqm_interval is None)


def test_rows_stand_in_the_order_of_numbers_beside_the_published_scores():
    table = score_table({
        "mw-reach": result([1800.0, 1700.0], [True, False]),
        "walker-run": result([820.0, 800.0]),
    })  # fmt: skip
    assert table.set == "mt80"
    walker, reach = table.rows()
    assert (walker["task"], walker["return"], walker["score"]) == ("walker-run", 810.0, 81.0)
    assert (reach["task"], reach["return"], reach["score"]) == ("mw-reach", 1750.0, 50.0)
    assert walker["PWM"] == 82.406 and reach["PWM"] == 80.0 and reach["TD-MPC2"] == 80.0
    alone = score_table({"walker-run": result([820.0])})
    assert alone.set == "mt30" and alone.rows()[0]["PWM"] != walker["PWM"]
    assert score_table({"walker-run": result([820.0])}, set="mt80").rows()[0]["PWM"] == walker["PWM"]


def test_the_csv_holds_the_rows(tmp_path):
    table = score_table({"pendulum-spin": [result([500.0]), result([700.0])]})
    table.write_csv(tmp_path / "scores.csv")
    (row,) = csv.DictReader((tmp_path / "scores.csv").open())
    assert (row["task"], row["runs"], row["return"], row["score"]) == ("pendulum-spin", "2", "600.0", "60.0")
    assert float(row["PWM"]) == published("mt30", "PWM")["pendulum-spin"][0]


def test_aggregates_are_over_runs_of_the_same_tasks():
    """An interquartile mean by hand: of 8 scores the middle 4."""
    returns = {"walker-run": (100, 200), "cup-spin": (300, 400), "cheetah-run": (500, 600), "fish-swim": (700, 990)}
    table = score_table({name: [result([r]) for r in runs] for name, runs in returns.items()})
    found = table.aggregates(repetitions=200)
    assert set(found) == {"ours", *METHODS} and found["ours"].runs == 2 and found["PWM"].runs == 1
    assert found["ours"].mean == pytest.approx(47.375) and found["ours"].iqm == pytest.approx((30 + 40 + 50 + 60) / 4)
    low, high = found["ours"].iqm_interval
    assert 35 <= low <= 45 <= high <= 55 and low < high
    known = np.mean([published("mt30", "TD-MPC2")[name] for name in returns])
    assert found["TD-MPC2"].mean == pytest.approx(known)
    assert table.aggregates(repetitions=200) == found  # the bootstrap is seeded


def test_refusals():
    with pytest.raises(ValueError, match="no results"):
        score_table({})
    with pytest.raises(registry.UnknownTask, match="hopper is not in mt80"):
        score_table({"hopper": result([1.0])})
    with pytest.raises(registry.UnknownTask, match="mw-reach is not in mt30"):
        score_table({"mw-reach": result([1.0], [True])}, set="mt30")
    with pytest.raises(ValueError, match=r"same number of runs for an aggregate, got \[1, 2\]"):
        aggregate([(1.0,), (2.0, 3.0)])
