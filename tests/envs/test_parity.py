"""Our tasks against the original dflex: transitions, 64-step trajectories, observations, rewards and gradients."""

import pytest
import torch
from recorded import TASKS, TOLERANCES, gradients, trajectory

from pwm_fast.envs.dflex import DifferentiableEnv


def environment(task, num_envs, **options):
    return DifferentiableEnv(task, num_envs, early_termination=False, **options)


@pytest.mark.parametrize("task", TASKS)
def test_every_recorded_transition(task):
    data, tolerance = trajectory(task), TOLERANCES[task]
    next_q = torch.cat([data["joint_q"][1:], data["joint_q_final"][None]]).flatten(0, 1)
    next_qd = torch.cat([data["joint_qd"][1:], data["joint_qd_final"][None]]).flatten(0, 1)
    env = environment(task, len(next_q))
    env.set_state(data["joint_q"].flatten(0, 1), data["joint_qd"].flatten(0, 1))
    with torch.no_grad():
        env.step(data["action"].flatten(0, 1))
    q, qd = env.state()
    assert (q - next_q).abs().max() < tolerance.q
    assert (qd - next_qd).abs().max() < tolerance.qd


@pytest.mark.parametrize("task", TASKS)
def test_open_loop_trajectories_observations_and_rewards(task):
    data, tolerance = trajectory(task), TOLERANCES[task]
    env = environment(task, 4)
    obs = env.set_state(data["joint_q"][0], data["joint_qd"][0])
    assert (obs - data["obs_initial"]).abs().max() < 2e-6
    with torch.no_grad():
        for t, action in enumerate(data["action"]):
            obs, reward, terminated, truncated, _ = env.step(action)
            assert (obs - data["obs_after"][t]).abs().max() < tolerance.obs
            assert (reward - data["reward_after"][t]).abs().max() < tolerance.reward
            assert not terminated.any() and not truncated.any()
    assert (env.state()[0] - data["joint_q_final"]).abs().max() < tolerance.open_loop_q


@pytest.mark.parametrize("task", TASKS)
def test_observation_and_reward_of_recorded_states(task):
    data = trajectory(task)
    row = environment(task, 1).task
    after_q = torch.cat([data["joint_q"][1:], data["joint_q_final"][None]]).flatten(0, 1)
    after_qd = torch.cat([data["joint_qd"][1:], data["joint_qd_final"][None]]).flatten(0, 1)
    action = data["action"].flatten(0, 1)
    assert (row.observe(after_q, after_qd, action) - data["obs_after"].flatten(0, 1)).abs().max() < 2e-6
    before = torch.cat([data["obs_initial"][None], data["obs_after"][:-1]]).flatten(0, 1)
    assert (row.reward(before, action) - data["reward_after"].flatten()).abs().max() < 2e-6


@pytest.mark.parametrize("horizon", [4, 16])
@pytest.mark.parametrize("task", TASKS)
def test_recorded_gradients(task, horizon):
    data = gradients(task)
    env = environment(task, 8)
    env.set_state(data["start_joint_q"], data["start_joint_qd"])
    action = data["action"][:horizon].clone().requires_grad_()
    reward = torch.stack([env.step(a)[1] for a in action])
    reward.sum().backward()
    expected = data[f"grad_H{horizon}"].transpose(0, 1).flatten(1)
    error = (action.grad.transpose(0, 1).flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)
    assert (reward - data[f"reward_H{horizon}"]).abs().max() < 1e-3
    assert error.max() < 1e-3
    assert error.median() < 1e-4
