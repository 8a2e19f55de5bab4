"""Planning in MuJoCo: what is tried out is what would happen, and the environment does not notice."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("dm_control", reason="dm_control is not installed: pip install 'pwm_fast[mt80]'")

from pwm_fast.baselines.mppi import MPPIConfig
from pwm_fast.baselines.physics_planning import PhysicsModel, physics_source, plan_episode
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import Episode

TINY = MPPIConfig(horizon=2, samples=3, elites=2, iterations=1, policy_trajectories=0)
CARTPOLE = registry.get("cartpole-swingup")


@pytest.mark.parametrize("name", ["cartpole-swingup", "reacher-easy", "walker-walk", "cheetah-jump", "pendulum-spin"])
def test_values_are_what_would_happen(name: str):
    """In the middle of the second episode (whose target is another): rewards at the ends of agent steps, exactly."""
    task = registry.get(name)
    env, random = task.make(), np.random.default_rng(0)
    env.reset(seed=0)
    model = PhysicsModel(env)
    env.reset(seed=1)
    model.begin()
    for _ in range(20):
        env.step(random.uniform(-1, 1, task.action_dim))
    sequences = random.uniform(-1, 1, (3, 12, task.action_dim))
    values = model.values(sequences)
    np.testing.assert_array_equal(model.values(sequences), values)
    obs = env.observation()
    expected = 0.0
    for action in sequences[2]:
        env.step(action)
        expected += task.action_repeat * env.rules.get_reward(env.physics)
    assert values[2] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert not np.array_equal(env.observation(), obs)


def test_the_environment_does_not_notice_being_planned_for():
    task, actions = CARTPOLE, np.random.default_rng(1).uniform(-1, 1, (30, 1))
    plain, watched = task.make(), task.make()
    plain.reset(seed=3), watched.reset(seed=3)
    model = PhysicsModel(watched)
    for action in actions:
        model.values(np.ones((2, 5, 1)))
        (expected, reward, *_), (found, gained, *_) = plain.step(action), watched.step(action)
        np.testing.assert_array_equal(found, expected)
        assert reward == gained


def test_sequences_that_diverge_are_worth_nothing():
    env = CARTPOLE.make()
    env.reset(seed=0)
    model = PhysicsModel(env)

    class Broken:
        def __getattr__(self, name):
            return getattr(env.rules, name)

        def before_step(self, action, physics):
            physics.data.qvel[:] = np.nan if action[0] > 0 else 0.0

    model._rules = Broken()
    values = model.values(np.array([[[0.5]], [[-0.5]]]))
    assert values[0] == -np.inf and np.isfinite(values[1])


def test_planning_swings_the_pole_up():
    """240 agent steps from hanging down: random actions earn next to nothing, planning brings the pole up to stay."""
    task = replace(CARTPOLE, episode_length=240)
    planned, random = plan_episode(task, seed=0), plan_episode(task, seed=0, level=1.0)
    assert planned.obs.shape == (241, 5) and planned.action.shape == (240, 1)
    np.testing.assert_array_equal(planned.obs[0], random.obs[0])
    assert planned.reward[-60:].mean() > 1.0, "two physics steps of at most 1 each"
    assert planned.reward.sum() > 3 * random.reward.sum()


def same(one: Episode, other: Episode) -> None:
    for name in ("obs", "action", "reward"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_data_depends_neither_on_batches_nor_on_processes():
    def source(processes: int):
        return physics_source(CARTPOLE, 4, (0.0, 1.0), TINY, hold=25, processes=processes)

    whole = list(source(1).batch(0, 4))
    assert [phase for phase, _ in whole] == ["planning in MuJoCo, noise 0"] * 2 + ["random actions"] * 2
    parts = [*source(2).batch(0, 2), *source(2).batch(2, 2)]
    for (phase, one), (other, two) in zip(whole, parts, strict=True):
        assert phase == other
        same(one, two)
    jumping, smooth = (np.abs(np.diff(whole[n][1].action[:, 0])).mean() for n in (2, 3))
    assert jumping > 2 * smooth


def test_actions_are_held_and_noise_is_blended_in():
    task = replace(CARTPOLE, episode_length=20)
    held = plan_episode(task, seed=1, config=TINY, hold=5).action.reshape(4, 5)
    assert (held == held[:, :1]).all() and (held[1:, 0] != held[:-1, 0]).all()
    noisy = plan_episode(task, seed=1, config=TINY, hold=5, level=0.5).action
    assert len(np.unique(noisy)) == 20


def test_ctrl_c_reaches_only_the_store(tmp_path: Path, command_environment: dict[str, str]):
    """To all processes of the terminal, while those of the pool are still starting: the batch is saved."""
    out = tmp_path / "store"
    arguments = ["--task", "cartpole-swingup", "--policy", "planning", "--noise-levels", "1", "--episodes", "400"]
    command = [sys.executable, "-m", "pwm_fast.collect", *arguments, "--processes", "2", "--out", str(out)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=command_environment, start_new_session=True, **streams)
    assert process.stdout is not None
    while "planning in MuJoCo" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 130 and "--resume" in error.strip().splitlines()[-1], error
    assert EpisodeStore.open(out).num_episodes in range(4, 397, 4)


@pytest.mark.parametrize(("name", "mend"), [("mw-reach", "expert"), ("hopper", "shac"), ("gym:Pendulum-v1", "sac")])
def test_tasks_without_dm_controls_physics_are_refused(name: str, mend: str):
    with pytest.raises(ValueError, match=f"not for {name}; use --policy {mend}, or plan in a world model"):
        physics_source(registry.get(name), 0, (0.0,))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="hold must be > 0"):
        physics_source(CARTPOLE, 0, (0.0,), hold=0)
    with pytest.raises(ValueError, match="processes must be > 0"):
        physics_source(CARTPOLE, 0, (0.0,), processes=0)
