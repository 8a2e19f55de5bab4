"""The lean simulators of Meta-World's tasks give what Meta-World's own give, bit for bit."""

import numpy as np
import pytest

from pwm_fast.envs import registry

pytest.importorskip("metaworld", reason="metaworld is not installed (extra mt80)")
NAMES = [name.removeprefix("mw-") for name in registry.names("metaworld")]


def original(name):
    """Meta-World's own environment, which shows its goal and draws it from the seeded generator."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-v3-goal-observable"]()
    env._freeze_rand_vec, env.seeded_rand_vec = False, True
    return env


def lean(name):
    return registry.get(f"mw-{name}").make().simulator


@pytest.mark.parametrize("name", NAMES)
def test_every_task_gives_the_originals_observations_rewards_and_infos(name):
    """Over three episodes: of one seed, of the next draws, and with the hand going for the object to grasp it."""
    envs, random = (original(name), lean(name)), np.random.default_rng(0)
    for seed in (1, None, 2):
        for env in envs:
            if seed is not None:
                env.seed(seed)
        expected, found = (env.reset()[0] for env in envs)
        assert found.tobytes() == expected.tobytes()
        for step in range(25):
            action = random.uniform(-1.2, 1.2, 4)
            if seed == 2:
                action[:3], action[3] = 10 * (expected[4:7] - expected[:3]), 1 if step > 15 else -1
            (expected, *theirs), (found, *ours) = (env.step(action) for env in envs)
            assert found.tobytes() == expected.tobytes() and ours == theirs, step


def test_touching_is_pressing_with_both_pads():
    """Meta-World's scripted policy grasps; both ways of telling agree on every geometry at every step."""
    from metaworld import policies
    from metaworld.sawyer_xyz_env import SawyerXYZEnv

    env, policy, seen = lean("pick-place"), policies.SawyerPickPlaceV3Policy(), set()
    env.seed(0)
    obs, _ = env.reset()
    for _ in range(60):
        obs, *_ = env.step(policy.get_action(obs).clip(-1, 1))
        for geom in range(env.model.ngeom):
            touches = env.touching_object(geom)
            assert touches == SawyerXYZEnv.touching_object(env, geom)
            seen.add((geom == env.model.geom("objGeom").id, touches))
    assert (True, True) in seen and (True, False) in seen


def test_the_quaternion_of_a_matrix_is_scipys():
    """Turns around all axes, so that each of the four entries is the largest of some."""
    from scipy.spatial.transform import Rotation

    from pwm_fast.envs.meta_world_simulator import quaternion

    largest = set()
    for matrix in Rotation.random(500, rng=np.random.default_rng(0)).as_matrix():
        expected = Rotation.from_matrix(matrix).as_quat()
        assert quaternion(matrix.ravel()).tobytes() == expected.tobytes()
        largest.add(int(np.abs(expected).argmax()))
    assert largest == {0, 1, 2, 3}


def test_an_episode_has_an_end():
    env = lean("reach")
    env.reset()
    env.curr_path_length = env.max_path_length - 1
    assert env.step(np.zeros(4))[3]
    with pytest.raises(ValueError, match="an episode has 500 steps; call reset"):
        env.step(np.zeros(4))
