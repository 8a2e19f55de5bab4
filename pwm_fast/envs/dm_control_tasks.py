"""The 11 tasks of MT30 that dm_control lacks, on its models and task classes. Rewards as TD-MPC2 defines them
(Hansen et al. 2024, github.com/nicklashansen/tdmpc2, envs/tasks)."""

from collections.abc import Callable
from functools import partial
from typing import Any
from xml.etree import ElementTree

import numpy as np
from dm_control.rl.control import Environment
from dm_control.suite import ball_in_cup, cheetah, hopper, pendulum, reacher, walker
from dm_control.utils.rewards import tolerance

INF = float("inf")


class BackwardsWalker(walker.PlanarWalker):
    """Walk the other way: stand * (5 * move + 1) / 6, at least `speed` backwards."""

    def __init__(self, speed: float):
        super().__init__(move_speed=0)  # whose reward is that of standing
        self.speed = speed

    def get_reward(self, physics: Any) -> float:
        stand, speed = super().get_reward(physics), self.speed
        velocity = physics.horizontal_velocity()
        move = tolerance(velocity, (-INF, -speed), margin=speed / 2, value_at_margin=0.5, sigmoid="linear")
        return stand * (5 * move + 1) / 6


def _high(height: float) -> float:
    """1 at 1.2 m and above."""
    return tolerance(height, (1.2, INF), margin=0.6)


class BackwardsCheetah(cheetah.Cheetah):
    """Run the other way, at 8 m/s or more."""

    def get_reward(self, physics: Any) -> float:
        return tolerance(physics.speed(), (-INF, -8), margin=8, value_at_margin=0, sigmoid="linear")


class OneFootedCheetah(cheetah.Cheetah):
    """Run forwards, at 6 m/s or more, with one foot (a body's name) and the torso up."""

    def __init__(self, raised: str):
        super().__init__()
        self.raised = raised

    def get_reward(self, physics: Any) -> float:
        height = physics.named.data.xpos
        up = (3 * _high(height[self.raised, "z"]) + 2 * _high(height["torso", "z"])) / 5
        run = tolerance(physics.speed(), (6, INF), margin=6, value_at_margin=0, sigmoid="linear")
        return up * (5 * run + 1) / 6


class JumpingCheetah(cheetah.Cheetah):
    """Be high above the ground, both feet and the torso, without moving along."""

    def get_reward(self, physics: Any) -> float:
        height = physics.named.data.xpos
        still = tolerance(physics.speed(), (-0.5, 0.5), margin=0.5, value_at_margin=0, sigmoid="linear")
        high = [_high((height["torso", "z"] + height[foot, "z"]) / 2) for foot in ("bfoot", "ffoot")]
        return (5 * float(np.mean(high)) + still) / 6


class BackwardsHopper(hopper.Hopper):
    """Stand and hop the other way, at 1 m/s or more."""

    def __init__(self) -> None:
        super().__init__(hopping=True)

    def get_reward(self, physics: Any) -> float:
        standing = tolerance(physics.height(), (0.6, 2))
        hop = tolerance(physics.speed(), (-INF, -1), margin=0.5, value_at_margin=0.5, sigmoid="linear")
        return standing * hop


class SpinningBall(ball_in_cup.BallInCup):
    """Whirl the ball around the cup: outside of it, 0.5 m away, at 6 m/s or more."""

    def initialize_episode(self, physics: Any) -> None:
        anywhere = self.random.uniform() < 0.1
        while True:
            super().initialize_episode(physics)  # draws until nothing touches
            if anywhere or physics.in_target():
                return

    def get_reward(self, physics: Any) -> float:
        velocity = physics.named.data.qvel[["ball_x", "ball_z"]]
        distance = float(np.linalg.norm(physics.ball_to_target()))
        speed = float(np.linalg.norm(velocity))
        away = tolerance(distance, (0.5, INF), margin=0.25, value_at_margin=0.5, sigmoid="linear")
        fast = tolerance(speed, (6, INF), margin=3, value_at_margin=0.5, sigmoid="linear")
        return (1 - physics.in_target()) * (away + 2 * fast) / 3


class SpinningPendulum(pendulum.SwingUp):
    """Turn at 9 rad/s or more, either way."""

    def get_reward(self, physics: Any) -> float:
        speed = abs(float(physics.named.data.qvel["hinge"][0]))
        return tolerance(speed, (9, INF), margin=4.5, value_at_margin=0.5, sigmoid="linear")


def three_link_reacher() -> tuple[str, dict]:
    """dm_control's reacher with three links of 0.09 m, not two of 0.12 m, and the outer joints within 80 degrees."""
    text, assets = reacher.get_model_and_assets()
    root = ElementTree.fromstring(text)
    arm = root.find(".//body[@name='arm']")
    hand, finger = root.find(".//body[@name='hand']"), root.find(".//body[@name='finger']")
    actuators = root.find("actuator")
    assert arm is not None and hand is not None and finger is not None and actuators is not None
    for element, name in ((arm, "arm0"), (arm.find("geom"), "arm0"), (arm.find("joint"), "shoulder0")):
        element.set("name", name)  # type: ignore[union-attr]
    arm.find("geom").set("fromto", "0 0 0 0.09 0 0")  # type: ignore[union-attr]
    arm.remove(hand)
    middle = ElementTree.SubElement(arm, "body", name="arm1", pos="0.09 0 0")
    limits = {"limited": "true", "range": "-80 80"}
    ElementTree.SubElement(middle, "geom", {**arm.find("geom").attrib, "name": "arm1"})  # type: ignore[union-attr]
    ElementTree.SubElement(middle, "joint", {**limits, "name": "shoulder1"})
    middle.append(hand)
    hand.set("pos", "0.09 0 0")
    hand.find("joint").attrib.update(limits)  # type: ignore[union-attr]
    finger.set("pos", "0.09 0 0")
    actuators.clear()
    for joint in ("shoulder0", "shoulder1", "wrist"):
        ElementTree.SubElement(actuators, "motor", name=joint, joint=joint)
    return ElementTree.tostring(root, encoding="unicode"), assets


def _environment(domain: Any, task: Callable[[], Any], model: Any = None, timestep: float | None = None) -> Environment:
    physics = domain.Physics.from_xml_string(*(model or domain.get_model_and_assets)())
    return Environment(physics, task(), time_limit=INF, control_timestep=timestep)


_walker = partial(_environment, walker, timestep=0.025)
_cheetah = partial(_environment, cheetah)
_reacher = partial(_environment, reacher, model=three_link_reacher)
# name -> what makes dm_control's environment
CUSTOM: dict[str, Callable[[], Environment]] = {
    "walker-walk-backwards": partial(_walker, partial(BackwardsWalker, 1)),
    "walker-run-backwards": partial(_walker, partial(BackwardsWalker, 8)),
    "cheetah-run-backwards": partial(_cheetah, BackwardsCheetah),
    "cheetah-run-front": partial(_cheetah, partial(OneFootedCheetah, "bfoot")),
    "cheetah-run-back": partial(_cheetah, partial(OneFootedCheetah, "ffoot")),
    "cheetah-jump": partial(_cheetah, JumpingCheetah),
    "hopper-hop-backwards": partial(_environment, hopper, BackwardsHopper, timestep=0.02),
    "reacher-three-easy": partial(_reacher, partial(reacher.Reacher, 0.05)),
    "reacher-three-hard": partial(_reacher, partial(reacher.Reacher, 0.015)),
    "cup-spin": partial(_environment, ball_in_cup, SpinningBall, timestep=0.02),
    "pendulum-spin": partial(_environment, pendulum, SpinningPendulum),
}
