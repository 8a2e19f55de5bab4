"""`python -m pwm_fast.evaluate` for MuJoCo's tasks: one run with its score, several beside the published ones."""

import csv
import json
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pwm_fast import evaluate
from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import evaluate as real_episodes
from pwm_fast.run_folder import RunFolder


@pytest.fixture(autouse=True)
def suites():
    for package in ("dm_control", "metaworld", "rliable"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra mt80)")


def untrained(name: str, seeds: list[int]) -> list:
    from pwm_fast.learning.extraction import Extraction, ExtractionConfig
    from pwm_fast.models.world_model import WorldModel, WorldModelConfig

    torch.manual_seed(0)
    task = registry.get(name)
    sizes = {"latent_dim": 16, "mlp_dim": 16, "encoder_dim": 16, "encoder_layers": 2}
    world_model = WorldModel(WorldModelConfig(task.obs_dim, task.action_dim, **sizes))
    config = ExtractionConfig(actor_units=(16,), critic_units=(16,))
    return Extraction(world_model, config, seeds=seeds, tasks=[name] * len(seeds)).policies()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folder of a run of two tasks, two seeds each."""
    for name in ("mw-reach", "pendulum-spin"):
        with RunFolder(tmp_path / "runs" / name) as folder:
            for policy, seed in zip(untrained(name, [0, 1]), (0, 1)):
                folder.save_policy(policy, seed=seed)
    return tmp_path / "runs"


def test_a_folder_of_runs_gives_a_table_and_a_csv(runs: Path, tmp_path: Path, call, capsys):
    assert call("evaluate", runs, "--episodes", 1, "--csv", tmp_path / "scores.csv", "--threads", 2) == 0
    shown = capsys.readouterr().out
    spin, reach = csv.DictReader((tmp_path / "scores.csv").open())
    assert (spin["task"], spin["runs"], reach["task"]) == ("pendulum-spin", "2", "mw-reach")
    for policy, task, row in [(untrained("pendulum-spin", [0, 1]), "pendulum-spin", spin)]:
        means = [real_episodes(task, p.act, 1, seed=0).mean for p in policy]
        assert float(row["return"]) == pytest.approx(np.mean(means)) and row["score"] != ""
    assert "TD-MPC2" in shown and "mean of 2" in shown and "interquartile mean" in shown
    assert call("evaluate", runs / "mw-reach", runs / "pendulum-spin", "--episodes", 1, "--threads", 1) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:6] == shown.splitlines()[:6]


def test_one_run_shows_its_score_and_reproduces_its_summary(runs: Path, call, capsys):
    summary, _ = evaluate.evaluate_run(runs / "pendulum-spin", episodes=2, seed=3)
    assert summary["score"] == pytest.approx(summary["return_mean"] / 10)
    (runs / "pendulum-spin" / "summary.json").write_text(json.dumps({**summary, "seeds": [0, 1]}))
    assert call("evaluate", runs / "pendulum-spin") == 0
    shown = capsys.readouterr().out
    assert "reproduces summary.json exactly" in shown and f"score {summary['score']:.1f} of 100" in shown


@pytest.mark.skipif(not find_library("EGL"), reason="there is no EGL on this machine")
def test_the_rollout_is_drawn(runs: Path, command_environment):
    environment = {key: value for key, value in command_environment.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    command = [sys.executable, "-m", "pwm_fast.evaluate", runs / "pendulum-spin", "--episodes", "1", "--gif"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(runs / "pendulum-spin" / "rollout.gif") as picture:
        assert picture.size == (320, 240) and picture.n_frames > 25


def test_refusals(runs: Path, tmp_path: Path, call, capsys):
    assert call("evaluate", runs, "--gif") == 2
    assert "--gif draws one run, got 2" in capsys.readouterr().err
    assert call("evaluate", tmp_path / "none") == 2
    assert "none does not exist" in capsys.readouterr().err
    assert call("evaluate", runs, "--episodes", 0) == 2
    assert "episodes must be > 0, got 0" in capsys.readouterr().err
