"""`python -m pwm_fast.pretrain`: one task or several, from stores of one task or several; what the file then says."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from pwm_fast.data.task_table import action_dims
from pwm_fast.models.tdmpc2_export import export_checkpoint
from pwm_fast.models.world_model import WorldModel

TASKS = ("mw-reach", "mw-drawer-open")
SMALL = ("--size", "1M", "--steps", "3", "--batch-size", "16", "--horizon", "2", "--threads", "1")


@pytest.fixture
def stores(tmp_path: Path, make_tiny_store) -> list[Path]:
    return [make_tiny_store(tmp_path / task, 39, 4, task) for task in TASKS]


def test_two_tasks_make_one_world_model_that_tdmpc2_reads(stores, tmp_path: Path, call, capsys) -> None:
    assert call("pretrain", "--task", *TASKS, "--data", *stores, *SMALL, "--out", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert all(f"held out {task}: latent_error" in shown for task in TASKS)
    model = WorldModel.load(tmp_path / "run" / "world_model.safetensors")
    c = model.config
    assert (c.num_tasks, c.task_dim, c.obs_dim, c.action_dim, c.latent) == (80, 96, 39, 6, "simnorm")
    assert c.reward_symlog and not c.termination_dim
    assert model.provenance["tasks"] == {"mw-reach": 65, "mw-drawer-open": 44}
    assert model.provenance["action_dims"] == {"mw-reach": 4, "mw-drawer-open": 4}
    assert set(model.provenance["data"]) == {*TASKS, "meta"} and model.provenance["data"]["mw-reach"]["episodes"] == 8
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"latent_error", *(f"{task}/return_r2" for task in TASKS)} <= set(rows[-1])
    told = export_checkpoint(model, tmp_path / "tdmpc2.pt", action_dims=action_dims(c.num_tasks))
    back = WorldModel.load(tmp_path / "tdmpc2.pt")
    assert told["settings"]["num_tasks"] == 80 and len(told["notes"]) == 1  # only that Q and pi are untrained
    obs, action, task = torch.randn(5, 39), torch.rand(5, 6), torch.tensor([65, 44, 65, 0, 79])
    z = model.encode(obs, task)
    torch.testing.assert_close(back.encode(obs, task), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back.next(z, action, task), model.next(z, action, task), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back.reward(z, action, task), model.reward(z, action, task), rtol=1e-4, atol=1e-5)


def test_a_run_of_two_tasks_resumes_exactly(stores, tmp_path: Path, call) -> None:
    def run(out: str, steps: int, *more: str) -> None:
        options = [*SMALL[:2], "--steps", steps, *SMALL[4:]]
        assert call("pretrain", "--task", *TASKS, "--data", *stores, *options, "--out", tmp_path / out, *more) == 0

    run("whole", 6)
    models = [WorldModel.load(tmp_path / "whole" / "world_model.safetensors").state_dict()]
    run("again", 6)
    (tmp_path / "again" / "world_model.safetensors").unlink()
    run("again", 6, "--resume")
    models.append(WorldModel.load(tmp_path / "again" / "world_model.safetensors").state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


def test_one_task_has_no_embedding_and_its_own_widths(stores, tmp_path: Path, call) -> None:
    arguments = ("--task", TASKS[0], "--data", stores[0], *SMALL[:6], "--threads", "1")
    assert call("pretrain", *arguments, "--out", tmp_path / "run") == 0
    model = WorldModel.load(tmp_path / "run" / "world_model.safetensors")
    c = model.config
    assert (c.num_tasks, c.obs_dim, c.action_dim, c.latent, c.num_bins) == (0, 39, 4, "observation", 1)
    assert model.provenance["task"] == "mw-reach" and "tasks" not in model.provenance
    assert np.isfinite(model.provenance["data"]["return_mean"]) and not c.termination_dim


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        (("mw-reach", "mw-reach"), "tasks must be different ones"),
        (("mw-reach", "mw-draw-open"), "did you mean 'mw-drawer-open'"),
        (("mw-reach", "mw-push"), "has none of mw-reach, mw-push; it has mw-drawer-open"),
        ((*TASKS, "mw-push"), "no episode of task mw-push"),
    ],
)
def test_what_cannot_be_is_refused(tasks: tuple[str, ...], text: str, stores, tmp_path: Path, call, capsys) -> None:
    assert call("pretrain", "--task", *tasks, "--data", *stores, *SMALL, "--out", tmp_path / "run") == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
