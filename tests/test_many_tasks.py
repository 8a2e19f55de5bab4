"""`python -m pwm_fast.extract` with a TD-MPC2 checkpoint of MT30 and a converted chunk, on the real environments."""

import csv
from pathlib import Path

import numpy as np
import pytest

from pwm_fast import convert
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.errors import run_command
from pwm_fast.models.policy import Policy
from pwm_fast.run_folder import read_summary

DATA = Path(__file__).parent / "data" / "tdmpc2"
TASKS = ["walker-walk", "pendulum-swingup"]
pytest.importorskip("dm_control", reason="needs dm_control (pip install 'pwm_fast[mt80]')")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chunk") / "mt30"
    given = [str(DATA / "mt30_mini_chunk_0_tensordict020.pt"), str(path)]
    assert run_command(convert.Options, convert.main, "pwm_fast.convert", given) == 0
    return path


def options(store: Path, out: Path) -> list[object]:
    given = {"--world-model": DATA / "mt30_tiny_new_layout.pt", "--data": store, "--out": out, "--start": "scratch"}
    given |= {"--steps": 2, "--seeds": 2, "--rounds.evaluation-episodes": 1, "--rounds.critic-episodes": 1}
    return [part for pair in given.items() for part in pair]


def test_policies_of_several_tasks_come_out_of_one_run(store, tmp_path, call, capsys):
    run = tmp_path / "run"
    assert call("extract", "--task", *TASKS, *options(store, run)) == 0
    shown = capsys.readouterr().out
    assert all(task in shown for task in TASKS) and "scores.csv" in shown
    with open(run / "scores.csv", newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    total = read_summary(run)
    for task, sizes in zip(TASKS, ((24, 6), (3, 1))):
        summary = read_summary(run / task)
        assert summary["seeds"] == [0, 1] and np.shape(summary["returns"]) == (2, 10)
        assert float(rows[task]["score"]) == pytest.approx(summary["score"]) == total["tasks"][task]["score"]
        assert summary["score"] == pytest.approx(summary["return_mean"] / 10)
        policy = Policy.load(run / task / "seed_1")
        assert (policy.task, policy.obs_dim, policy.action_dim) == (task, *sizes)
    with open(run / "metrics.csv", newline="") as file:
        members = {(row["task"], row["seed"]) for row in csv.DictReader(file)}
    assert members == {(task, seed) for task in TASKS for seed in ("0", "1")}
    assert set(total["aggregates"]) == {"ours", "PWM", "TD-MPC2"}
    assert call("evaluate", run / "pendulum-swingup") == 0
    assert "reproduces summary.json exactly" in capsys.readouterr().out


def test_a_task_that_the_data_or_the_model_lacks_is_named(store, tmp_path, call, capsys):
    assert call("extract", "--task", "mw-reach", *options(store, tmp_path / "a")) == 2
    assert "mw-reach" in capsys.readouterr().err
    assert call("extract", "--task", "cheetah-run", *options(store, tmp_path / "b")) == 2
    assert "cheetah-run" in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert EpisodeStore.open(store).num_episodes == 12
