"""What surrounds the dynamics: resets, ends of episodes, random numbers, resuming, and errors."""

import pytest
import torch
from recorded import TASKS

from pwm_fast.envs.dflex import DifferentiableEnv
from pwm_fast.envs.registry import UnknownTask


def random_actions(env, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(steps, env.num_envs, env.action_dim, generator=generator) - 1


@pytest.mark.parametrize("task", TASKS)
def test_random_steps_stay_finite(task):
    """100,000 random environment steps over the five tasks, with falls and resets, full-range actions."""
    env = DifferentiableEnv(task, 200, seed=3)
    actions, finished = random_actions(env, 100), 0
    with torch.no_grad():
        for action in actions:
            obs, reward, terminated, truncated, info = env.step(action)
            assert torch.isfinite(obs).all() and torch.isfinite(reward).all()
            assert torch.isfinite(info["final_obs"]).all()
            finished += int((terminated | truncated).sum())
    assert finished > 0


@pytest.mark.parametrize("task", TASKS)
def test_results_do_not_depend_on_threads_or_neighbours(task):
    """Bitwise: one thread, two or three, and the same robots in a batch of another size."""
    runs = []
    for num_envs, threads in ((50, 1), (50, 2), (50, 3), (7, 1)):
        env = DifferentiableEnv(task, 50, seed=1, threads=threads)
        q, qd = (x[:num_envs] for x in env.state())
        action = random_actions(env, 3)[:, :num_envs].clone().requires_grad_()
        env = DifferentiableEnv(task, num_envs, threads=threads, early_termination=False)
        env.set_state(q, qd)
        loss = sum(env.step(a)[1] for a in action)
        loss.sum().backward()
        runs.append((env.state()[0].detach()[:7], loss.detach()[:7], action.grad[:, :7]))
    for run in runs[1:]:
        for mine, first in zip(run, runs[0]):
            assert torch.equal(mine, first)


@pytest.mark.parametrize("task", TASKS)
def test_recording_a_graph_changes_no_state(task):
    start = DifferentiableEnv(task, 4, seed=2)
    states = []
    for grad in (False, True):
        env = DifferentiableEnv(task, 4, early_termination=False)
        env.set_state(*start.state())
        with torch.set_grad_enabled(grad):
            for action in random_actions(env, 3):
                env.step(action.requires_grad_(grad))
        states.append(torch.cat(env.state(), -1).detach())
    assert torch.equal(*states)


def test_seed_determines_resets_and_global_random_numbers_do_not():
    first = DifferentiableEnv("ant", 6, seed=5).reset()
    torch.manual_seed(99)
    assert torch.equal(first, DifferentiableEnv("ant", 6, seed=5).reset())
    assert not torch.equal(first, DifferentiableEnv("ant", 6, seed=6).reset())


@pytest.mark.parametrize("task", TASKS)
def test_reset_noise_has_the_published_ranges(task):
    env = DifferentiableEnv(task, 4000, threads=1)
    q, qd = env.state()
    start = env._start_q
    if task == "hopper":
        spread_q, spread_qd, joints = 0.05, 0.05, 0
    else:
        spread_q, spread_qd, joints = 0.2, 0.25, 7
        assert ((q[:, :3] - start[:3]).abs().amax(0) - 0.1).abs().max() < 2e-3
        angle = 2 * torch.acos((q[:, 3:7] * start[3:7]).sum(-1).abs().clip(max=1))
        assert angle.max() < torch.pi / 24 + 1e-3 and angle.max() > 0.12
    assert ((q[:, joints:] - start[joints:]).abs().amax(0) - spread_q).abs().max() < 2e-3
    assert (qd.abs().amax(0) - spread_qd).abs().max() < 2e-3
    assert qd.mean().abs() < 5e-3


def test_falling_ends_an_episode_and_the_next_one_starts_at_once():
    env = DifferentiableEnv("humanoid", 3)
    q, qd = (x.clone() for x in env.state())
    # lying just under the limit: upright its feet would be deep in the ground, which would throw it out again
    q[1, 1], q[1, 3:7], qd[1] = 0.7, torch.tensor([0.0, 0.0, 0.0, 1.0]), 0.0
    env.set_state(q, qd)
    with torch.no_grad():
        obs, _, terminated, truncated, info = env.step(torch.full((3, 21), 0.3))
    assert terminated.tolist() == [False, True, False] and not truncated.any()
    assert info["final_obs"][1, 0] < 0.74 < 1.2 < obs[1, 0]
    assert torch.equal(info["final_obs"][0], obs[0])
    assert (obs[1, 55:] == 0).all() and torch.allclose(obs[0, 55:], torch.tensor(0.3))
    assert env.progress.tolist() == [1, 0, 1]


def test_without_early_termination_only_a_broken_state_ends_an_episode():
    env = DifferentiableEnv("humanoid", 2, early_termination=False)
    q, qd = (x.clone() for x in env.state())
    q[0, 1] = 0.4
    qd[1, 8] = 5e6
    before = env.set_state(q, qd)
    with torch.no_grad():
        obs, _, terminated, _, info = env.step(torch.zeros(2, 21))
    assert terminated.tolist() == [False, True]
    assert torch.isfinite(obs).all() and torch.equal(info["final_obs"][1], before[1])


def test_truncation_at_the_thousandth_step():
    env = DifferentiableEnv("ant", 2)
    env.progress = torch.tensor([998, 999])
    with torch.no_grad():
        _, _, terminated, truncated, _ = env.step(torch.zeros(2, 8))
        assert truncated.tolist() == [False, True] and not terminated.any()
        _, _, _, truncated, _ = env.step(torch.zeros(2, 8))
    assert truncated.tolist() == [True, False]


def test_reward_is_of_the_observation_before_the_step():
    env = DifferentiableEnv("anymal", 3, seed=1)
    action = random_actions(env, 1)[0]
    before = env.obs.clone()
    with torch.no_grad():
        reward = env.step(action)[1]
    expected = env.task.reward(before.double(), action.double())
    assert ((reward - expected).abs() < 1e-6).all()  # a sum of 17 float32 numbers around 1, in another order
    assert ((reward - env.task.reward(env.obs.double(), action.double())).abs() > 1e-3).all()


def test_actions_are_clipped():
    states = []
    for scale in (1.0, 7.0):
        env = DifferentiableEnv("ant", 2, seed=4)
        with torch.no_grad():
            obs, reward, *_ = env.step(scale * torch.tensor([1.0, -1.0] * 4).repeat(2, 1))
        states.append(torch.cat([obs, reward[:, None]], -1))
    assert torch.equal(*states)


def test_shown_action_follows_the_mode():
    def last_entries(grad, shown):
        env = DifferentiableEnv("ant", 1, action_in_obs=shown)
        with torch.set_grad_enabled(grad):
            return env.step(torch.full((1, 8), 0.5, requires_grad=grad))[0][0, -8:].detach().unique().tolist()

    assert last_entries(False, None) == [0.5] and last_entries(True, None) == [0.0]  # as dflex does
    assert last_entries(True, True) == [0.5] and last_entries(False, False) == [0.0]


@pytest.mark.parametrize("task", ["hopper", "humanoid"])
def test_far_from_the_origin_the_motion_is_the_same(task):
    """150 m away: recentring keeps what plain float32 loses."""
    start = DifferentiableEnv(task, 8, seed=1)
    q0, qd0 = (x.clone() for x in start.state())
    actions = 0.3 * random_actions(start, 8)
    ends = {}
    for away, recentre in ((0.0, True), (150.0, True), (150.0, False)):
        env = DifferentiableEnv(task, 8, early_termination=False, recentre=recentre)
        q, qd = q0.clone(), qd0.clone()
        q[:, 0] += away
        if task != "hopper":  # the root's twist refers to the world's origin
            qd[:, 4] -= qd[:, 2] * away
            qd[:, 5] += qd[:, 1] * away
        env.set_state(q, qd)
        env.progress += 1
        with torch.no_grad():
            for action in actions:
                env.step(action)
        ends[away, recentre] = env.state()[0]
    near, far, plain = ends.values()
    joints = slice(2, None)
    assert (near - far)[:, joints].abs().max() < 2e-3
    if task == "humanoid":
        assert (near - plain)[:, joints].abs().max() > (near - far)[:, joints].abs().max()


@pytest.mark.parametrize("task", ["hopper", "snu-humanoid"])
def test_state_dict_continues_exactly(task):
    env = DifferentiableEnv(task, 20, seed=8)
    actions = random_actions(env, 60)
    with torch.no_grad():
        for action in actions[:30]:
            env.step(action)
        saved = env.state_dict()
        expected = [env.step(action)[0] for action in actions[30:]]
        other = DifferentiableEnv(task, 20, seed=0)
        other.load_state_dict(saved)
        for action, obs in zip(actions[30:], expected):
            assert torch.equal(other.step(action)[0], obs)
    with pytest.raises(ValueError, match="needs"):
        DifferentiableEnv(task, 19).load_state_dict(saved)


def test_errors_name_value_and_limit():
    with pytest.raises(UnknownTask, match="unknown task 'humaniod'; did you mean 'humanoid'"):
        DifferentiableEnv("humaniod", 1)
    with pytest.raises(ValueError, match="num_envs must be >= 1, got 0"):
        DifferentiableEnv("hopper", 0)
    with pytest.raises(ValueError, match="threads must be >= 1, got -1"):
        DifferentiableEnv("hopper", 1, threads=-1)
    env = DifferentiableEnv("hopper", 2)
    with pytest.raises(ValueError, match=r"action must have shape \(2, 3\), got \(2, 4\)"):
        env.step(torch.zeros(2, 4))
    bad = torch.zeros(2, 3)
    bad[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not in environments \[1\]"):
        env.step(bad)
    with pytest.raises(ValueError, match=r"joint_q must have shape \(2, 6\), got \(2, 5\)"):
        env.set_state(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="joint_qd holds non-finite"):
        env.set_state(torch.zeros(2, 6), torch.full((2, 6), float("inf")))
