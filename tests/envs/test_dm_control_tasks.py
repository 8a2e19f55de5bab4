"""Rewards of the 11 tasks that dm_control lacks, against numbers computed by hand from the state of the physics.

tolerance's gaussian is 0.1 ** (f * f) at a fraction f of its margin; its linear one 1 - (1 - value_at_margin) * f,
never below 0.
"""

import numpy as np
import pytest

from pwm_fast.envs import registry

pytest.importorskip("dm_control", reason="dm_control is not installed (extra mt80)")


def environment(name, **velocity):
    """A task at rest in its model's zero position, but for the joints' velocities given by name."""
    env = registry.get(name).make()
    env.reset(seed=0)
    with env.physics.reset_context():
        env.physics.data.qpos[:] = 0.0
        for joint, value in velocity.items():
            env.physics.named.data.qvel[joint] = value
    return env


def reward(env):
    env.physics.forward()
    return float(env.rules.get_reward(env.physics))


@pytest.mark.parametrize(("name", "speed"), [("walker-walk-backwards", 1.0), ("walker-run-backwards", 8.0)])
def test_walking_backwards(name, speed):
    for velocity, move in [(-speed, 1.0), (-2 * speed, 1.0), (-0.75 * speed, 0.75), (0.0, 0.0), (speed, 0.0)]:
        env = environment(name, rootx=velocity)
        assert reward(env) == pytest.approx((5 * move + 1) / 6)  # it stands upright, 1.3 m high
    env = environment(name, rootx=-speed)
    env.physics.named.data.qpos["rootz"] = -0.4
    assert reward(env) == pytest.approx((3 * 0.1 ** (0.3 / 0.6) ** 2 + 1) / 4)  # 0.9 m high, still upright
    env.physics.named.data.qpos["rooty"] = np.pi  # on its head, where it is
    assert reward(env) == pytest.approx(3 * 0.1 ** (0.3 / 0.6) ** 2 / 4)


def test_running_backwards_on_two_feet():
    found = [reward(environment("cheetah-run-backwards", rootx=speed)) for speed in (-12.0, -8.0, -2.0, 0.0, 5.0)]
    assert found == pytest.approx([1.0, 1.0, 0.25, 0.0, 0.0])


# heights of the cheetah's bodies in its zero position: torso, back foot, front foot
TORSO, BACK, FRONT = 0.7, 0.31, 0.28


def high(height):
    return 1.0 if height >= 1.2 else 0.1 ** ((1.2 - height) / 0.6) ** 2


@pytest.mark.parametrize(("name", "foot"), [("cheetah-run-front", BACK), ("cheetah-run-back", FRONT)])
@pytest.mark.parametrize(("lift", "speed", "run"), [(0.29, 3.0, 0.5), (0.6, 7.0, 1.0), (0.0, -1.0, 0.0)])
def test_running_with_one_foot_up(name, foot, lift, speed, run):
    env = environment(name, rootx=speed)
    env.physics.named.data.qpos["rootz"] = lift
    up = (3 * high(foot + lift) + 2 * high(TORSO + lift)) / 5
    assert reward(env) == pytest.approx(up * (5 * run + 1) / 6)


def test_a_number_of_running_on_the_front_foot():
    """0.99 m: 0.1 ** 0.1225 = 0.75422; 0.6 m: 0.1; up = 0.36169; half the speed: * 3.5 / 6."""
    env = environment("cheetah-run-front", rootx=3.0)
    env.physics.named.data.qpos["rootz"] = 0.29
    assert reward(env) == pytest.approx(0.210986, abs=1e-6)


@pytest.mark.parametrize(("lift", "speed", "still"), [(0.29, 0.75, 0.5), (0.8, 0.2, 1.0), (0.0, -2.0, 0.0)])
def test_jumping(lift, speed, still):
    env = environment("cheetah-jump", rootx=speed)
    env.physics.named.data.qpos["rootz"] = lift
    up = (high((TORSO + BACK) / 2 + lift) + high((TORSO + FRONT) / 2 + lift)) / 2
    assert reward(env) == pytest.approx((5 * up + still) / 6)


def test_hopping_backwards():
    found = [reward(environment("hopper-hop-backwards", rootx=speed)) for speed in (-2.0, -1.0, -0.75, -0.25, 0.5)]
    assert found == pytest.approx([1.0, 1.0, 0.75, 0.25, 0.0])
    env = environment("hopper-hop-backwards", rootx=-2.0)
    env.physics.named.data.qpos["rooty"] = np.pi / 2  # lying, its torso no higher than its foot
    assert env.physics.height() > 0.6 and reward(env) == 0 and env.physics.height() < 0.6


@pytest.mark.parametrize(("name", "size"), [("reacher-three-easy", 0.05), ("reacher-three-hard", 0.015)])
def test_the_reacher_with_three_links(name, size):
    env = environment(name)
    physics = env.physics
    for beyond, expected in [(0.0, 1.0), (size + 0.009, 1.0), (size + 0.011, 0.0)]:
        physics.named.model.geom_pos["target", ["x", "y"]] = 0.27 + beyond, 0.0  # stretched out, it reaches 0.27 m
        assert reward(env) == expected
    physics.named.data.qpos[["shoulder1", "wrist"]] = np.pi / 3, np.pi / 6
    physics.forward()
    finger = physics.named.data.geom_xpos["finger", ["x", "y"]]
    assert finger == pytest.approx([0.09 * (1 + 0.5), 0.09 * (np.sqrt(0.75) + 1)])  # links at 0, 60 and 90 degrees
    assert env.observation()[3:5] == pytest.approx([0.27 + size + 0.011, 0.0] - finger)
    named = physics.named.model
    assert named.jnt_limited[["shoulder0", "shoulder1", "wrist"]].tolist() == [0, 1, 1]
    assert np.rad2deg(named.jnt_range[["shoulder1", "wrist"]]) == pytest.approx(np.array([[-80, 80]] * 2))
    assert named.body_pos["hand"] == pytest.approx([0.09, 0, 0])


def test_the_spinning_ball():
    env = environment("cup-spin", ball_x=3.0, ball_z=4.0)
    physics, position = env.physics, env.physics.named.data.qpos

    def put(x, z):
        """The ball this far from the target."""
        physics.forward()
        position[["ball_x", "ball_z"]] += physics.ball_to_target() + np.array([x, z])
        return reward(env)

    assert put(0.0, 0.375) == pytest.approx((0.75 + 2 * (1 - 0.5 / 3)) / 3)
    assert put(0.6, 0.0) == pytest.approx((1.0 + 2 * (1 - 0.5 / 3)) / 3)
    assert put(0.0, -0.2) == pytest.approx((0.4 + 2 * (1 - 0.5 / 3)) / 3)
    assert physics.in_target() == 0 and put(0.0, 0.0) == 0 and physics.in_target() == 1
    physics.named.data.qvel[["ball_x", "ball_z"]] = 0.0, -6.5
    assert put(0.0, 0.5) == pytest.approx(1.0)


def test_the_ball_starts_in_the_cup_but_for_a_tenth_of_episodes():
    env = registry.get("cup-spin").make()
    inside, collided = [], []
    env.reset(seed=0)
    for _ in range(60):
        env.reset()
        inside.append(env.physics.in_target())
        collided.append(env.physics.data.ncon)
    assert not any(collided)
    assert 0.75 < np.mean(inside) < 1.0


def test_the_spinning_pendulum():
    found = [reward(environment("pendulum-spin", hinge=speed)) for speed in (9.0, -12.0, 6.75, -6.75, 2.25, 0.0)]
    assert found == pytest.approx([1.0, 1.0, 0.75, 0.75, 0.25, 0.0])


def test_rewards_never_exceed_what_makes_a_thousand():
    from pwm_fast.envs.dm_control_tasks import CUSTOM

    assert set(CUSTOM) == set(registry.names("mt30")[19:])
    random = np.random.default_rng(0)
    for name in CUSTOM:
        task = registry.get(name)
        env = task.make()
        env.reset(seed=1)
        rewards = [env.step(random.uniform(-1, 1, task.action_dim))[1] for _ in range(20)]
        assert 0 <= min(rewards) and max(rewards) <= task.action_repeat
