"""MT30 and MT80 as environments: sizes, seeds, repeated actions, time limits, and Gymnasium's protocol."""

import csv
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from pwm_fast.data import task_table
from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import evaluate
from pwm_fast.envs.suite_vector import SuiteVectorEnv, episode_seeds

EACH_SUITE = ["finger-turn-easy", "reacher-three-hard", "mw-reach", "mw-assembly", "gym:Pendulum-v1"]
TABLE = Path(registry.__file__).parent.parent / "assets" / "tdmpc2_tasks.csv"


@pytest.fixture(autouse=True)
def suites():
    for package in ("dm_control", "metaworld"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra mt80)")


def uniform(task, seed=0):
    random = np.random.default_rng(seed)
    return lambda obs: random.uniform(-1, 1, (len(obs), task.action_dim))


def test_the_sets_are_numbered_as_in_the_published_data():
    names = registry.names("mt80")
    assert names == [task.name for task in task_table.tasks()] and registry.names("mt30") == names[:30]
    assert names == registry.names("dm_control") + registry.names("metaworld")
    assert [registry.get(name).ids["mt80"] for name in names] == list(range(80))
    assert [registry.get(name).ids.get("mt30") for name in names[28:32]] == [28, 29, None, None]
    for row, task in zip(csv.DictReader(TABLE.open()), map(registry.get, names)):
        assert [task.obs_dim, task.action_dim, task.episode_length] == [
            int(row[key]) for key in ("obs_dim", "action_dim", "episode_length")
        ]
        assert task.action_repeat == 2 and task.paper_return is not None


@pytest.mark.parametrize("suite", ["dm_control", "metaworld"])
def test_every_task_runs_and_a_seed_decides_its_episodes(suite):
    """The same observations and rewards, bit for bit, whatever the environment has done before."""
    for name in registry.names(suite):
        task = registry.get(name)
        env = task.make()
        actions = np.random.default_rng(1).uniform(-1, 1, (6, task.action_dim))

        def episode(seed, env=env, actions=actions):
            return env.reset(seed=seed), [env.step(action) for action in actions]

        (first, info), steps = episode(3)
        assert first.shape == (task.obs_dim,) and first.dtype == np.float32 and info == {}, name
        (other, _), _ = episode(4)
        (again, _), repeated = episode(3)
        assert (other != first).any() and (again == first).all(), name
        for one, same in zip(steps, repeated, strict=True):
            assert (one[0] == same[0]).all() and one[1:] == same[1:], name
            assert np.isfinite(one[0]).all() and np.isfinite(one[1]) and one[2:4] == (False, False), name


@pytest.mark.parametrize("name", [name for name in EACH_SUITE if not name.startswith("gym:")])
def test_gymnasiums_own_checker_has_nothing_to_say(name, recwarn):
    check_env(registry.get(name).make(), skip_render_check=True)
    texts = [str(warning.message) for warning in recwarn]
    assert not [text for text in texts if "infinity" not in text]  # observations have no limits


@pytest.mark.parametrize("name", EACH_SUITE)
def test_a_vector_env_of_each_suite(name):
    task = registry.get(name)
    env = task.make_vector(3, seed=5)
    assert env.num_envs == 3 and env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert env.observation_space.shape == (3, task.obs_dim) and env.observation_space.dtype == np.float32
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    obs, _ = env.reset()
    assert env.observation_space.contains(obs)
    assert (obs == env.reset(seed=5)[0]).all() and (obs != env.reset()[0]).any()
    assert (obs[:2] == task.make_vector(2).reset(seed=5)[0]).all()  # however many there are
    obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs)
    assert reward.shape == terminated.shape == truncated.shape == (3,) and terminated.dtype == bool
    with pytest.raises(ValueError, match=rf"action must have shape \(3, {task.action_dim}\), got \(3,\)"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match=r"action must be finite; it is not in environments \[1\]"):
        env.step(np.where(np.arange(3)[:, None] == 1, np.nan, np.zeros((3, task.action_dim))))
    with pytest.raises(ValueError, match="num_envs must be >= 1, got 0"):
        SuiteVectorEnv(task, 0)


def test_neighbouring_seeds_share_no_episode():
    seeds = [seed for base in range(4) for seed in episode_seeds(base, 50)]
    assert len(set(seeds)) == len(seeds) and episode_seeds(3, 50)[:7] == episode_seeds(3, 7)


@pytest.mark.parametrize("name", ["cartpole-balance", "mw-drawer-close"])
def test_an_episode_ends_with_its_time_and_restarts_in_the_next_step(name):
    task = registry.get(name)
    env = task.make_vector(2)
    first, _ = env.reset(seed=0)
    ended = []
    for _ in range(task.episode_length):
        obs, _, terminated, truncated, _ = env.step(np.zeros((2, task.action_dim)))
        assert not terminated.any()
        ended.append(truncated.all())
    assert ended == [False] * (task.episode_length - 1) + [True]
    again, reward, _, truncated, _ = env.step(np.ones((2, task.action_dim)))
    assert not truncated.any() and (reward == 0).all()
    assert (again != obs).any() and np.abs(again - first).max() < np.abs(again).max()
    alone = task.make()
    with pytest.raises(RuntimeError, match=f"the episode of {name} is over; call reset"):
        alone.step(np.zeros(task.action_dim))


def test_dm_control_steps_twice_with_scaled_actions_and_sums_the_rewards():
    """Against dm_control's own environment, whose actions are in the actuators' units."""
    from dm_control import suite

    for name, domain in [("walker-run", "walker"), ("fish-swim", "fish"), ("cup-catch", "ball_in_cup")]:
        task = registry.get(name)
        ours, theirs = task.make(), suite.load(domain, name.split("-")[1], task_kwargs={"random": 11})
        obs, _ = ours.reset(seed=11)
        random, spec = np.random.default_rng(0), theirs.action_spec()
        step = theirs.reset()
        for _ in range(30):
            parts = [np.ravel(part) for part in step.observation.values()]
            assert np.array_equal(obs, np.concatenate(parts).astype(np.float32)), name
            action = random.uniform(-1.2, 1.2, task.action_dim)
            scaled = spec.minimum + (action.clip(-1, 1) + 1) / 2 * (spec.maximum - spec.minimum)
            expected = theirs.step(scaled).reward
            step = theirs.step(scaled)
            obs, reward, *_ = ours.step(action)
            assert reward == pytest.approx(expected + step.reward, abs=1e-12), name


def test_returns_and_scores_of_random_policies_are_plausible():
    """Around an episode of TD-MPC2's random policy: 367 and 6."""
    for name, low, high in [("cartpole-balance", 250, 480), ("cheetah-run", 2, 12)]:
        task = registry.get(name)
        results = evaluate(task, uniform(task), 3, seed=0)
        assert low < results.mean < high and results.successes is None
        assert task.score(results) == pytest.approx(results.mean / 10)
        assert (results.lengths == 500).all()


def test_names_are_registered_with_gymnasium():
    import pwm_fast.envs

    pwm_fast.envs.register()
    env = gymnasium.make("pwm_fast/mw-reach-v0")
    assert env.observation_space.shape == (39,) and env.reset(seed=0)[0].shape == (39,)
    env = gymnasium.make_vec("pwm_fast/cheetah-jump-v0", num_envs=2)
    assert isinstance(env, SuiteVectorEnv) and env.reset(seed=1)[0].shape == (2, 17)


def test_the_table_needs_no_simulator():
    program = "import sys; from pwm_fast.envs import registry; registry.get('mw-reach'); registry.names('mt80'); "
    program += "print({'torch', 'warp', 'mujoco', 'dm_control', 'metaworld'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("name", "package"), [("mw-reach", "metaworld"), ("walker-run", "dm_control")])
def test_a_missing_extra_says_what_installs_it(name, package):
    program = f"""
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "{package}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name="{package}")
sys.meta_path.insert(0, Missing())
from pwm_fast.envs import registry
try:
    registry.get("{name}").make_vector(1)
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f'MissingExtra {package} is not installed and these tasks need it: pip install "pwm_fast[mt80]"\n'
    )
