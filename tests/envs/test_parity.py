"""Our robots against recorded dflex states, observations, rewards and gradients (tolerances: SPEC section 9)."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from pwm_fast.envs.dflex import DifferentiableEnv

DATA = Path(__file__).parents[1] / "data" / "dflex"
FILES = {"hopper": "hopper", "ant": "ant", "humanoid": "humanoid", "anymal": "anymal", "snu-humanoid": "snu"}
# largest error of one step in joint_q and joint_qd, and of an open loop of 63 steps in joint_q, that float32 allows
TOLERANCE = {
    "hopper": (5e-7, 1e-5, 1e-4),
    "ant": (2e-6, 2e-4, 1e-4),
    "humanoid": (5e-6, 4e-4, 2e-4),
    "anymal": (2e-6, 1e-4, 1e-4),
    "snu-humanoid": (5e-6, 4e-4, 3e-4),
}


@cache
def recorded(task: str, kind: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / f"{FILES[task]}_{kind}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def environment(task: str, num_envs: int, **options) -> DifferentiableEnv:
    return DifferentiableEnv(task, num_envs, early_termination=False, **options)


@pytest.mark.parametrize("task", FILES)
def test_one_step_from_every_recorded_state(task):
    d = recorded(task, "traj")
    steps, envs = d["action"].shape[:2]
    env = environment(task, steps * envs)
    with torch.no_grad():
        env.set_state(d["joint_q"].flatten(0, 1), d["joint_qd"].flatten(0, 1))
        env.step(d["action"].flatten(0, 1))
    q, qd = env.state()
    next_q = torch.cat([d["joint_q"][1:], d["joint_q_final"][None]]).flatten(0, 1)
    next_qd = torch.cat([d["joint_qd"][1:], d["joint_qd_final"][None]]).flatten(0, 1)
    assert (q - next_q).abs().max() < TOLERANCE[task][0]
    assert (qd - next_qd).abs().max() < TOLERANCE[task][1]


@pytest.mark.parametrize("task", FILES)
def test_open_loop_states_observations_and_rewards(task):
    d = recorded(task, "traj")
    env = environment(task, d["action"].shape[1])
    with torch.no_grad():
        obs = env.set_state(d["joint_q"][0], d["joint_qd"][0])
        assert (obs - d["obs_initial"]).abs().max() < 2e-6
        for t, action in enumerate(d["action"]):
            assert (env.state()[0] - d["joint_q"][t]).abs().max() < TOLERANCE[task][2], t
            obs, reward, terminated, truncated, _ = env.step(action)
            assert not (terminated | truncated).any()
            if t < 8:  # later the states' own drift shows
                assert (obs - d["obs_after"][t]).abs().max() < 1e-3, t
                assert (reward - d["reward_after"][t]).abs().max() < 1e-3, t


@pytest.mark.parametrize("horizon", [4, 16])
@pytest.mark.parametrize("task", FILES)
def test_gradients_of_rewards_by_actions(task, horizon):
    d = recorded(task, "grad")
    env = environment(task, 8, action_in_obs=False)
    env.set_state(d["start_joint_q"], d["start_joint_qd"])
    actions = d["action"][:horizon].clone().requires_grad_()
    rewards = torch.stack([env.step(action)[1] for action in actions])
    rewards.sum().backward()
    assert (rewards - d[f"reward_H{horizon}"]).abs().max() < 2e-4
    expected = d[f"grad_H{horizon}"].transpose(0, 1).flatten(1)
    error = (actions.grad.transpose(0, 1).flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-3 and error.median() < 1e-4, error


@pytest.mark.parametrize("task", ["hopper", "ant", "humanoid"])
def test_gradients_against_central_differences(task):
    """Along random directions of the first action and the state, over 2 steps; the median of 8 environments.

    Float32 differences of a stiff system are rough and contacts switch within a step, hence the median and the bound.
    """
    d = recorded(task, "grad")
    env = environment(task, 8, action_in_obs=False)
    generator = torch.Generator().manual_seed(1)
    q, qd, action = d["start_joint_q"].clone(), d["start_joint_qd"].clone(), d["action"][:2].clone()
    directions = [torch.randn(x.shape, generator=generator) for x in (action, qd)]

    def rewards(action, qd):
        env.set_state(q, qd)
        out = [env.step(a)[1] for a in action]
        return sum(out) + env.step(torch.zeros_like(action[0]))[1]  # rewards are of the state before a step

    leaves = [action.requires_grad_(), qd.requires_grad_()]
    env.set_state(q, qd.detach())
    env.q, env.qd = q, leaves[1]
    env.obs = env._observe(recording=True)
    total = sum(env.step(a)[1] for a in leaves[0]) + env.step(torch.zeros_like(action[0]).detach())[1]
    gradients = torch.autograd.grad(total.sum(), leaves)
    for i, (gradient, direction) in enumerate(zip(gradients, directions)):
        slope = (gradient * direction).flatten(1).sum(1) if i else (gradient * direction).sum((0, 2))
        step = 1e-3
        with torch.no_grad():
            moved = [[x + s * step * direction if i == j else x for j, x in enumerate(leaves)] for s in (1, -1)]
            difference = (rewards(*moved[0]) - rewards(*moved[1])) / (2 * step)
        error = (slope - difference).abs() / difference.abs().clamp(min=1.0)
        assert error.median() < 0.02, (i, slope, difference)


@pytest.mark.parametrize("task", FILES)
def test_results_do_not_depend_on_the_number_of_threads(task):
    found = []
    for threads in (1, 2, 3):
        env = DifferentiableEnv(task, 7, seed=3, threads=threads)
        action = torch.zeros(7, env.action_dim).requires_grad_()
        obs, reward, *_ = env.step(action)
        obs, reward, *_ = env.step(action * 0.5)
        gradient = torch.autograd.grad(obs.sum() + reward.sum(), action)[0]
        found.append((obs.detach(), reward.detach(), gradient))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("task", FILES)
def test_random_steps_stay_finite(task):
    """20,000 environment steps of random actions here for each of five tasks: 100,000 in all."""
    env = DifferentiableEnv(task, 250, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(80):
            action = 2 * torch.rand(250, env.action_dim, generator=generator) - 1
            obs, reward, *_ = env.step(action)
            assert torch.isfinite(obs).all() and torch.isfinite(reward).all()
