"""The Gymnasium fronts: registration, spaces, seeds, next-step autoreset, and pictures."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import pwm_fast.envs
from pwm_fast.envs import registry
from pwm_fast.envs.vector import DflexVectorEnv


def lay_down(env, row):
    """Put one humanoid on the ground, below the height at which its episode ends."""
    sim = env.unwrapped.simulation
    q = sim.q[row : row + 1].clone()
    q[0, 1], q[0, 3:7] = 0.7, torch.tensor([0.0, 0.0, 0.0, 1.0])
    sim.restart_rows(torch.tensor([row]), q, torch.zeros(1, sim.model.nqd))


@pytest.mark.parametrize("name", registry.names("dflex"))
def test_every_task_is_registered_with_its_sizes(name):
    pwm_fast.envs.register()  # a second time is harmless
    task = registry.get(name)
    env = gymnasium.make_vec(task.gym_id, num_envs=3)
    assert isinstance(env, DflexVectorEnv) and env.num_envs == 3
    assert env.single_observation_space.shape == (task.obs_dim,)
    assert env.action_space.shape == (3, task.action_dim)
    assert env.action_space.low.min() == -1 and env.action_space.high.max() == 1
    obs, info = env.reset(seed=1)
    assert env.observation_space.contains(obs) and info == {}
    obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs)
    assert reward.shape == terminated.shape == truncated.shape == (3,) and terminated.dtype == bool
    env.close()


def test_a_fresh_interpreter_finds_the_ids():
    """Both ways that need no import of ours: the module named in the id, and an import of pwm_fast.envs alone."""
    program = """
import gymnasium
env = gymnasium.make_vec("pwm_fast.envs:pwm_fast/Hopper-v0", num_envs=4)
print(env.reset(seed=0)[0].shape)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "(4, 11)\n", result.stderr


def test_next_step_autoreset():
    """Three steps around a fall: the last observation, then the first of a new episode, then on as usual."""
    env = gymnasium.make_vec("pwm_fast/Humanoid-v0", num_envs=3)
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    env.reset(seed=0)
    lay_down(env, 1)
    action = np.full((3, 21), 0.25, np.float32)
    final, reward, terminated, truncated, _ = env.step(action)
    assert terminated.tolist() == [False, True, False] and not truncated.any()
    assert final[1, 0] < 0.74 and env.joint_q[1, 1] < 0.74 and reward[1] != 0
    first, reward, terminated, truncated, _ = env.step(action)
    assert not terminated.any() and not truncated.any()
    assert first[1, 0] > 1.2 and env.joint_q[1, 1] > 1.2
    assert reward[1] == 0 and (first[1, 55:] == 0).all()  # its action was ignored
    assert (reward[[0, 2]] != 0).all() and np.allclose(first[[0, 2], 55:], 0.25)
    next_obs, reward, *_ = env.step(action)
    assert np.allclose(next_obs[1, 55:], 0.25) and reward[1] != 0
    # the reward of that step is of the new episode's first observation, as reset() would have shown it
    task = env.simulation.task
    assert reward[1] == task.reward(torch.from_numpy(first), torch.from_numpy(action))[1]


def test_truncated_episodes_restart_too():
    env = DflexVectorEnv("hopper", 2)
    env.reset(seed=0)
    env.simulation.progress = torch.tensor([999, 5])
    action = np.zeros((2, 3), np.float32)
    _, _, terminated, truncated, _ = env.step(action)
    assert truncated.tolist() == [True, False] and not terminated.any()
    _, _, _, truncated, _ = env.step(action)
    assert not truncated.any() and env.simulation.progress.tolist() == [0, 7]


def test_seeds_decide_the_episodes_and_threads_do_not():
    def rollout(seed, threads=1, constructor_seed=0):
        env = DflexVectorEnv("ant", 20, seed=constructor_seed, threads=threads)
        obs, _ = env.reset(seed=seed)
        action = np.random.default_rng(3).uniform(-1, 1, (4, 20, 8)).astype(np.float32)
        return np.stack([obs, *(env.step(a)[0] for a in action)])

    assert (rollout(5) == rollout(5, threads=2)).all()
    assert (rollout(5) == rollout(5, constructor_seed=1)).all()
    assert (rollout(5) != rollout(6)).any()
    assert (rollout(None, constructor_seed=6) != rollout(None, constructor_seed=7)).any()


def test_later_resets_go_on_with_the_random_numbers():
    env = DflexVectorEnv("hopper", 2)
    first, second = env.reset(seed=0)[0], env.reset()[0]
    assert (first != second).any() and (first == env.reset(seed=0)[0]).all() and (second == env.reset()[0]).all()


def test_returned_arrays_are_the_callers_own():
    env = DflexVectorEnv("hopper", 2)
    obs, _ = env.reset(seed=0)
    kept = obs.copy()
    env.step(np.ones((2, 3), np.float32))
    assert (obs == kept).all()
    obs[:] = np.nan
    assert np.isfinite(env.step(np.ones((2, 3), np.float32))[0]).all()


def test_a_single_environment_follows_gymnasiums_protocol():
    env = gymnasium.make("pwm_fast/Hopper-v0", render_mode="rgb_array")
    obs, _ = env.reset(seed=4)
    assert (obs == DflexVectorEnv("hopper", 1).reset(seed=4)[0][0]).all()
    obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs) and isinstance(reward, float)
    assert terminated is False and truncated is False
    assert env.render().shape == (300, 400, 3)
    env.close()


def test_pictures_are_of_every_robot():
    env = gymnasium.make_vec("pwm_fast/Hopper-v0", num_envs=2, render_mode="rgb_array")
    env.reset(seed=0)
    pictures = env.render()
    assert len(pictures) == 2 and pictures[0].dtype == np.uint8 and (pictures[0] != pictures[1]).any()
    assert DflexVectorEnv("hopper", 1).render() is None


def test_bad_actions_and_render_modes_raise():
    with pytest.raises(ValueError, match="render_mode must be None or 'rgb_array', got 'human'"):
        DflexVectorEnv("hopper", 1, render_mode="human")
    env = DflexVectorEnv("hopper", 2)
    with pytest.raises(ValueError, match=r"action must have shape \(2, 3\), got \(3,\)"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match=r"action must be finite; it is not in environments \[1\]"):
        env.step(np.array([[0, 0, 0], [0, np.inf, 0]]))
