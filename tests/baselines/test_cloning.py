"""Behaviour cloning: it imitates, per seed, and explores little."""

import numpy as np
import pytest
import torch

from pwm_fast.baselines.cloning import LOG_STD, clone
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter
from pwm_fast.learning.extraction import Extraction, ExtractionConfig
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

SMALL = ExtractionConfig(actor_units=(32,), critic_units=(8,))


@pytest.fixture
def store(tmp_path) -> EpisodeStore:
    """Half of the episodes act a = tanh(2 obs) for a reward of 1, the others at random for 0."""
    random = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "store", 3, 2, task_names=["thing"]) as writer:
        for i in range(40):
            obs = random.normal(size=(31, 3))
            action = np.tanh(2 * obs[:-1, :2]) if i % 2 else random.uniform(-1, 1, (30, 2))
            writer.add(obs, action, np.full(30, float(i % 2)), terminated=False)
    return EpisodeStore.open(tmp_path / "store")


def world_model() -> WorldModel:
    torch.manual_seed(0)
    model = WorldModel(WorldModelConfig(3, 2, 32, 32, 32, 2))
    with torch.no_grad():
        for layer in model._encoder:
            layer.weight.normal_(0, 0.5)
    return model


def error(extraction: Extraction, obs: torch.Tensor) -> np.ndarray:
    return np.array([(p.act(obs) - torch.tanh(2 * obs[:, :2])).square().mean().item() for p in extraction.policies()])


def test_the_best_episodes_are_imitated(store):
    model = world_model()
    learner = Extraction(model, SMALL, seeds=[0, 1])
    obs = torch.randn(500, 3)
    before = error(learner, obs)
    clone(learner, model, store, share=0.5, steps=600, batch_size=64, learning_rate=3e-3)
    assert (error(learner, obs) < 0.25 * before).all()
    assert (learner.actor.parameters["log_std"] == LOG_STD).all()


def test_a_clone_does_not_depend_on_who_shares_the_batch(store):
    model = world_model()
    both, alone = Extraction(model, SMALL, seeds=[0, 1]), Extraction(model, SMALL, seeds=[1])
    for learner in (both, alone):
        clone(learner, model, store, steps=30, batch_size=16)
    for (name, a), b in zip(both.policies()[1].tensors().items(), alone.policies()[0].tensors().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_each_policy_imitates_the_episodes_it_is_given(store):
    """The random half for one, the good half for the other: of those, too, its best."""
    model = world_model()
    learner = Extraction(model, SMALL, seeds=[0, 0])
    obs = torch.randn(500, 3)
    halves = [np.arange(0, 40, 2), np.arange(1, 40, 2)]
    clone(learner, model, [(store, half) for half in halves], share=0.5, steps=600, batch_size=64, learning_rate=3e-3)
    random, good = error(learner, obs)
    assert good < 0.25 * random
