"""The five tasks: a table row each (model, substeps, torques, ...) plus observation, reward, termination and reset.

Rewards follow the code behind the published scores, not the paper's table 2, and are functions of the observation
*before* the step. Quaternions are (x, y, z, w); the world is y-up; qd of a free root is its twist (omega, v) about the
world's origin.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from pwm_fast.envs import registry

QUARTER_TURN = 0.5**0.5
FACING_X = (-QUARTER_TURN, 0.0, 0.0, QUARTER_TURN)  # -90 degrees about x: the model's z becomes the world's y
HUMANOID_STRENGTH = (200, 200, 200) + 2 * (200, 200, 600, 400, 100, 100) + 2 * (100, 100, 200)


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """[..., 4] x [..., 4] -> [..., 4]."""
    ua, wa, ub, wb = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    vector = wa * ub + wb * ua + torch.linalg.cross(ua, ub, dim=-1)
    return torch.cat([vector, wa * wb - (ua * ub).sum(-1, keepdim=True)], -1)


def height_reward(height: Tensor, limit: float, scale: float) -> Tensor:
    """x = clip(height, -1, limit): -200 x^2 below zero, scale * x above."""
    x = height.clip(-1.0, limit)
    return torch.where(x < 0, -200.0 * x * x, scale * x)


def uniform(n: int, width: int, spread: float, generator: torch.Generator) -> Tensor:
    """[n, width] uniform in +-spread / 2."""
    return spread * (torch.rand(n, width, generator=generator) - 0.5)


@cache
def attitude_forms(start_rotation: tuple[float, float, float, float]) -> tuple[Tensor, Tensor]:
    """Quadratic forms [4, 12] and offsets [3] of a quaternion r: with r' = r conj(start_rotation), the y component of
    the up axis, and the x and z components of the forward axis, are r^T F r + offset."""
    x0, y0, z0, w0 = start_rotation
    x, y, z, w = torch.tensor([[w0, -z0, y0, -x0], [z0, w0, -x0, -y0], [-y0, x0, w0, -z0], [x0, y0, z0, w0]])
    outer = torch.outer
    forms = [outer(w, w) + outer(y, y), outer(w, w) + outer(x, x), outer(x, z) - outer(w, y)]
    return 2.0 * torch.cat(forms, 1), torch.tensor([-1.0, -1.0, 0.0])


@dataclass(frozen=True)
class DflexTask:
    """A row of the table. ``torque``: N m at action 1 on each of the last ``action_dim`` joints; empty: has muscles.

    ``observe`` and ``reward`` are the definition; a step computes them in kernels (stages.py), from ``observes``, the
    kind of observation, and ``reward_terms``, the numbers of the reward.
    """

    name: str
    title: str
    model: str
    obs_dim: int
    action_dim: int
    substeps: int
    torque: tuple[float, ...]
    termination_height: float
    refresh: int | None = None  # substeps between mass-matrix refreshes; None: once per control step
    action_obs: int = 0  # trailing entries of the observation that show the last action
    episode_length: int = 1000
    observes: ClassVar[str | None] = None
    reward_terms: ClassVar[dict[str, float]] = {}

    def observe(self, q: Tensor, qd: Tensor, shown_action: Tensor) -> Tensor:
        """q [N, nq], qd [N, nqd], shown_action [N, A] -> obs [N, S]."""
        raise TypeError(f"{type(self).__name__} has no observation; use a task of TASKS")

    def reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [N, S] before the step, action [N, A] in [-1, 1] -> reward [N]."""
        raise TypeError(f"{type(self).__name__} has no reward; use a task of TASKS")

    def terminated(self, obs: Tensor) -> Tensor:
        """obs [N, S] -> bool [N]: the robot has fallen."""
        return obs[:, 0] < self.termination_height

    def start_state(
        self, start_q: Tensor, nqd: int, n: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """n start states (q [n, nq], qd [n, nqd]); exactly the nominal pose without a generator."""
        q, qd = start_q.repeat(n, 1), torch.zeros(n, nqd)
        if generator is not None:
            self.add_noise(q, qd, generator)
        return q, qd

    def terms(self) -> dict[str, Any]:
        """Observation, reward and termination as the kernels read them: fields of stages.Terms."""
        if self.observes is None:
            raise TypeError(f"{type(self).__name__} has no kernels; use a task of TASKS")
        return dict(self.reward_terms, termination_height=self.termination_height, episode_length=self.episode_length)

    def add_noise(self, q: Tensor, qd: Tensor, generator: torch.Generator) -> None:
        """Reset noise, in place."""
        raise TypeError(f"{type(self).__name__} has no reset noise; use a task of TASKS")


@dataclass(frozen=True)
class Hopper(DflexTask):
    """Planar: root slides x and z, pitch, three leg joints. obs = q without x, qd."""

    observes: ClassVar = "hopper"
    reward_terms: ClassVar = dict(
        constant=1.0, tilt=0.524**-2, square=0.1, height_offset=0.30, height_limit=0.3, height_scale=1.0
    )

    def observe(self, q, qd, shown_action):
        return torch.cat([q[:, 1:], qd], -1)

    def reward(self, obs, action):
        height = height_reward(obs[:, 0] + 0.30, limit=0.3, scale=1.0)
        upright = 1.0 - obs[:, 1].square() / 0.524**2
        return obs[:, 5] + height + upright - 0.1 * action.square().sum(-1)

    def add_noise(self, q, qd, generator):
        n = len(q)
        q += torch.cat([uniform(n, width, 0.1, generator) for width in (2, 1, 3)], -1)
        qd += uniform(n, qd.shape[1], 0.1, generator)


@dataclass(frozen=True)
class Walker(DflexTask):
    """A free root: obs = height, quaternion, velocity of the root, joints, 0.1 * rates, up, heading, last action."""

    start_rotation: tuple[float, float, float, float] = FACING_X
    target: float = 10000.0  # x of the point to walk to, m
    observes: ClassVar = "walker"

    def observe(self, q, qd, shown_action):
        p, r, omega = q[:, :3], q[:, 3:7], qd[:, :3]
        forms, offset = attitude_forms(self.start_rotation)
        attitude = ((r @ forms).view(-1, 3, 4) * r[:, None]).sum(-1) + offset
        up, forward = attitude[:, :1], attitude[:, 1:]
        to = -p[:, 0:3:2] + torch.tensor([self.target, 0.0])
        heading = (forward * torch.nn.functional.normalize(to)).sum(-1, keepdim=True)
        velocity = qd[:, 3:6] + torch.linalg.cross(omega, p)
        parts = [p[:, 1:2], r, velocity, omega, q[:, 7:], 0.1 * qd[:, 6:], up, heading]
        return torch.cat([*parts, shown_action] if self.action_obs else parts, -1)

    def terms(self):
        forms = attitude_forms(self.start_rotation)[0].view(4, 3, 4).transpose(0, 1)
        form_up, form_x, form_z = (0.5 * (forms + forms.mT)).numpy()
        walk = dict(up=0.1, heading=1.0, attitude=self.obs_dim - self.action_obs - 2, target=self.target)
        return super().terms() | walk | dict(form_up=form_up, form_x=form_x, form_z=form_z)

    def add_noise(self, q, qd, generator):
        n = len(q)
        q[:, :3] += uniform(n, 3, 0.2, generator)
        half_angle = uniform(n, 1, math.pi / 24, generator)
        axis = torch.nn.functional.normalize(uniform(n, 3, 1.0, generator))
        q[:, 3:7] = quaternion_product(q[:, 3:7], torch.cat([axis * half_angle.sin(), half_angle.cos()], -1))
        q[:, 7:] += uniform(n, q.shape[1] - 7, 0.4, generator)  # ball quaternions too, left unnormalised as published
        qd += uniform(n, qd.shape[1], 0.5, generator)


class Ant(Walker):
    reward_terms: ClassVar = dict(slope=1.0, constant=-0.27)

    def reward(self, obs, action):
        return obs[:, 5] + 0.1 * obs[:, 27] + obs[:, 28] + obs[:, 0] - 0.27


class Humanoid(Walker):
    reward_terms: ClassVar = dict(square=0.002, height_offset=-0.84, height_limit=0.1, height_scale=10.0)

    def reward(self, obs, action):
        height = height_reward(obs[:, 0] - 0.74 - 0.10, limit=0.1, scale=10.0)
        return obs[:, 5] + 0.1 * obs[:, 53] + obs[:, 54] + height - 0.002 * action.square().sum(-1)


class Anymal(Walker):
    reward_terms: ClassVar = dict(slope=1.0, constant=-0.25, square=0.005)

    def reward(self, obs, action):
        return obs[:, 5] + 0.1 * obs[:, 35] + obs[:, 36] + obs[:, 0] - 0.25 - 0.005 * action.square().sum(-1)


class SNUHumanoid(Walker):
    reward_terms: ClassVar = dict(absolute=0.001)

    def reward(self, obs, action):
        return obs[:, 5] + 0.1 * obs[:, 51] + obs[:, 52] - 0.001 * action.abs().sum(-1)


TASKS: dict[str, DflexTask] = {
    task.name: task
    for task in (
        Hopper("hopper", "Hopper", "hopper", 11, 3, 16, (200.0,) * 3, -0.45),
        Ant("ant", "Ant", "ant", 37, 8, 16, (200.0,) * 8, 0.27, action_obs=8),
        Humanoid(
            name="humanoid",
            title="Humanoid",
            model="humanoid",
            obs_dim=76,
            action_dim=21,
            substeps=48,
            torque=tuple(0.35 * s for s in HUMANOID_STRENGTH),
            termination_height=0.74,
            action_obs=21,
            target=200.0,
        ),
        Anymal("anymal", "ANYmal", "anymal", 49, 12, 16, (200.0,) * 12, 0.25, action_obs=12),
        SNUHumanoid(
            name="snu-humanoid",
            title="SNU Humanoid",
            model="snu",
            obs_dim=53,
            action_dim=152,
            substeps=48,
            torque=(),
            termination_height=0.46,
            refresh=8,
            start_rotation=(0.0, QUARTER_TURN, 0.0, QUARTER_TURN),
        ),
    )
}


def get_task(task: str | DflexTask) -> DflexTask:
    """The row of a name; a row is returned as it is. Raises registry.UnknownTask."""
    return task if isinstance(task, DflexTask) else TASKS[registry.get(task).name]
