"""The gradient that comes back from imagined trajectories, by central differences and by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import ACTION_DIM, OBS_DIM, extraction, relative, start_obs, world_model
from torch import Tensor

from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.imagination import Rollout
from pwm_fast.models.world_model import LATENTS


def imagine(ext: Extraction) -> Rollout:
    """A rollout with fixed noise."""
    c = ext.config
    generator = torch.Generator().manual_seed(5)
    shape = (ext.policies_count, c.horizon, c.batch_size, ACTION_DIM)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return ext.imagination.rollout(ext.actor, start_obs(ext), noise)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize(
    "of", ["reward", "continues", "last_latent"], ids=lambda name: f"gradient-of-{name.replace('_', '-')}"
)
def test_gradient_by_central_differences(of: str, latent: str) -> None:
    """Directional derivatives of a random linear function of rewards, continuations or z_H, policy by policy."""
    model = world_model(termination_dim=11, latent=latent)
    ext = extraction(model, policies=2, terminations=True, detach_actor_input=False)
    rollout, generator = imagine(ext), torch.Generator().manual_seed(6)

    def random_like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    last = ext.config.horizon
    values: dict[str, Callable[[Rollout], Tensor]] = {
        "reward": lambda r: r.reward,
        "continues": lambda r: r.continues,
        "last_latent": lambda r: r.latents[:, last],
    }
    gradients = {name: torch.zeros_like(value(rollout)) for name, value in values.items()}
    gradients[of] = random_like(gradients[of])
    ext.imagination.backward(
        ext.actor, rollout, gradients["reward"], gradients["continues"], gradients["last_latent"], False
    )
    flat, step = ext.actor.parameters.flat, 1e-6
    for policy in range(2):
        direction = torch.zeros_like(flat)
        direction[policy] = random_like(flat[policy])
        for name, offset in ext.actor.parameters._offsets.items():  # padding is no parameter
            end = offset + ext.actor.parameters.views[name][0].numel()
            direction[policy, end : end + -end % 16] = 0
        start, ends = flat.clone(), []
        for sign in (1, -1):
            flat.copy_(start + sign * step * direction)
            ends.append((values[of](imagine(ext)) * gradients[of]).sum().item())
        flat.copy_(start)
        expected = (ends[0] - ends[1]) / (2 * step)
        actual = (ext.actor.parameters.grad * direction).sum().item()
        assert actual == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("latent", LATENTS)
def test_rollout_is_the_world_model_step_by_step(latent: str) -> None:
    model = world_model(termination_dim=11, latent=latent)
    ext = extraction(model, policies=3, terminations=True)
    rollout, tasks = imagine(ext), torch.tensor([0, 1, 2])[:, None]
    with torch.no_grad():
        z = model.encode(start_obs(ext), tasks)
        for h in range(ext.config.horizon):
            assert relative(rollout.latents[:, h], z) < 1e-12
            action = ext.actor.forward(z, rollout.noise[:, h]).action
            assert relative(rollout.reward[h], model.reward(z, action, tasks)) < 1e-12
            z = model.next(z, action, tasks)
            ended = torch.sigmoid(model.termination_logit(z, tasks))
            assert relative(rollout.continues[h], 1 - ended) < 1e-12


def test_no_gradient_reaches_the_world_model() -> None:
    model = world_model()
    ext = extraction(model)
    ext.step(start_obs(ext))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("latent", LATENTS)
def test_observation_statistics_are_part_of_the_model(latent: str) -> None:
    """Raw observations go in; folding mean and standard deviation into the first layer changes nothing."""
    model = world_model(latent=latent)
    ext = extraction(model)
    obs = torch.randn(1, ext.config.batch_size, OBS_DIM, dtype=torch.float64)
    z = ext.imagination.encoder.forward(obs)[0]
    assert relative(z, model.encode(obs, torch.zeros(1, 1, dtype=torch.int64)).detach()) < 1e-12


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "not-detached"])
def test_along_the_models_own_trajectory_it_is_imagination(detach: bool) -> None:
    """Real trajectories of a world that is the model give the imagined rollout, and its gradient."""
    model = world_model(termination_dim=11, latent="observation", tasks=0)
    ext = extraction(model, policies=2, terminations=True)
    imagined = imagine(ext)
    obs = (imagined.latents * model.obs_std + model.obs_mean).transpose(0, 1)  # [H+1, P, B, S]
    action = torch.stack([sample.action for sample in imagined.actor])
    generator = torch.Generator().manual_seed(7)
    like = torch.randn(imagined.reward.shape, generator=generator, dtype=torch.float64)
    d_last = torch.randn(imagined.latents[:, -1].shape, generator=generator, dtype=torch.float64)
    gradients = []
    for kind in ("imagined", "real"):
        rollout = imagine(ext)  # the networks' memory is that of the last rollout
        if kind == "real":
            continues = imagined.continues.clone()
            rollout = ext.imagination.along(ext.actor, obs, action, imagined.reward.clone(), continues)
            assert relative(rollout.latents, imagined.latents) < 1e-12
            assert relative(rollout.noise, imagined.noise) < 1e-9
        ext.imagination.backward(ext.actor, rollout, like, 0.3 * like, d_last, detach)
        gradients.append(ext.actor.parameters.grad.clone())
    assert relative(gradients[1], gradients[0]) < 1e-9


def test_values_along_real_trajectories_are_the_real_ones() -> None:
    ext = extraction(world_model(termination_dim=11, latent="observation", tasks=0), terminations=True)
    c, g = ext.config, torch.Generator().manual_seed(1)
    shape = (c.horizon, 1, c.batch_size)
    obs = torch.randn(c.horizon + 1, 1, c.batch_size, OBS_DIM, generator=g, dtype=torch.float64)
    action = torch.rand(*shape, ACTION_DIM, generator=g, dtype=torch.float64) - 0.5
    reward, terminated = torch.randn(shape, generator=g, dtype=torch.float64), torch.zeros(shape)
    terminated[2, 0, 1] = 1.0
    valid = torch.ones(shape, dtype=torch.bool)
    valid[3:, 0, 1] = False
    latents = ext.imagination.encoder.forward(obs)[0].transpose(0, 1).flatten(1, 2)
    value = ext.critic.forward(latents)[0][0].amin(0).view(c.horizon + 1, c.batch_size).clone()
    metrics = ext.step_along(obs, action, reward, terminated, valid)
    assert metrics["imagined_reward"].item() == pytest.approx(reward.mean().item(), rel=1e-9)
    discount = c.gamma ** torch.arange(c.horizon, dtype=torch.float64)
    returns = (discount[:, None] * reward[:, 0]).sum(0) + c.gamma**c.horizon * value[-1]
    returns[1] = (discount[:3] * reward[:3, 0, 1]).sum()  # it fell in the third step
    assert metrics["imagined_return"].item() == pytest.approx(returns.mean().item(), rel=1e-9)
