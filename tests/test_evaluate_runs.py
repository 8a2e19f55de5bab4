"""`python -m pwm_fast.evaluate` for MuJoCo's tasks: one run with its score, several beside the published ones."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pwm_fast import evaluate
from pwm_fast.envs import drawing, registry
from pwm_fast.envs.evaluation import evaluate as real_episodes
from pwm_fast.models.policy import Policy
from pwm_fast.run_folder import RunFolder


@pytest.fixture(autouse=True)
def suites():
    for package in ("dm_control", "metaworld", "rliable"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra mt80)")


def untrained(name: str) -> Policy:
    from pwm_fast.learning.extraction import Extraction, ExtractionConfig
    from pwm_fast.models.world_model import WorldModel, WorldModelConfig

    torch.manual_seed(0)
    task = registry.get(name)
    sizes = {"latent_dim": 16, "mlp_dim": 16, "encoder_dim": 16, "encoder_layers": 2}
    world_model = WorldModel(WorldModelConfig(task.obs_dim, task.action_dim, **sizes))
    config = ExtractionConfig(actor_units=(16,), critic_units=(16,))
    return Extraction(world_model, config, seeds=[0], tasks=[name]).policies()[0]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folder of a run of two tasks, one policy each."""
    for name in ("mw-reach", "pendulum-spin"):
        with RunFolder(tmp_path / "runs" / name) as folder:
            folder.save_policy(untrained(name))
    return tmp_path / "runs"


def test_a_folder_of_runs_gives_a_table_and_a_csv(runs: Path, tmp_path: Path, call, capsys):
    assert call("evaluate", runs, "--episodes", 1, "--csv", tmp_path / "scores.csv", "--threads", 2) == 0
    shown = capsys.readouterr().out
    spin, reach = csv.DictReader((tmp_path / "scores.csv").open())
    assert (spin["task"], spin["runs"], reach["task"]) == ("pendulum-spin", "1", "mw-reach")
    alone = real_episodes("pendulum-spin", untrained("pendulum-spin").act, 1, seed=0)
    assert float(spin["return"]) == pytest.approx(alone.mean)
    assert float(spin["score"]) == pytest.approx(alone.mean / 10)
    assert "TD-MPC2" in shown and "mean of 2" in shown and "interquartile mean" in shown
    assert evaluate.runs_in([runs]) == evaluate.runs_in([runs / "mw-reach", runs / "pendulum-spin"])


def test_one_run_has_its_score_and_reproduces_its_summary(runs: Path, call, capsys):
    summary, _ = evaluate.evaluate_run(runs / "pendulum-spin", episodes=1, seed=3)
    assert summary["score"] == pytest.approx(summary["return_mean"] / 10)
    (runs / "pendulum-spin" / "summary.json").write_text(json.dumps(summary))
    assert call("evaluate", runs / "pendulum-spin") == 0
    assert "reproduces summary.json exactly" in capsys.readouterr().out


def test_the_rollout_of_the_evaluations_first_episode_is_drawn(runs: Path, call, monkeypatch):
    """What draws it is tested in test_drawing.py."""
    asked = []

    def drawn(task, policy_fn, seed):
        asked.append((task.name, policy_fn(np.zeros((1, task.obs_dim), np.float32)).shape, seed))
        return np.random.default_rng(0).integers(0, 255, (5, 24, 32, 3)).astype(np.uint8)

    monkeypatch.setattr(drawing, "drawn_episode", drawn)
    monkeypatch.setattr(drawing, "prepare_drawing", lambda: asked.append("prepared"))
    assert call("evaluate", runs / "pendulum-spin", "--episodes", 1, "--seed", 7, "--gif") == 0
    assert asked == ["prepared", ("pendulum-spin", (1, 1), 7)]
    with Image.open(runs / "pendulum-spin" / "rollout.gif") as picture:
        assert picture.n_frames == 5


def test_refusals(runs: Path, tmp_path: Path, call, capsys):
    assert call("evaluate", runs, "--gif") == 2
    assert "--gif draws one run, got 2" in capsys.readouterr().err
    assert call("evaluate", tmp_path / "none") == 2
    assert "none does not exist" in capsys.readouterr().err
    assert call("evaluate", runs, "--episodes", 0) == 2
    assert "episodes must be > 0, got 0" in capsys.readouterr().err
