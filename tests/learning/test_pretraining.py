"""World-model learning: the loss by its definition, learning something, exact resume, validation numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter
from pwm_fast.kernels import two_hot
from pwm_fast.learning.model_gradient import ModelGradient
from pwm_fast.learning.model_validation import _auc, validate
from pwm_fast.learning.pretraining import (
    PRESETS,
    Pretraining,
    PretrainingConfig,
    Windows,
)
from pwm_fast.learning.store_training import StoreTraining
from pwm_fast.models.world_model import LATENTS, WorldModel, WorldModelConfig
from pwm_fast.state_files import load_state, save_state


def model(seed: int = 0, latent: str = "simnorm", **options) -> WorldModel:
    torch.manual_seed(seed)
    widths = (4, 2, 16, 32, 32, 2) if latent == "simnorm" else (4, 2, 4, 32, 0, 0)
    return WorldModel(WorldModelConfig(*widths, latent=latent, **options))


def windows(horizon: int = 4, batch: int = 3) -> Windows:
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g).double()  # noqa: E731
    return Windows(
        draw(horizon + 1, batch, 4), draw(horizon, batch, 2), draw(horizon, batch), (draw(horizon, batch) > 1).double()
    )


@pytest.fixture
def store(tmp_path) -> EpisodeStore:
    """A rotating point pushed by its actions: 60 episodes of 40 steps; reward is its first coordinate."""
    random = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "store", 4, 2, task_names=["point"]) as writer:
        for _ in range(60):
            state, obs, reward = random.normal(size=4), [], []
            action = random.uniform(-1, 1, (40, 2))
            for a in action:
                obs.append(state)
                reward.append(state[0])
                x, y, u, v = state
                push = 0.3 * a - 0.2 * state[:2]
                state = np.array([x + 0.2 * u, y + 0.2 * v, 0.9 * u + push[0], 0.9 * v + push[1]])
            writer.add(np.stack([*obs, state]), action, np.array(reward), terminated=False)
    return EpisodeStore.open(tmp_path / "store")


@pytest.mark.parametrize("latent", LATENTS)
def test_the_loss_is_equation_10(latent):
    m, w, c = model(latent=latent, termination_dim=8).double(), windows(), PretrainingConfig(horizon=4)
    unit = torch.ones(m.config.latent_dim).double()
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.4)
        if m.config.residual:  # errors count in units of a step's change
            m.step_mean.normal_(0, 0.2)
            unit = m.step_std.uniform_(0.8, 1.5)
    consistency = reward = ended = 0.0
    z = m.encode(w.obs[0])
    for h in range(4):
        weight = c.rho**h / 4
        logits = m.reward_logits(z, w.action[h])
        goal = two_hot.encode(w.reward[h], 101, -10, 10)
        reward += weight * -(goal * torch.log_softmax(logits, -1)).sum(-1).mean()
        z = m.next(z, w.action[h])
        consistency += weight * F.mse_loss(z / unit, m.encode(w.obs[h + 1]).detach() / unit)
        logit = m.termination_logit(z)
        ended += weight * F.binary_cross_entropy_with_logits(logit, w.terminated[h])
    total = c.consistency_coef * consistency + c.reward_coef * reward + c.termination_coef * ended
    gradients = torch.autograd.grad(total, list(m.parameters()))
    torch.testing.assert_close(ModelGradient(m)(w, c)["total"], total, rtol=1e-10, atol=0)
    for p, expected in zip(m.parameters(), gradients):
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)


def test_what_follows_an_episodes_end_does_not_count():
    m, w, c = model(termination_dim=8).double(), windows(), PretrainingConfig(horizon=4)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.4)
    gradient = ModelGradient(m)
    w.valid = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 0]]).double()
    before = {k: v.item() for k, v in gradient(w, c).items()}
    w.obs[3:, 1], w.obs[4:, 2] = 99.0, -99.0
    w.action[2:, 1], w.reward[3:, 2], w.terminated[2:, 1] = 0.5, 7.0, 1.0
    assert {k: v.item() for k, v in gradient(w, c).items()} == pytest.approx(before, rel=1e-12)
    w.reward[1, 1] = 7.0
    assert gradient(w, c)["reward"].item() != pytest.approx(before["reward"], rel=1e-3)


def test_learning_beats_the_mean_on_held_out_episodes(store):
    config = PretrainingConfig(steps=300, batch_size=64, horizon=8, learning_rate=3e-3, encoder_lr_scale=1.0)
    m = model()
    with torch.no_grad():  # the published small initial weights cost a thousand steps on a plateau
        for layer in [*m._encoder, *m._dynamics, *m._reward[:-1]]:
            layer.weight.normal_(0, layer.in_features**-0.5)
    training = StoreTraining(store, m, config, seed=0, validation_horizon=8)
    before = training.validate()
    for _ in range(300):
        training.pretraining.step()
    after = training.validate()
    assert after["return_r2"] > 0.5 > before["return_r2"]  # 0.76 when measured; 0 is the mean's
    assert after["latent_error"] < 0.9 < before["latent_error"]  # 0.77 when measured; 1 is the mean's


def test_residual_dynamics_learn_a_linear_system_almost_exactly(store):
    m = model(latent="observation", num_bins=1)
    training = StoreTraining(store, m, replace(PRESETS["observation"], steps=400, batch_size=256), validation_horizon=8)
    moved = m.step_std.clone()
    for _ in range(400):
        training.pretraining.step()
    assert torch.equal(m.step_std, moved) and (moved < 0.5).all()
    after = training.validate()
    assert after["latent_error"] < 0.02 and after["return_r2"] > 0.98


def test_resume_through_a_file_is_exact(store, tmp_path):
    config = PretrainingConfig(steps=12, batch_size=16, horizon=6)
    whole = StoreTraining(store, model(), config, seed=1).pretraining
    losses = [whole.step()["total"] for _ in range(12)]
    first = StoreTraining(store, model(), config, seed=1).pretraining
    for _ in range(5):
        first.step()
    save_state(tmp_path / "state.safetensors", first.state_dict())
    second = StoreTraining(store, model(seed=9), config, seed=1).pretraining
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert [second.step()["total"] for _ in range(7)] == losses[5:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_the_encoder_learns_slower_and_the_rate_decays_late(store):
    learner = Pretraining(model(), PretrainingConfig(steps=100), lambda step: windows())
    assert learner.learning_rate(0) == learner.learning_rate(60) == 3e-4
    assert learner.learning_rate(80) == pytest.approx(3e-4 * 0.51)
    assert learner.learning_rate(100) == pytest.approx(3e-4 * 0.02)
    before = learner.model.copy()
    learner.step()  # Adam's first moves a parameter by the rate, whatever its gradient
    for name, rate in (("_encoder.0.weight", 0.3 * 3e-4), ("_dynamics.0.weight", 3e-4)):
        moved = learner.model.state_dict()[name] - before.state_dict()[name]
        assert moved.abs().max().item() == pytest.approx(rate, rel=1e-3)


def test_a_broken_loss_says_where_to_look():
    bad = windows()
    bad.reward[0, 0] = float("nan")
    w = Windows(bad.obs.float(), bad.action.float(), bad.reward.float(), bad.terminated.float())
    m = model(num_bins=1)
    with pytest.raises(FloatingPointError, match="at step 0: check the data"):
        Pretraining(m, PretrainingConfig(steps=2), lambda step: w).step()


def test_validation_measures_the_error_that_was_put_in():
    m = model(num_bins=1).double()
    w = windows(horizon=3, batch=200)
    with torch.no_grad():
        z, rewards = m.encode(w.obs[0]), []
        for h in range(3):
            rewards.append(m.reward(z, w.action[h]))
            z = m.next(z, w.action[h])
    w.reward = torch.stack(rewards) + torch.linspace(-1, 1, 200).double()  # so that there is variance to explain
    found = validate(m, [w], [])
    assert found["reward_mae"] == pytest.approx(torch.linspace(-1, 1, 200).abs().mean().item(), rel=1e-6)


def test_auc_counts_ordered_pairs():
    score, label = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0.0, 0, 1, 1])
    assert _auc(score, label) == pytest.approx(0.75)


def test_a_store_of_another_shape_is_refused(store):
    other = WorldModel(WorldModelConfig(5, 2, 16, 32, 32, 2))
    with pytest.raises(ValueError, match="4 observations and 2 actions, the world model 5 and 2"):
        StoreTraining(store, other, PretrainingConfig(steps=1))
