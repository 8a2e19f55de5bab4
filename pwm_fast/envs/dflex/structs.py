"""What the kernels read (``Model``) and work in (``scratch_struct``), and what they are compiled for (``Features``)."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import warp as wp

from pwm_fast.envs.dflex.lanes import algebra
from pwm_fast.envs.dflex.model import PRISMATIC, RobotModel


@dataclass(frozen=True)
class Features:
    """What a robot has, as compile-time constants."""

    free_root: bool
    prismatic: bool
    ball: bool
    muscles: bool
    turned_frames: bool  # some joint frame is rotated against its parent link

    @staticmethod
    def of(model: RobotModel) -> "Features":
        return Features(
            free_root=model.has_free_root,
            prismatic=bool((model.joint_type == PRISMATIC).any()),
            ball=model.has_ball_joints,
            muscles=len(model.segments.muscle) > 0,
            turned_frames=bool((np.abs(model.frame_rot[:, :3]) > 0).any()),
        )


@wp.struct
class Model:
    """RobotModel on the device; fields as there."""

    joint_type: wp.array(dtype=int)
    parent: wp.array(dtype=int)
    q_start: wp.array(dtype=int)
    qd_start: wp.array(dtype=int)
    dof_link: wp.array(dtype=int)
    dof_q: wp.array(dtype=int)
    offset: wp.array(dtype=int)  # 1 where frame_pos is not 0
    frame_pos: wp.array(dtype=wp.vec3)
    frame_rot: wp.array(dtype=wp.vec4)
    axis: wp.array(dtype=wp.vec3)
    springs: wp.array(dtype=wp.vec4)  # stiffness, target, lower, upper
    limit_stiffness: wp.array(dtype=float)
    damping: wp.array(dtype=float)
    armature: wp.array(dtype=float)
    mass: wp.array(dtype=float)
    subtree_mass: wp.array(dtype=float)
    com: wp.array(dtype=wp.vec3)
    inertia: wp.array(dtype=wp.mat33)
    contact_link: wp.array(dtype=int)
    contact_point: wp.array(dtype=wp.vec3)
    contact_radius: wp.array(dtype=float)
    contact_material: wp.array(dtype=wp.vec4)
    row: wp.array(dtype=int)  # packed mass matrix: row d is entries row[d] .. row[d + 1] - 1, see lanes/factor.py
    ancestor: wp.array(dtype=int)
    entry_dof: wp.array(dtype=int)
    segment_muscle: wp.array(dtype=int)
    segment_links: wp.array(dtype=wp.vec2i)
    segment_start: wp.array(dtype=wp.vec3)
    segment_end: wp.array(dtype=wp.vec3)
    gravity: wp.vec3


def packed_rows(model: RobotModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sparse lower triangle of the mass matrix: row starts [D + 1]; ancestor and row of every entry."""
    starts, ancestors, rows = [0], [], []
    for d in range(model.nqd):
        b = d
        while b >= 0:
            ancestors.append(b)
            rows.append(d)
            b = int(model.dof_parent[b])
        starts.append(len(ancestors))
    return np.array(starts, np.int32), np.array(ancestors, np.int32), np.array(rows, np.int32)


def model_to_warp(model: RobotModel) -> Model:
    """The tables on the device, with those derived for the kernels."""
    subtree_mass = model.mass.copy()
    for i in reversed(range(model.num_links)):
        if model.parent[i] >= 0:
            subtree_mass[model.parent[i]] += subtree_mass[i]
    row, ancestor, entry_dof = packed_rows(model)
    derived = dict(
        offset=np.abs(model.frame_pos).max(-1) > 0,
        springs=np.stack([model.stiffness, model.target, model.lower, model.upper], -1),
        subtree_mass=subtree_mass,
        row=row,
        ancestor=ancestor,
        entry_dof=entry_dof,
        segment_muscle=model.segments.muscle,
        segment_links=model.segments.links,
        segment_start=model.segments.start,
        segment_end=model.segments.end,
    )
    m = Model()
    for name, var in Model.vars.items():
        value = derived[name] if name in derived else getattr(model, name)
        is_array = isinstance(var.type, wp.array)
        setattr(m, name, wp.array(value, dtype=var.type.dtype) if is_array else var.type(*value.tolist()))
    return m


@cache
def scratch_struct(lanes: int) -> type:
    """Working arrays. They carry the loops' state, so that the adjoint can replay it; threads that run one after the
    other (a CPU slice) share one row of all but H, H_grad.

    Row 0 of every per-link array is the world; link i is row i + 1.
    """
    a = algebra(lanes)

    @wp.struct
    class Scratch:
        rot: wp.array2d(dtype=a.Quat)  # [rows, links + 1]
        frame: wp.array2d(dtype=a.Quat)  # joint frames, where they are turned against the parent link
        pos: wp.array2d(dtype=a.Vec)
        com: wp.array2d(dtype=a.Vec)
        axis_w: wp.array2d(dtype=a.Vec)  # [rows, dofs] motion axes, angular and linear part
        axis_v: wp.array2d(dtype=a.Vec)
        w: wp.array2d(dtype=a.Vec)  # [rows, links + 1] twist
        v: wp.array2d(dtype=a.Vec)
        joint_w: wp.array2d(dtype=a.Vec)  # the joint's own share of it
        joint_v: wp.array2d(dtype=a.Vec)
        acc_w: wp.array2d(dtype=a.Vec)  # bias acceleration
        acc_v: wp.array2d(dtype=a.Vec)
        torque: wp.array2d(dtype=a.Vec)  # bias wrench minus external wrench
        force: wp.array2d(dtype=a.Vec)
        inertia: wp.array2d(dtype=a.Sym)  # composite inertia about the world origin,
        moment: wp.array2d(dtype=a.Vec)  # its first moment of mass,
        spread_mass: wp.array2d(dtype=a.Sym)  # and mass; a matrix where rotations may not be orthogonal (ball joints)
        dof_torque: wp.array2d(dtype=a.Vec)  # [rows, dofs] wrench that accelerates a subtree along a motion axis
        dof_force: wp.array2d(dtype=a.Vec)
        H: wp.array2d(dtype=a.Lane)  # [groups, entries] packed mass matrix
        H_grad: wp.array2d(dtype=a.Lane)
        tau: wp.array2d(dtype=a.Lane)  # [rows, dofs]
        tau_grad: wp.array2d(dtype=a.Lane)
        qdd: wp.array2d(dtype=a.Lane)
        qdd_grad: wp.array2d(dtype=a.Lane)
        y: wp.array2d(dtype=a.Lane)

    return Scratch
