"""The explicit gradient of world-model learning equals autograd's, for every kind of model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from autograd_pretraining import AutogradPretraining, fused_rollout, loss_terms

from pwm_fast.learning.model_gradient import ModelGradient
from pwm_fast.learning.pretraining import Pretraining, PretrainingConfig, Windows
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

OBS, ACTION, TASKS = 7, 3, 4
KINDS = {
    "simnorm": {},
    "simnorm-tasks": {"num_tasks": TASKS, "task_dim": 5},
    "simnorm-tasks-ends-symlog": {"num_tasks": TASKS, "task_dim": 5, "termination_dim": 9, "reward_symlog": True},
    "simnorm-scalar-reward": {"num_bins": 1, "termination_dim": 9},
    "observation": {"latent": "observation", "termination_dim": 9, "num_bins": 1},
    "observation-tasks": {"latent": "observation", "num_tasks": TASKS, "task_dim": 5, "termination_dim": 9},
}


def model(kind: str, dtype: torch.dtype = torch.float64, scale: float = 0.4) -> WorldModel:
    torch.manual_seed(0)
    widths = (OBS, 24, 0, 0) if "observation" in kind else (16, 24, 20, 3)
    m = WorldModel(WorldModelConfig(OBS, ACTION, *widths, **KINDS[kind])).to(dtype)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, scale)
        m.obs_mean.normal_()
        m.obs_std.uniform_(0.5, 2.0)
        m.reward_scale.fill_(1.3)
        if m.config.residual:
            m.step_mean.normal_(0, 0.2)
            m.step_std.uniform_(0.2, 1.5)
        if m.config.num_tasks:
            m._task_emb.weight[0] *= 0.05  # a row that max_norm leaves alone
    return m


def windows(m: WorldModel, horizon: int = 4, batch: int = 6, ends: bool = False) -> Windows:
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(m.obs_mean.dtype)  # noqa: E731
    return Windows(
        draw(horizon + 1, batch, OBS),
        draw(horizon, batch, ACTION),
        draw(horizon, batch),
        (draw(horizon, batch) > 1).to(m.obs_mean.dtype),
        torch.arange(batch) % TASKS if m.config.num_tasks else None,
        (draw(horizon, batch) > -1).to(m.obs_mean.dtype) if ends else None,
    )


def flat(m: WorldModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in m.parameters()])


@pytest.mark.parametrize("ends", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_terms_and_gradients_are_autograds(kind: str, horizon: int, ends: bool) -> None:
    m, config = model(kind), PretrainingConfig(horizon=horizon, reward_coef=1.0, termination_coef=0.7)
    w = windows(m, horizon, ends=ends)
    expected = loss_terms(m, w, config)
    gradients = dict(zip(dict(m.named_parameters()), torch.autograd.grad(expected["total"], list(m.parameters()))))
    gradient = ModelGradient(m)
    for p in m.parameters():
        p.grad.fill_(3.0)  # what was there must not matter
    for _ in range(2):
        found = gradient(w, config)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)
        for name, p in m.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_steps_stay_beside_autograds(kind: str) -> None:
    """The products run natively where they can, Adam divides small gradients by small ones: to 2e-3 of an update."""
    learners = []
    for make in (Pretraining, AutogradPretraining):
        m = model(kind, torch.float32, 0.2)
        config = PretrainingConfig(steps=20, horizon=4, learning_rate=1e-3)
        learners.append(make(m, config, lambda step, m=m: windows(m, batch=33 + step)))
    for _ in range(6):
        one, other = (learner.step() for learner in learners)
        assert one == pytest.approx(other, rel=1e-4)
    for a, b in zip(*(learner.parameters for learner in learners)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_rounds_as_autocast_does(kind: str) -> None:
    """Each differs from float32 by about the same, and they agree on the direction."""
    m, config = model(kind, torch.float32, 0.2), PretrainingConfig(precision="bf16")
    w, found = windows(m, batch=64), []
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        ModelGradient(m, dtype)(w, config)
        found.append(flat(m))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total = loss_terms(m, w, config, fused_rollout)["total"]
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(m.parameters()))]))
    exact, _, ours, autocast = found
    distance = lambda a: float((a - exact).norm() / exact.norm())  # noqa: E731
    assert 1e-5 < distance(ours) < 1.5 * distance(autocast)


def test_batches_of_several_sizes_do_not_meet() -> None:
    m = model("simnorm-tasks-ends-symlog")
    gradient, config = ModelGradient(m), PretrainingConfig()
    first = windows(m, horizon=3, batch=5)
    gradient(first, config)
    expected = flat(m)
    gradient(windows(m, horizon=5, batch=3), config)  # as many rows, in another shape
    gradient(windows(m, horizon=1, batch=2), config)
    gradient(first, config)
    assert torch.equal(flat(m), expected)


def test_errors_far_outside_a_step_give_no_gradient() -> None:
    m = model("observation")
    w = windows(m, horizon=1)
    w.obs[1, 0] += 1e4
    gradient, config = ModelGradient(m), PretrainingConfig(horizon=1, reward_coef=0.0, termination_coef=0.0)
    gradient(w, config)
    with_outlier = flat(m)
    others = Windows(w.obs[:, 1:], w.action[:, 1:], w.reward[:, 1:], w.terminated[:, 1:])
    gradient(replace(others), config)
    torch.testing.assert_close(with_outlier * 6 / 5, flat(m), rtol=1e-10, atol=1e-12)
    assert with_outlier.norm() > 0
