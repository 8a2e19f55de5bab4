"""Meta-World's tasks: repeated actions, success as of the last step, goals that change, and its scripted experts."""

import csv
from pathlib import Path

import numpy as np
import pytest

from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import evaluate, evaluate_population

pytest.importorskip("metaworld", reason="metaworld is not installed (extra mt80)")
EXPERTS = Path(__file__).parents[1] / "data" / "tdmpc2" / "mw_experts.csv"


def expert(name):
    """Meta-World's scripted policy of a task, for batches."""
    from metaworld import policies

    words = "".join(word.capitalize() for word in name.removeprefix("mw-").split("-"))
    words = {"PegInsertSide": "PegInsertionSide"}.get(words, words)
    policy = getattr(policies, f"Sawyer{words}V3Policy")()
    return lambda obs: np.stack([policy.get_action(row.astype(np.float64)) for row in obs]).clip(-1, 1)


def test_a_step_is_two_of_meta_worlds_and_an_episode_begins_after_one_at_rest():
    """Against Meta-World's own environment with the same goal."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    ours = registry.get("mw-drawer-close").make()
    first, _ = ours.reset(seed=2)
    theirs = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE["drawer-close-v3-goal-observable"](seed=0)
    theirs._last_rand_vec = ours.simulator._last_rand_vec  # frozen: both draw this
    assert np.array_equal(theirs.reset()[0].astype(np.float32), first)
    theirs.step(np.zeros(4))
    for action in np.random.default_rng(0).uniform(-1, 1, (40, 4)):
        obs, reward, terminated, truncated, info = ours.step(action)
        rewards = [theirs.step(action) for _ in range(2)]
        assert np.array_equal(obs, rewards[1][0].astype(np.float32))
        assert reward == rewards[0][1] + rewards[1][1]
        assert info == {"success": bool(rewards[1][4]["success"])} and not terminated and not truncated


def test_observations_show_the_goal_and_each_episode_has_another():
    task = registry.get("mw-reach")
    env = task.make_vector(4)
    first, later = env.reset(seed=0)[0][:, -3:], env.reset()[0][:, -3:]
    goals = np.concatenate([first, later])
    assert len(np.unique(goals, axis=0)) == 8
    assert (np.abs(goals[:, 0]) <= 0.1).all() and (goals[:, 1] >= 0.8).all() and (goals[:, 2] <= 0.3).all()


def test_success_counts_at_the_last_step_alone():
    """The expert reaches all goals; going on from there and away in the last steps makes failures of them."""
    task, policy, steps = registry.get("mw-reach"), expert("mw-reach"), [0]

    def leaves(obs):
        steps[0] += 1
        return policy(obs) if steps[0] < 80 else np.tile([1.0, -1.0, 1.0, 0.0], (len(obs), 1))

    stays, left = evaluate(task, policy, 2, seed=0), evaluate(task, leaves, 2, seed=0)
    assert stays.successes.tolist() == [True, True] and task.score(stays) == 100.0
    assert left.successes.tolist() == [False, False] and task.score(left) == 0.0
    assert (left.returns > 0.6 * stays.returns).all()  # it had been there
    assert (stays.lengths == 100).all()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_scripted_experts_do_as_well_as_recorded():
    """50 tasks x 10 episodes. The recording has other goals, so success may differ by chance: over all tasks by less
    than 0.04, in one by 4 standard deviations of a share; returns by 5 standard errors of their difference."""
    recorded = {row["task"]: row for row in csv.DictReader(EXPERTS.open())}
    names = registry.names("metaworld")
    assert list(recorded) == names
    found = evaluate_population(names, [expert(name) for name in names], 10, seed=0)
    shares = np.array([results.successes.mean() for results in found])
    known = np.array([float(recorded[name]["success_final_step"]) for name in names])
    assert abs(shares.mean() - known.mean()) < 0.04
    middle = np.clip((shares + known) / 2, 0.05, 0.95)
    assert (np.abs(shares - known) < 4 * np.sqrt(middle * (1 - middle) * 2 / 10)).all()
    for name, results in zip(names, found):
        mean, std = float(recorded[name]["return_mean"]), float(recorded[name]["return_std"])
        error = np.sqrt((std**2 + results.std**2) / 9)
        assert abs(results.mean - mean) < 5 * error + 0.02 * mean, (name, results.mean, mean)
