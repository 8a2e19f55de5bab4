"""Policies of one world model whose tasks have fewer observations and actions than it was padded to."""

import numpy as np
import pytest
import torch
from small import ACTION_DIM, OBS_DIM, SMALL, relative, start_obs, world_model

from pwm_fast.learning.extraction import Extraction, ExtractionConfig

DIMS = [(OBS_DIM, ACTION_DIM), (4, 2), (5, 1)]


def padded(**options) -> Extraction:
    config = ExtractionConfig(**{**SMALL, **options})
    return Extraction(world_model(), config, [0, 1, 2], [10, 11, 12], total_steps=50, dims=DIMS)


def starts(ext: Extraction, seed: int) -> torch.Tensor:
    obs = start_obs(ext, seed)
    for row, (obs_dim, _) in zip(obs, DIMS):
        row[:, obs_dim:] = 0
    return obs


def test_actions_beyond_a_tasks_own_are_zero_before_and_after_learning():
    ext = padded(detach_actor_input=False, actor_lr=1e-2)
    before = ext.actor.parameters.flat.clone()
    for step in range(4):
        rollout = ext.imagination.rollout(ext.actor, starts(ext, step), ext.action_noise(ext.iteration))
        for p, (_, action_dim) in enumerate(DIMS):
            actions = rollout.inputs[:-1, p, :, ext.world_config.latent_dim :]
            assert (actions[..., action_dim:] == 0).all()
            assert (actions[..., :action_dim] != 0).all()
        ext.step(starts(ext, step))
    assert (ext.actor.parameters.flat != before).any(1).all()


def test_a_tasks_gradient_is_that_of_an_actor_with_its_actions_alone():
    """A finite difference of the imagined return along the gradient, which only the used actions can change."""
    ext = padded(detach_actor_input=False, actor_delay=9, return_normalisation=False)
    obs, noise = starts(ext, 0), ext.action_noise(ext.iteration)

    def loss() -> torch.Tensor:
        return ext.update_actor(ext.imagination.rollout(ext.actor, obs, noise))[0]["actor_loss"]

    loss()
    gradient = ext.actor.parameters.grad.clone()  # as clipped, so along the gradient
    last = f"{ext.actor.mlp.depth - 1}"
    for p, (_, action_dim) in enumerate(DIMS):
        for name in (f"{last}.weight", f"{last}.bias", "log_std"):
            assert (ext.actor.parameters.grads[name][p, action_dim:] == 0).all()
    direction = gradient / gradient.norm(dim=1, keepdim=True)
    original, h, losses = ext.actor.parameters.flat.clone(), 1e-6, []
    for sign in (1, -1):
        ext.actor.parameters.flat.copy_(original + sign * h * direction)
        losses.append(loss())
    numeric = (losses[0] - losses[1]) / (2 * h)
    assert relative((gradient * direction).sum(1), numeric) < 1e-5


def test_finished_policies_take_and_give_what_the_task_has():
    ext = padded()
    ext.step(starts(ext, 0))
    for p, (policy, (obs_dim, action_dim)) in enumerate(zip(ext.policies(), DIMS)):
        assert (policy.obs_dim, policy.action_dim) == (obs_dim, action_dim)
        obs = starts(ext, 1)[p]
        z = ext.imagination.encoder.forward(obs.expand(3, -1, -1))[0]
        expected = ext.actor.mean(z)[p, :, :action_dim]
        torch.testing.assert_close(policy.act(obs[:, :obs_dim]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [[(OBS_DIM + 1, 1)] * 3, [(1, 0)] * 3, [(1, 1)] * 2], ids=["wide", "none", "two"])
def test_sizes_that_cannot_be_are_refused(dims):
    with pytest.raises(ValueError, match="dims must"):
        Extraction(world_model(), ExtractionConfig(**SMALL), [0, 1, 2], [10, 11, 12], dims=dims)


def test_a_native_step_masks_as_the_plain_one(monkeypatch):
    results = []
    for backend in ("torch", "native"):
        monkeypatch.setenv("PWM_FAST_BACKEND", backend)
        model = world_model(dtype=torch.float32)
        ext = Extraction(model, ExtractionConfig(**SMALL), [0, 1, 2], [10, 11, 12], dims=DIMS)
        obs = starts(ext, 0)
        for _ in range(3):
            ext.step(obs)
        results.append(ext.actor.parameters.flat.numpy().copy())
    np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-5)
