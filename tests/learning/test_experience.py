"""The ring of real steps: what windows hold, where they may begin and end, exact resume."""

import numpy as np
import pytest
import torch

from pwm_fast.envs import registry
from pwm_fast.learning.experience import Experience
from pwm_fast.state_files import load_state, save_state

HOPPER = registry.get("hopper")


def experience(policies, capacity: int = 10**6, seed: int = 3) -> Experience:
    return Experience(HOPPER, len(policies), 3, capacity, seed, threads=1)


def test_windows_are_what_happened(tiny_policies):
    """Every window is a stretch of one environment's stream, and ends where the episode does."""
    ring = experience(tiny_policies)
    ring.practise(tiny_policies, 120)
    assert ring.ended[:120].any(), "hoppers that act at random fall"
    w = ring.windows(step=5, count=200, horizon=6)
    assert w["obs"].shape == (7, 200, 11) and w["action"].shape == (6, 200, 3) and w["valid"].shape == (6, 200)
    ends = 0
    for b in range(200):
        time, env = map(int, np.argwhere((ring.obs[:121] == w["obs"][0, b]).all(-1))[0])
        assert ring.real[time, env]
        for h in range(6):
            if not w["valid"][h, b]:
                continue
            np.testing.assert_array_equal(w["obs"][h + 1, b], ring.obs[time + h + 1, env])
            np.testing.assert_array_equal(w["action"][h, b], ring.action[time + h, env])
            assert w["reward"][h, b] == ring.reward[time + h, env]
            if ring.ended[time + h, env]:
                assert w["terminated"][h, b] and not w["valid"][h + 1 :, b].any()
                ends += 1
                break
        else:
            assert w["valid"][:, b].all()
    assert ends > 3


def test_a_full_ring_forgets_the_oldest_and_crosses_its_seam(tiny_policies):
    small, large = experience(tiny_policies, capacity=6 * 20), experience(tiny_policies)
    for ring in (small, large):
        ring.practise(tiny_policies, 47)
    assert len(small) == 20 and len(large) == 47
    last = large.obs[47 - 20 : 48]
    w = small.windows(step=0, count=300, horizon=4)
    for b in range(300):
        time, env = map(int, np.argwhere((last == w["obs"][0, b]).all(-1))[0])
        long = int(w["valid"][:, b].sum())
        np.testing.assert_array_equal(w["obs"][: long + 1, b], last[time : time + long + 1, env])


def test_a_policy_practises_in_its_own_environments(tiny_policies):
    ring = experience(tiny_policies)
    ring.practise(tiny_policies, 30)
    own = ring.windows(0, 50, 2, policy=1)["obs"][0]
    assert all((ring.obs[:31, 3:] == row).all(-1).any() for row in own)
    starts = ring.start_states(1, 0, 40)
    assert all((ring.obs[:31, 3:] == row).all(-1).any() for row in starts)
    newest = ring.windows(0, 50, 2, policy=0, recent=5)["obs"][0]
    assert all((ring.obs[25:30, :3] == row).all(-1).any() for row in newest)


def test_windows_without_cuts_avoid_the_time_limit(tiny_policies):
    ring = experience(tiny_policies)
    ring.practise(tiny_policies, 40)
    ring.terminated[:], ring.ended[:], ring.real[:] = False, False, True
    ring.ended[20] = True
    ring.real[21] = False
    starts = {map_start(ring, row) for row in ring.windows(1, 400, 4, cuts=False)["obs"][0]}
    assert not starts & {18, 19, 20, 21} and starts >= {16, 17, 22}  # 17 ends just where the episode does
    assert {map_start(ring, row) for row in ring.windows(1, 400, 4)["obs"][0]} >= {17, 20, 22}


def map_start(ring: Experience, row: np.ndarray) -> int:
    return int(np.argwhere((ring.obs[:41] == row).all(-1))[0][0])


def test_resume_is_exact(tiny_policies, tmp_path):
    whole, first, second = (experience(tiny_policies, capacity=120) for _ in range(3))
    whole.practise(tiny_policies, 45)
    first.practise(tiny_policies, 30)
    save_state(tmp_path / "state", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "state"))
    second.practise(tiny_policies, 15)
    for name in ("obs", "action", "reward", "terminated", "ended", "real"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(second, name))
    for (name, a), b in zip(whole.windows(2, 9, 3).items(), second.windows(2, 9, 3).values()):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_sampled_actions_are_the_policys(tiny_policies):
    ring = experience(tiny_policies)
    ring.practise(tiny_policies, 200)
    for i, policy in enumerate(tiny_policies):
        rows = slice(3 * i, 3 * i + 3)
        mean = np.arctanh(np.clip(policy.act(ring.obs[:200, rows]), -0.999999, 0.999999))
        noise = np.arctanh(np.clip(ring.action[:200, rows], -0.999999, 0.999999)) - mean
        expected = torch.exp(policy.tensors()["actor.log_std"]).numpy()
        np.testing.assert_allclose(noise.reshape(-1, 3).std(0), expected, rtol=0.15)


def test_what_cannot_be_drawn_is_refused(tiny_policies):
    ring = experience(tiny_policies)
    ring.practise(tiny_policies, 3)
    with pytest.raises(ValueError, match="windows of 4 steps need as many recorded ones, got 3"):
        ring.windows(0, 1, 4)
    with pytest.raises(ValueError, match="capacity must be >= 1, got 0"):
        experience(tiny_policies, capacity=0)
    other = experience(tiny_policies, capacity=60)
    with pytest.raises(ValueError, match="saved experience's obs has shape"):
        other.load_state_dict(ring.state_dict())


def test_practice_episodes_may_be_shorter_than_the_tasks(tiny_policies):
    ring = Experience(HOPPER, 2, 3, 1000, seed=3, threads=1, episode_length=10)
    ring.practise(tiny_policies, 40)
    ends = np.flatnonzero(ring.ended[:40, 0])
    assert len(ends) >= 3 and np.diff(ends, prepend=-2).max() <= 11  # ten steps and the reset
    assert (ring.ended & ~ring.terminated)[:40].any()
