"""What surrounds the dynamics in a step, against the tasks' torch definitions in float64, gradients included."""

import pytest
import torch
from recorded import TASKS

from pwm_fast.envs.dflex import DifferentiableEnv, tasks
from pwm_fast.envs.dflex.simulator import Simulator

NUM_ENVS = 21  # a bundle and a part of another


def environment(task, **options):
    """A third stands deeper, half are 20 m from the world's origin, all move; some actions will be clipped."""
    env = DifferentiableEnv(task, NUM_ENVS, seed=4, **options)
    q, qd = (x.clone() for x in env.state())
    generator = torch.Generator().manual_seed(2)
    q[::2, 0] += 20.0
    qd += 0.3 * torch.randn(qd.shape, generator=generator)
    q[::3, 1] -= 0.03
    env.set_state(q, qd)
    return env, 2.4 * torch.rand(NUM_ENVS, env.action_dim, generator=generator) - 1.2


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def definition(env, before, action, shown):
    """(q, qd, obs, reward) of a step, float64 around the float32 dynamics; differentiable in before and action."""
    q, qd, obs = before
    clipped = action.clip(-1.0, 1.0)
    simulator = Simulator(env.model, NUM_ENVS, env.task.substeps, env.task.refresh, threads=1)
    origin = q.detach()[:, 0:3:2] if env.model.has_free_root else q.detach()[:, :1]
    if env.model.has_ball_joints:
        origin = origin * (env.progress > 0)[:, None]
    q1, qd1 = simulator.step(q, qd, clipped * env._full_command, origin)
    shown_action = clipped if shown else torch.zeros_like(clipped)
    exact = tasks.attitude_forms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "attitude_forms", lambda start: tuple(x.double() for x in exact(start)))
        obs1 = env.task.observe(q1.double(), qd1.double(), shown_action.double())
    return q1, qd1, obs1, env.task.reward(obs.double(), clipped.double())


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_is_the_definitions_around_the_dynamics(task, shown, monkeypatch):
    """Results, and the gradients of a random combination of all of them in state, observation and action."""
    env, action = environment(task, action_in_obs=shown, early_termination=False)
    before = (*env.state(), env.obs)
    mine, theirs = leaves(*before, action), leaves(*before, action)
    monkeypatch.setattr(env, "q", mine[0])
    monkeypatch.setattr(env, "qd", mine[1])
    monkeypatch.setattr(env, "obs", mine[2])
    expected = definition(env, theirs[:3], theirs[3], shown)
    obs, reward, *_ = env.step(mine[3])
    found = (*env.state(), obs, reward)
    generator, losses = torch.Generator().manual_seed(3), [0.0, 0.0]
    size = 1 + found[0].detach().abs().amax(1) * found[1].detach().abs().amax(1)  # v + omega x p cancels in float32
    for a, b in zip(found, expected):
        assert ((a - b).abs().view(NUM_ENVS, -1).amax(1) <= 1e-6 * size).all()
        weights = torch.randn(a.shape, generator=generator)
        losses = [losses[0] + (a * weights).sum(), losses[1] + (b * weights).sum()]
    gradients = zip(torch.autograd.grad(losses[0], mine), torch.autograd.grad(losses[1], theirs))
    for name, (a, b) in zip(("q", "qd", "obs", "action"), gradients):
        error = (a - b).norm(dim=1) / (b.norm(dim=1) + b.norm(dim=1).mean())
        # a hard contact amplifies the last digit: with torch's own float32 observation the largest is 5e-4, too
        assert error.median() < 1e-6 and error.max() < 2e-3, name


@pytest.mark.parametrize("task", ["hopper", "ant", "snu-humanoid"])
def test_an_ended_episode_passes_gradients_through_its_last_observation_only(task):
    env, action = environment(task, action_in_obs=False)
    (action,) = leaves(action)
    env.progress[::3] = 999
    obs, _, terminated, truncated, info = env.step(action)
    ended = terminated | truncated
    assert truncated.sum() == 7 and ended.sum() < NUM_ENVS
    weights = torch.randn(obs.shape, generator=torch.Generator().manual_seed(0))
    next_one = torch.autograd.grad((obs * weights).sum(), action, retain_graph=True)[0]
    last_one = torch.autograd.grad((info["final_obs"] * weights).sum(), action)[0]
    assert (next_one[ended] == 0).all() and (last_one[ended].abs().amax(1) > 0).all()
    assert torch.equal(next_one[~ended], last_one[~ended])


def test_new_episodes_start_from_states_of_their_own_in_turn():
    """Twenty falls of every robot: each time another start, the published noise around the nominal pose."""
    env = DifferentiableEnv("ant", NUM_ENVS, seed=3)
    seen = []
    with torch.no_grad():
        for _ in range(20):
            q, qd = (x.clone() for x in env.state())
            q[:, 1] = -0.5  # in the ground
            env.set_state(q, qd)
            _, _, terminated, _, _ = env.step(torch.zeros(NUM_ENVS, env.action_dim))
            assert terminated.all() and (env.progress == 0).all() and (env.action == 0).all()
            assert (env.obs - env.task.observe(*env.state(), env.action)).abs().max() < 1e-5
            seen.append(env.state()[0])
    starts = torch.cat(seen)
    assert len(starts.unique(dim=0)) == len(starts)
    assert ((starts[:, 7:] - env._start_q[7:]).abs() <= 0.2 + 1e-6).all()


def test_non_finite_gradients_of_a_step_become_zero():
    env, action = environment("ant", early_termination=False)
    (action,) = leaves(action)
    obs, *_ = env.step(action)
    weights = torch.ones_like(obs)
    weights[2, 5] = float("inf")
    (grad,) = torch.autograd.grad((obs * weights).sum(), action)
    assert torch.isfinite(grad).all() and (grad[[1, 3]] != 0).any()


def test_what_kernels_do_not_check_is_checked_before():
    env = DifferentiableEnv("hopper", 2)
    env.progress = torch.zeros(2)
    with pytest.raises(ValueError, match=r"progress0 must be \(2,\) of torch.int64, got \(2,\) of torch.float32"):
        env.step(torch.zeros(2, 3))
    simulator = Simulator(env.model, 2, 16)
    with pytest.raises(ValueError, match=r"command must have shape \(2, at most 6\), got \(2, 7\)"):
        simulator.step(*env.state(), torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"q0 must be \(2, 6\)"):
        simulator.step(torch.zeros(3, 6), torch.zeros(2, 6), torch.zeros(2, 3))


def test_a_second_derivative_is_refused():
    env, action = environment("hopper")
    (action,) = leaves(action)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(env.step(action)[0].sum(), action, create_graph=True)


def test_actions_of_another_type_or_layout():
    results = []
    for change in (torch.Tensor.float, torch.Tensor.double, lambda x: x.T.contiguous().T):
        env, action = environment("hopper")
        with torch.no_grad():
            results.append(env.step(change(action))[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
