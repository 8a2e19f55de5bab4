"""`python -m pwm_fast.extract` leaves what it promises; `evaluate` and `tasks`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pwm_fast import evaluate, tasks
from pwm_fast.envs import registry
from pwm_fast.progress import make_console, number_text
from pwm_fast.results import real_returns, summarise
from pwm_fast.run_folder import RunFolder, read_summary


@pytest.fixture
def run(tmp_path: Path, tiny_policies) -> RunFolder:
    """A finished run of two seeds, evaluated on 3 episodes with seed 11."""
    with RunFolder(tmp_path / "run") as folder:
        returns = []
        for policy, seed in zip(tiny_policies, (3, 4)):
            folder.save_policy(policy, seed=seed)
            returns.append(real_returns(policy, "hopper", episodes=3, seed=11).returns.tolist())
        folder.save_policy(tiny_policies[int(np.mean(returns, 1).argmax())])
        summary = summarise(
            task="hopper",
            seeds=[3, 4],
            steps=5,
            returns=returns,
            evaluation_seed=11,
            random_return=20.0,
            paper_return=5680.0,
            seconds={},
            backend="torch",
            precision="fp32",
        )
        folder.write_summary(summary)
    return folder


def test_extract_leaves_a_run_that_evaluate_reproduces(
    tmp_path: Path, tiny_world_model: Path, tiny_store: Path, call, capsys
):
    options = {"--task": "hopper", "--world-model": tiny_world_model, "--data": tiny_store, "--out": tmp_path / "run"}
    options |= {"--seeds": 2, "--steps": 6, "--start": "scratch", "--rounds.cycles": 3}
    options |= {"--rounds.model-steps": 1, "--rounds.model-batch-size": 8, "--rounds.warm-up-steps": 20}
    options |= {"--rounds.evaluation-episodes": 2, "--rounds.practice-envs": 8, "--rounds.capacity": 400}
    options |= {"--precision": "bf16"}
    assert call("extract", *(part for pair in options.items() for part in pair)) == 0
    shown = capsys.readouterr().out
    for name in ("policy.safetensors", "summary.json", "metrics.csv", "curve.png", "rollout.gif"):
        assert (tmp_path / "run" / name).stat().st_size > 0 and name in shown
    summary = read_summary(tmp_path / "run")
    promised = (
        "task seeds steps return_mean return_std returns random_return paper_return seconds backend precision versions"
    )
    assert set(promised.split()) <= set(summary)
    assert summary["task"] == "hopper" and summary["seeds"] == [0, 1] and summary["steps"] == 6
    assert summary["precision"] == "bf16"
    assert np.shape(summary["returns"]) == (2, 16) and f"{summary['return_mean']:.1f} ±" in shown
    assert call("evaluate", tmp_path / "run") == 0
    assert "reproduces summary.json exactly" in capsys.readouterr().out


def test_evaluate_reproduces_the_summary_bit_for_bit(run: RunFolder, capsys, call):
    assert call("evaluate", run.path) == 0
    shown = capsys.readouterr().out
    assert "reproduces summary.json exactly" in shown
    assert "2 seeds x 3 episodes" in shown and "the paper's PWM" in shown


def test_evaluate_does_not_depend_on_threads(run: RunFolder):
    one, recorded = evaluate.evaluate_run(run.path, threads=1)
    two, _ = evaluate.evaluate_run(run.path, threads=2)
    assert one["returns"] == two["returns"] == recorded["returns"]


def test_evaluate_takes_other_episodes_and_seeds(run: RunFolder, capsys, call):
    assert call("evaluate", run.path, "--episodes", "2", "--seed", "5") == 0
    assert "other episodes or seed" in capsys.readouterr().out
    summary, recorded = evaluate.evaluate_run(run.path, episodes=2, seed=5)
    assert np.shape(summary["returns"]) == (2, 2)
    assert summary["return_mean"] != recorded["return_mean"]


def test_evaluate_names_a_changed_result(run: RunFolder, capsys, call):
    summary = json.loads(run.file("summary.json").read_text())
    summary["returns"][0][0] += 0.5
    run.write_summary(summary)
    assert call("evaluate", run.path) == 0
    assert "differs from summary.json by up to 0.5" in capsys.readouterr().out


def test_evaluate_takes_a_folder_with_one_policy(run: RunFolder, capsys, call):
    assert call("evaluate", run.path / "seed_4", "--episodes", "2") == 0
    assert "no summary.json to compare with" in capsys.readouterr().out


def test_evaluate_draws_the_rollout(run: RunFolder, call):
    assert call("evaluate", run.path, "--gif") == 0
    gif = Image.open(run.file("rollout.gif"))
    assert gif.n_frames > 3 and min(gif.size) >= 120
    assert run.file("rollout.gif").stat().st_size < 3_000_000


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("no run", "does not exist"),
        ("no policy", "policy.safetensors does not exist"),
        ("truncated policy", "is damaged"),
        ("damaged summary", "summary.json is damaged"),
        ("unknown task", "unknown task 'hoper'; did you mean 'hopper'?"),
        ("zero episodes", "episodes must be > 0, got 0"),
    ],
)
def test_evaluate_names_what_is_wrong(run: RunFolder, damage: str, text: str, capsys, call):
    arguments = [run.path / "seed_3"]
    if damage == "no run":
        arguments = [run.path / "absent"]
    elif damage == "no policy":
        arguments = [run.path.parent / "empty"]
        arguments[0].mkdir()
    elif damage == "truncated policy":
        weights = run.path / "seed_3" / "policy.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "damaged summary":
        run.file("summary.json").write_text("{")
        arguments = [run.path]
    elif damage == "unknown task":
        description = run.path / "seed_3" / "policy.json"
        description.write_text(description.read_text().replace('"hopper"', '"hoper"'))
    else:
        arguments += ["--episodes", "0"]
    assert call("evaluate", *arguments) == 2
    shown = capsys.readouterr().err
    assert text in shown and shown.startswith("error: ") and shown.count("\n") == 1


def test_tasks_lists_every_task_with_the_papers_return(capsys, call):
    assert call("tasks") == 0
    shown = capsys.readouterr().out
    for name in registry.names():
        row = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        task = registry.get(name)
        assert str(task.obs_dim) in row and str(task.action_dim) in row
        assert task.paper_return is None or number_text(task.paper_return) in row
    assert "python -m pwm_fast.extract --task" in shown


def test_tasks_suggests_the_nearest_set(capsys, call):
    assert call("tasks", "--set", "dflx") == 2
    assert "did you mean 'dflex'?" in capsys.readouterr().err


def test_tasks_says_where_world_models_come_from(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tasks, "shipped", lambda name: tmp_path if name == "ant" else None)
    monkeypatch.setattr(tasks, "cached", lambda name: tmp_path if name == "anymal" else None)
    console = make_console(width=120)
    with console.capture() as capture:
        console.print(tasks.tasks_table(["hopper", "ant", "anymal"]))
    hopper, ant, anymal = capture.get().splitlines()[1:4]
    assert "learned on first use" in hopper and "shipped" in ant and "cache" in anymal


def test_tasks_needs_neither_torch_nor_warp(command_environment):
    """It answers at once."""
    program = "from sys import modules; from pwm_fast import tasks; tasks.main(tasks.Options()); "
    program += "print({'torch', 'warp'} & set(modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=command_environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"
