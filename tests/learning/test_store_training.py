"""One world model of several tasks: what it learns of each, how it is judged, and an exact resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter
from pwm_fast.learning.pretraining import PretrainingConfig
from pwm_fast.learning.store_training import StoreTraining, fit_normalisation
from pwm_fast.models.world_model import WorldModel, WorldModelConfig
from pwm_fast.state_files import load_state, save_state

TASKS = ("right", "left")


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    """A point that its action pushes to the right in one task and to the left in the other: nothing else differs."""
    random = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "store", 2, 1, task_names=list(TASKS)) as writer:
        for episode in range(80):
            sign = 1.0 if episode % 2 == 0 else -1.0
            state, obs = random.normal(size=2), []
            action = random.uniform(-1, 1, (30, 1))
            for a in action:
                obs.append(state)
                state = np.array([0.9 * state[0] + 0.5 * sign * a[0], 0.8 * state[1]])
            obs = np.stack([*obs, state])
            writer.add(obs, action, sign * obs[:-1, 0], terminated=False, task=episode % 2)
    return EpisodeStore.open(tmp_path / "store")


def model(tasks: int, latent: str = "observation") -> WorldModel:
    torch.manual_seed(0)
    widths = (2, 48, 0, 0) if latent == "observation" else (16, 48, 48, 2)
    options = {"num_tasks": tasks, "task_dim": 4} if tasks else {}
    return WorldModel(WorldModelConfig(2, 1, *widths, latent=latent, num_bins=1, **options))


CONFIG = PretrainingConfig(steps=300, batch_size=128, horizon=1, learning_rate=3e-3, reward_coef=1.0)


def test_a_task_embedding_tells_tasks_apart_that_look_the_same(store: EpisodeStore) -> None:
    found = {}
    for tasks in (0, 2):
        training = StoreTraining(store, model(tasks), CONFIG, validation_horizon=8)
        for _ in range(CONFIG.steps):
            training.pretraining.step()
        found[tasks] = training.validate()
    assert set(found[2]) == {f"{t}{n}" for n in found[0] for t in ("", "right/", "left/")}
    for task in TASKS:
        assert found[2][f"{task}/latent_error"] < 0.05 and found[2][f"{task}/return_r2"] > 0.95
    assert found[0]["latent_error"] > 0.2 and found[0]["return_r2"] < 0.5
    assert found[2]["latent_error"] == pytest.approx(np.mean([found[2][f"{t}/latent_error"] for t in TASKS]))


@pytest.mark.parametrize("latent", ["observation", "simnorm"])
def test_resume_through_a_file_is_exact(latent: str, store: EpisodeStore, tmp_path: Path) -> None:
    config = PretrainingConfig(steps=9, batch_size=16, horizon=3)
    whole = StoreTraining(store, model(2, latent), config, seed=1).pretraining
    losses = [whole.step()["total"] for _ in range(9)]
    first = StoreTraining(store, model(2, latent), config, seed=1).pretraining
    for _ in range(4):
        first.step()
    save_state(tmp_path / "state.safetensors", first.state_dict())
    second = StoreTraining(store, model(2, latent), config, seed=1).pretraining
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert [second.step()["total"] for _ in range(5)] == losses[4:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_model_of_other_widths_or_tasks_is_refused(store: EpisodeStore) -> None:
    config = PretrainingConfig(steps=1)
    with pytest.raises(ValueError, match="2 observations and 1 actions, the world model 3 and 1"):
        StoreTraining(store, WorldModel(WorldModelConfig(3, 1, 16, 8, 8, 2)), config)
    with pytest.raises(ValueError, match="the data has 2 tasks, the world model 3"):
        StoreTraining(store, model(3), config)


def test_constant_observations_and_large_rewards_are_scaled() -> None:
    m = WorldModel(WorldModelConfig(2, 1, 16, 8, 8, 2))
    quantiles = {"0.01": -3.0, "0.99": 40.0}
    fit_normalisation(m, {"obs_mean": [1, 2], "obs_std": [0.5, 1e-6], "reward_quantiles": quantiles})
    assert m.obs_std.tolist() == [0.5, 1.0] and m.reward_scale.item() == pytest.approx(8.0)
