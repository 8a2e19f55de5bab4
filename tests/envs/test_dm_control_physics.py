"""The lean physics of dm_control's tasks gives what dm_control's own environments give, bit for bit."""

import numpy as np
import pytest

from pwm_fast.envs import registry

pytest.importorskip("dm_control", reason="dm_control is not installed (extra mt80)")


def original(name):
    """dm_control's environment with its own physics."""
    from dm_control import suite

    from pwm_fast.envs.dm_control_tasks import CUSTOM

    if name in CUSTOM:
        return CUSTOM[name]()
    domain, task = name.replace("cup-", "ball_in_cup-").split("-", 1)
    return suite.load(domain, task.replace("-", "_"))


def joined(step):
    return np.concatenate([np.ravel(part) for part in step.observation.values()]).astype(np.float32)


@pytest.mark.parametrize("name", registry.names("dm_control"))
def test_every_task_gives_the_originals_observations_and_rewards(name):
    task, theirs, random = registry.get(name), original(name), np.random.default_rng(0)
    ours, limits = task.make(), theirs.action_spec()
    for seed in (3, None):
        if seed is not None:
            theirs.task.random.seed(seed)
        step, (obs, _) = theirs.reset(), ours.reset(seed=seed)
        assert obs.tobytes() == joined(step).tobytes()
        for _ in range(25):
            action, reward = random.uniform(-1, 1, task.action_dim), 0.0
            for _ in range(2):
                step = theirs.step(limits.minimum + (action + 1.0) * ((limits.maximum - limits.minimum) / 2))
                reward += float(step.reward)
            obs, found, *_ = ours.step(action)
            assert obs.tobytes() == joined(step).tobytes() and found == reward


@pytest.fixture
def physics():
    env = registry.get("walker-walk").make()
    env.reset(seed=0)
    return env.physics


KEYS = [
    "torso",
    ("torso", "z"),
    ("torso", ["x", "z"]),
    (["torso", "left_foot"], "y"),
    ["torso", "left_foot"],
    (slice(1, None), ["x", "z"]),
    slice(None),
    (2, "x"),
    (True, "x"),
    (np.array([1, 3]), 0),
    (np.array([2, 4]), 0),
]


@pytest.mark.parametrize("again", [False, True])
def test_names_read_and_write_what_dm_controls_do(physics, again):
    from dm_control.mujoco import index

    theirs = index.struct_indexer(physics.data, "mjdata", index.make_axis_indexers(physics.model)).xpos
    for key in KEYS * (1 + again):  # the second time it is remembered
        assert np.array_equal(physics.named.data.xpos[key], theirs[key]), key
        physics.named.data.xpos[key] = 7.0
        assert (theirs[key] == 7.0).all(), key
        physics.forward()
    assert repr(physics.named.data.xpos) == repr(theirs).replace("FieldIndexer", "_Remembering")
    with pytest.raises(KeyError, match="nobody"):
        physics.named.data.xpos["nobody"]


def test_physics_that_become_invalid_say_so(physics):
    from dm_control.rl.control import PhysicsError

    physics.data.qvel[:] = 1e15
    with pytest.raises(PhysicsError, match=r"MuJoCo warned of mjWARN_BADQ\w+ \(\d times"):
        physics.step(3)
    physics.reset()
    physics.step(3)
    physics.data.qvel[:] = 1e15
    with physics.suppress_physics_errors():
        physics.step(3)
