"""The dynamics written plainly in float64: dense Jacobians, every inertia a 6 x 6 matrix, no recursion over subtrees.

It defines what the simulator computes; twists (angular, linear) and wrenches refer to the world origin.
"""

from dataclasses import fields, replace

import numpy as np

from pwm_fast.envs.dflex.model import BALL, FREE, PRISMATIC, RobotModel


def product(a, b):
    """Quaternions xyzw [..., 4]."""
    ua, wa, ub, wb = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    return np.concatenate([wa * ub + wb * ua + np.cross(ua, ub), wa * wb - (ua * ub).sum(-1, keepdims=True)], -1)


def rotate(r, v):
    """v turned by r: not scale invariant, which matters for the unnormalised quaternions after an SNU reset."""
    u, w = r[..., :3], r[..., 3:]
    return v * (2 * w * w - 1) + 2 * w * np.cross(u, v) + 2 * u * (u * v).sum(-1, keepdims=True)


def matrix(r):
    return np.stack([rotate(r, np.broadcast_to(e, (*r.shape[:-1], 3))) for e in np.eye(3)], -1)


def skew(v):
    return np.stack([np.cross(v, np.broadcast_to(e, v.shape)) for e in np.eye(3)], -1)


def cross_motion(a, b):
    w, v = a[..., :3], a[..., 3:]
    return np.concatenate([np.cross(w, b[..., :3]), np.cross(v, b[..., :3]) + np.cross(w, b[..., 3:])], -1)


def cross_force(a, f):
    w, v = a[..., :3], a[..., 3:]
    return np.concatenate([np.cross(w, f[..., :3]) + np.cross(v, f[..., 3:]), np.cross(w, f[..., 3:])], -1)


def wrench(x, force):
    return np.concatenate([np.cross(x, force), force], -1)


def apply(m, v):
    return (m @ v[..., None])[..., 0]


def kinematics(model: RobotModel, q):
    """Position [L, N, 3] and rotation [L, N, 4] of the links, and motion axes [N, 6, D]."""
    n, positions, rotations, axes = len(q), [], [], np.zeros((len(q), 6, model.nqd))
    for i, kind in enumerate(model.joint_type):
        j, d, p = model.q_start[i], model.qd_start[i], model.parent[i]
        if kind == FREE:
            positions.append(q[:, j : j + 3])
            rotations.append(q[:, j + 3 : j + 7])
            axes[:, :, d : d + 6] = np.eye(6)
            continue
        r = rotations[p] if p >= 0 else np.tile([0.0, 0, 0, 1], (n, 1))
        x = (positions[p] if p >= 0 else 0.0) + rotate(r, np.tile(model.frame_pos[i], (n, 1)))
        r = product(r, np.tile(model.frame_rot[i], (n, 1)))
        local = np.eye(3) if kind == BALL else model.axis[i][None]
        for c, axis in enumerate(local):
            world = rotate(r, np.tile(axis, (n, 1)))
            if kind == PRISMATIC:
                axes[:, 3:, d], x = world, x + world * q[:, j, None]
            else:
                axes[:, :, d + c] = np.concatenate([world, np.cross(x, world)], -1)
        if kind == BALL:
            r = product(r, q[:, j : j + 4])
        elif kind != PRISMATIC:
            half = 0.5 * q[:, j, None]
            r = product(r, np.concatenate([np.sin(half) * model.axis[i], np.cos(half)], -1))
        positions.append(x)
        rotations.append(r)
    return positions, rotations, axes


def integrate_rotation(r, w, h):
    r = r + 0.5 * h * product(np.concatenate([w, np.zeros_like(w[:, :1])], -1), r)
    return r / np.linalg.norm(r, axis=-1, keepdims=True)


def float64(model: RobotModel) -> RobotModel:
    """The same tables, so that every product is taken in float64."""
    tables = {f.name: getattr(model, f.name) for f in fields(model)}
    wide = {k: v.astype(np.float64) for k, v in tables.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
    return replace(model, **wide)


def control_step(model: RobotModel, q, qd, command, substeps: int, refresh: int, duration: float = 1 / 60):
    """(q [N, nq], qd [N, nqd]) after one control step; command [N, C]: tensions, or torques on the last C freedoms."""
    model = float64(model)
    q, qd, command = (np.array(x, np.float64) for x in (q, qd, command))
    n, h, muscles = len(q), duration / substeps, len(model.tension) > 0
    depends = np.zeros((model.num_links, model.nqd))  # 1 where a freedom moves a link
    for i, p in enumerate(model.parent):
        depends[i] = depends[p] if p >= 0 else 0.0
        depends[i, model.dof_link == i] = 1.0
    motor = np.zeros((n, model.nqd))
    if not muscles:
        motor[:, model.nqd - command.shape[1] :] = command
    for step in range(substeps):
        positions, rotations, axes = kinematics(model, q)
        twists, biases, wrenches, mass_matrix = [], [], [], np.zeros((n, model.nqd, model.nqd))
        for i, p in enumerate(model.parent):
            own = model.dof_link == i
            share = apply(axes[:, :, own], qd[:, own])
            twist = share + (twists[p] if p >= 0 else 0.0)
            free = model.joint_type[i] == FREE
            bias = (biases[p] if p >= 0 else 0.0) + (0.0 if free else cross_motion(twist, share))
            turn = matrix(rotations[i])
            back = turn.swapaxes(1, 2)
            com = positions[i] + rotate(rotations[i], np.tile(model.com[i], (n, 1)))
            to_link = np.zeros((n, 6, 6))  # Ad of (R, com)^-1
            to_link[:, :3, :3] = to_link[:, 3:, 3:] = back
            to_link[:, 3:, :3] = -skew(apply(back, com)) @ back
            local = np.zeros((6, 6))
            local[:3, :3], local[3:, 3:] = model.inertia[i], model.mass[i] * np.eye(3)
            inertia = to_link.swapaxes(1, 2) @ local @ to_link
            twists.append(twist)
            biases.append(np.broadcast_to(bias, twist.shape))
            momentum = apply(inertia, twist)
            weight = wrench(com, np.tile(model.mass[i] * model.gravity, (n, 1)))
            wrenches.append(apply(inertia, biases[i]) + cross_force(twist, momentum) - weight)
            jacobian = axes * depends[i]
            mass_matrix += jacobian.swapaxes(1, 2) @ inertia @ jacobian
        for link, point, radius, (ke, kd, kf, mu) in zip(
            model.contact_link, model.contact_point, model.contact_radius, model.contact_material
        ):
            x = positions[link] + rotate(rotations[link], np.tile(point, (n, 1))) - [0.0, radius, 0.0]
            u = twists[link][:, 3:] + np.cross(twists[link][:, :3], x)
            depth, slip = np.maximum(-x[:, 1], 0.0), np.hypot(u[:, 0], u[:, 2])
            grip = np.minimum(kf * slip, mu * ke * depth) / np.where(slip > 0, slip, 1.0) * (depth > 0)
            up = depth * (ke + kd * np.maximum(-u[:, 1], 0.0))
            wrenches[link] = wrenches[link] - wrench(x, np.stack([-grip * u[:, 0], up, -grip * u[:, 2]], -1))
        s = model.segments
        for muscle, (a, b), start, end in zip(s.muscle, s.links, s.start, s.end):
            x = positions[a] + rotate(rotations[a], np.tile(np.float64(start), (n, 1)))
            y = positions[b] + rotate(rotations[b], np.tile(np.float64(end), (n, 1)))
            force = (y - x) / np.linalg.norm(y - x, axis=-1, keepdims=True) * command[:, muscle, None]
            wrenches[a], wrenches[b] = wrenches[a] - wrench(x, force), wrenches[b] + wrench(y, force)
        x = q[:, model.dof_q]
        limits = np.maximum(model.lower - x, 0.0) - np.maximum(x - model.upper, 0.0)
        tau = motor - model.stiffness * (x - model.target) - model.damping * qd + model.limit_stiffness * limits
        tau = tau - sum(apply((axes * depends[i]).swapaxes(1, 2), f) for i, f in enumerate(wrenches))
        if step % refresh == 0:
            held = mass_matrix + np.diag(model.armature)
        qd = qd + h * np.linalg.solve(held, tau[..., None])[..., 0]
        q = q.copy()
        for i, kind in enumerate(model.joint_type):
            j, d = model.q_start[i], model.qd_start[i]
            if kind == FREE:
                w, v, p = qd[:, d : d + 3], qd[:, d + 3 : d + 6], q[:, j : j + 3]
                q[:, j : j + 3] = p + h * (v + np.cross(w, p))
                q[:, j + 3 : j + 7] = integrate_rotation(q[:, j + 3 : j + 7], w, h)
            elif kind == BALL:
                q[:, j : j + 4] = integrate_rotation(q[:, j : j + 4], qd[:, d : d + 3], h)
            else:
                q[:, j] += h * qd[:, d]
    return q, qd
