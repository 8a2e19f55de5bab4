"""`gym:ID`: any Gymnasium environment of continuous control, and clear words for the others."""

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Sequence

from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import evaluate
from pwm_fast.envs.gymnasium_tasks import make_env


class Drift(gymnasium.Env):
    """Its position drifts by the force; observations come in two parts, actions lie in [0, 10] and [-4, 4]."""

    observation_space = Dict({"position": Box(-99.0, 99.0, (2,), np.float64), "force": Box(-10.0, 10.0, (2, 1))})
    action_space = Box(np.array([0.0, -4.0]), np.array([10.0, 4.0]), dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.force = self.np_random.normal(size=2), np.zeros(2)
        return self._obs(), {}

    def _obs(self):
        return {"position": self.position, "force": self.force[:, None].astype(np.float32)}

    def step(self, action):
        self.force = np.array(action)
        self.position = self.position + action
        return self._obs(), float(action[0]), bool(self.position[0] > 20), False, {}


class Odd(Drift):
    """As given."""

    def __init__(self, action_space=Drift.action_space, observation_space=Drift.observation_space):
        self.action_space, self.observation_space = action_space, observation_space


@pytest.fixture(autouse=True)
def registered():
    names = {"Drift-v0": 7, "Odd-v0": 5, "Endless-v0": None}
    for name, steps in names.items():
        gymnasium.register(name, entry_point=Drift if name == "Drift-v0" else Odd, max_episode_steps=steps)
    yield
    for name in names:
        del gymnasium.registry[name]


def test_sizes_and_the_time_limit_come_from_the_environment():
    task = registry.get("gym:Drift-v0")
    assert (task.suite, task.obs_dim, task.action_dim, task.episode_length) == ("gymnasium", 4, 2, 7)
    assert (task.action_repeat, task.ids, task.random_return, task.gym_id) == (1, {}, None, "Drift-v0")
    pendulum = registry.get("gym:Pendulum-v1")
    assert (pendulum.obs_dim, pendulum.action_dim, pendulum.episode_length) == (3, 1, 200)


def test_actions_are_scaled_and_observations_flat():
    env = make_env(registry.get("gym:Drift-v0"))
    env.reset(seed=0)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    obs, reward, *_ = env.step(np.array([-0.2, 0.5], np.float32))
    assert obs.dtype == np.float32 and reward == pytest.approx(4.0)
    assert obs[:2] == pytest.approx([4.0, 2.0])  # the parts in Gymnasium's order of names: force, position


def test_episodes_end_by_themselves_or_with_their_time():
    found = evaluate("gym:Drift-v0", lambda obs: np.tile([[0.0, 0.0]], (len(obs), 1)), 2, seed=0, record=True)
    assert (found.lengths <= 7).all() and (found.lengths >= 4).all() and found.episodes[0].terminated
    assert found.returns == pytest.approx(5.0 * found.lengths)
    still = evaluate("gym:Drift-v0", lambda obs: np.tile([[-1.0, 0.0]], (len(obs), 1)), 2, seed=0, record=True)
    assert still.lengths.tolist() == [7, 7] and not still.episodes[0].terminated
    assert registry.get("gym:Drift-v0").score(still) is None


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("gym:CartPole-v1", {}, "its actions are Discrete, and policies here are continuous"),
        ("gym:Odd-v0", {"action_space": Box(0, 9, (2,), np.int64)}, "its actions are int64 of shape (2,)"),
        ("gym:Odd-v0", {"action_space": Box(-1, 1, (2, 2))}, "its actions are float32 of shape (2, 2)"),
        ("gym:Odd-v0", {"action_space": Box(-np.inf, np.inf, (2,))}, "no limits to scale [-1, 1] to"),
        ("gym:Odd-v0", {"observation_space": Sequence(Box(-1, 1, (2,)))}, "are no vector"),
        ("gym:Endless-v0", {}, "no time limit; register it with max_episode_steps"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(name, options, reason, monkeypatch):
    from pwm_fast.envs import gymnasium_tasks

    gymnasium_tasks.gymnasium_task.cache_clear()
    made = gymnasium_tasks._made
    monkeypatch.setattr(gymnasium_tasks, "_made", lambda environment: made(environment, **options))
    with pytest.raises(ValueError) as caught:
        registry.get(name)
    assert str(caught.value).startswith(f"{name} cannot be used: ") and reason in str(caught.value)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(registry.UnknownTask, match="unknown Gymnasium environment 'Pendulm-v1'; did you mean 'Pendul"):
        registry.get("gym:Pendulm-v1")
    with pytest.raises(ImportError, match="gym:no_such_module:X-v0: No module named 'no_such_module'"):
        registry.get("gym:no_such_module:X-v0")
