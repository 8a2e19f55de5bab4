"""Real returns: whole episodes, the same for the same seed, and clear words for bad policies."""

from types import SimpleNamespace

import numpy as np
import pytest

from pwm_fast.envs.evaluation import evaluate
from pwm_fast.envs.registry import UnknownTask


class Countdown:
    """Environment e ends after e + 2 steps; reward 1 + e; obs counts the steps. The last one runs to the limit."""

    def __init__(self, num_envs, **options):
        self.n, self.options, self.closed = num_envs, options, False

    def reset(self, seed=None):
        self.t = 0
        return np.zeros((self.n, 1)), {}

    def step(self, action):
        if action.shape != (self.n, 1):
            raise ValueError(f"action must have shape {(self.n, 1)}, got {action.shape}")
        self.t += 1
        ends = np.arange(self.n) + 2 == self.t
        obs = np.full((self.n, 1), float(self.t))
        return obs, 1.0 + np.arange(self.n), ends, np.full(self.n, self.t == 4), {}

    def close(self):
        self.closed = True


@pytest.fixture
def countdown():
    made = []

    def make_vector(num_envs, seed, threads, **options):
        made.append(Countdown(num_envs, **options))
        return made[-1]

    return SimpleNamespace(make_vector=make_vector, episode_length=4, made=made)


def test_each_environment_counts_until_its_episode_ends(countdown):
    found = evaluate(countdown, lambda obs: obs * 0, episodes=4, seed=0, record=True)
    assert found.lengths.tolist() == [2, 3, 4, 4]
    assert found.returns.tolist() == [2.0, 6.0, 12.0, 16.0]
    assert found.mean == 9.0 and found.std == pytest.approx(np.std([2, 6, 12, 16]))
    assert [e.terminated for e in found.episodes] == [True, True, True, False]
    for episode, length in zip(found.episodes, found.lengths):
        assert episode.obs[:, 0].tolist() == list(range(length + 1))
        assert len(episode.action) == len(episode.reward) == length
    assert countdown.made[0].closed


def test_recorded_actions_are_the_clipped_ones(countdown):
    found = evaluate(countdown, lambda obs: obs * 0 + 7, episodes=1, seed=0, record=True)
    assert (found.episodes[0].action == 1).all()


def test_options_reach_the_environment(countdown):
    evaluate(countdown, lambda obs: obs * 0, episodes=1, seed=0, recentre=False)
    assert countdown.made[0].options == {"recentre": False}


def test_the_environment_is_closed_when_a_policy_fails(countdown):
    def broken(obs):
        raise RuntimeError("no idea")

    with pytest.raises(RuntimeError, match="no idea"):
        evaluate(countdown, broken, episodes=1, seed=0)
    assert countdown.made[0].closed


def test_the_hopper_falls_the_same_way_for_the_same_seed():
    def policy(obs):
        return np.tanh(obs[:, :3])

    first, again, other = (evaluate("hopper", policy, 3, seed=s, record=True) for s in (1, 1, 2))
    assert (first.returns == again.returns).all() and (first.returns != other.returns).any()
    assert (first.lengths > 1).all() and first.episodes[0].terminated
    assert first.joint_q.shape == (first.lengths[0] + 1, 6)
    assert first.joint_q[-1, 1] < -0.45  # where it fell


def test_bad_calls_and_policies_raise():
    with pytest.raises(ValueError, match="episodes must be >= 1, got 0"):
        evaluate("hopper", lambda obs: obs[:, :3], 0, seed=0)
    with pytest.raises(UnknownTask, match="did you mean 'hopper'"):
        evaluate("hoper", lambda obs: obs[:, :3], 1, seed=0)
    with pytest.raises(ValueError, match=r"action must have shape \(2, 3\), got \(2, 2\)"):
        evaluate("hopper", lambda obs: obs[:, :2], 2, seed=0)
    with pytest.raises(ValueError, match="action must be finite"):
        evaluate("hopper", lambda obs: obs[:, :3] * np.nan, 2, seed=0)
