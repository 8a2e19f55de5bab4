"""Meta-World's scripted experts: noise from none to random, holding still, the same data however it was made."""

from pathlib import Path

import numpy as np
import pytest

from pwm_fast.baselines.experts import ScriptedExpert, expert_source
from pwm_fast.data.collect import collect_episodes
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import evaluate

pytest.importorskip("metaworld", reason="Meta-World is not installed: pip install 'pwm_fast[mt80]'")
REACH = registry.get("mw-reach")


def test_the_expert_is_meta_worlds_and_holds_still_after_success():
    from metaworld.policies import SawyerReachV3Policy

    env = REACH.make()
    obs = np.stack([env.reset(seed=seed)[0] for seed in (0, 1)])
    expert = ScriptedExpert(REACH, 2)
    exact = np.stack([SawyerReachV3Policy().get_action(row.astype(np.float64)) for row in obs]).clip(-1, 1)
    moving = expert(obs, np.zeros(2, bool))
    np.testing.assert_array_equal(moving, exact)
    held = expert(obs, np.array([True, False]))
    np.testing.assert_array_equal(held[0], [0.0, 0.0, 0.0, moving[0, 3]])
    np.testing.assert_array_equal(held[1], exact[1])


def test_the_gripper_stays_closed_while_holding():
    """An expert that has grasped something does not let it go when it holds still, nor in the step after."""
    task = registry.get("mw-pick-place")
    expert = ScriptedExpert(task, 1)

    class Closing:
        def get_action(self, obs):
            return np.array([5.0, 0.0, 0.0, 0.8])

    expert._experts = [Closing()]
    obs, success = np.zeros((1, 39)), np.array([True])
    np.testing.assert_array_equal(expert(obs, ~success), [[1.0, 0.0, 0.0, 0.8]])
    for _ in range(3):
        np.testing.assert_array_equal(expert(obs, success), [[0.0, 0.0, 0.0, 0.8]])


def test_holding_still_keeps_successes_to_the_end():
    """mw-reach: each of 4 episodes without noise ends solved, and the hand no longer moves in the last steps."""
    for phase, episode in expert_source(REACH, seed=3, levels=[0.0]).batch(0, 4):
        assert phase == "expert, noise 0" and episode.obs.shape == (101, 39) and episode.reward.shape == (100,)
        assert episode.reward[-10:].min() > 0.9 * episode.reward.max()
        assert np.abs(episode.action[-1, :3]).max() == 0.0
        assert not episode.terminated


def test_returns_fall_with_noise_down_to_random():
    levels = [0.0, 0.5, 1.0]
    made = list(expert_source(REACH, seed=0, levels=levels).batch(0, 12))
    returns: dict[str, list[float]] = {}
    for phase, episode in made:
        returns.setdefault(phase, []).append(float(episode.reward.sum()))
    assert {phase: len(values) for phase, values in returns.items()} == {
        "expert, noise 0": 4, "expert, noise 0.5": 4, "random actions": 4
    }  # fmt: skip
    best, middle, worst = (np.mean(values) for values in returns.values())
    assert best > 1.1 * middle and middle > 2 * worst
    random = np.concatenate([episode.action for phase, episode in made if phase == "random actions"])
    assert abs(random.mean()) < 0.1 and random.std() > 0.4


def test_noise_is_blended_into_the_experts_actions():
    """Half of the expert's action and half of the noise, step by step, at the observation that was shown."""
    (_, episode), *_ = expert_source(REACH, seed=5, levels=[0.25]).batch(0, 1)
    expert = ScriptedExpert(REACH, 1)
    noise = [
        (action - 0.75 * expert(obs[None], np.zeros(1, bool))[0]) / 0.25
        for obs, action in zip(episode.obs[:10], episode.action[:10])
    ]
    assert np.abs(noise).max() <= 1.0 + 1e-5 and np.std(noise) > 0.3


def test_episodes_are_what_the_environment_gives():
    """The recorded actions, played again from the same seed, give the recorded observations and rewards."""
    from pwm_fast.data.collect import derived_seed

    ((_, first), (_, second)) = expert_source(REACH, seed=1, levels=[0.25]).batch(4, 2)
    actions = iter(np.stack([first.action, second.action], 1))
    played = evaluate(REACH, lambda obs: next(actions), 2, derived_seed(1, 4), record=True).episodes
    for mine, theirs in zip((first, second), played):
        np.testing.assert_array_equal(mine.obs, theirs.obs)
        np.testing.assert_array_equal(mine.reward, theirs.reward)


def test_resumed_data_equals_uninterrupted(tmp_path: Path):
    def collect(name: str, episodes: int, resume: bool = False) -> EpisodeStore:
        source = expert_source(REACH, seed=2, levels=[0.0, 1.0])
        collect_episodes(tmp_path / name, [source], options={}, episodes=episodes, batch=2, resume=resume)
        return EpisodeStore.open(tmp_path / name)

    whole = collect("whole", 4)
    collect("parts", 2)
    parts = collect("parts", 4, resume=True)
    np.testing.assert_array_equal(parts.obs, whole.obs)
    np.testing.assert_array_equal(parts.action, whole.action)
    assert parts.meta["collect"]["order"] == whole.meta["collect"]["order"] == [
        ["expert, noise 0", 2], ["random actions", 2]
    ]  # fmt: skip


def test_tasks_without_an_expert_are_refused():
    for name in ("cartpole-swingup", "hopper", "gym:Pendulum-v1"):
        with pytest.raises(ValueError, match=f"not for {name}; make its data with --policy sac"):
            expert_source(registry.get(name), seed=0)
    with pytest.raises(ValueError, match=r"got \[2.0\]"):
        expert_source(REACH, seed=0, levels=[2.0])
