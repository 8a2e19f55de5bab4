"""Batched, differentiable articulated-body dynamics on Warp (equations: Featherstone, Rigid Body Dynamics
Algorithms, ch. 5-6).

One thread per environment. All spatial quantities are (angular, linear) pairs about the world origin, so twists,
wrenches and
composite inertias of a subtree add without shifting, and a mass matrix stays meaningful when it is held over several
substeps.

``kernels(features)`` compiles one module per kind of robot: what a robot lacks (ball joints, muscles, prismatic
joints, a free
root) is not compiled in, because even untaken branches cost 15-25 % in differentiated loops.

Row 0 of every per-link scratch array is the world; link i is row i + 1.
"""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import warp as wp

from pwm_fast.envs.dflex.model import BALL, PRISMATIC, RobotModel

wp.config.log_level = wp.LOG_WARNING


@dataclass(frozen=True)
class Features:
    """What a robot has, as compile-time constants."""

    free_root: bool
    prismatic: bool
    ball: bool
    muscles: bool

    @staticmethod
    def of(model: RobotModel) -> "Features":
        return Features(
            free_root=model.has_free_root,
            prismatic=bool((model.joint_type == PRISMATIC).any()),
            ball=model.has_ball_joints,
            muscles=len(model.segments.muscle) > 0,
        )


@wp.struct
class Model:
    """RobotModel on the device; fields as there."""

    joint_type: wp.array(dtype=int)
    parent: wp.array(dtype=int)
    q_start: wp.array(dtype=int)
    qd_start: wp.array(dtype=int)
    dof_parent: wp.array(dtype=int)
    dof_link: wp.array(dtype=int)
    dof_q: wp.array(dtype=int)
    frame_pos: wp.array(dtype=wp.vec3)
    frame_rot: wp.array(dtype=wp.quat)
    axis: wp.array(dtype=wp.vec3)
    stiffness: wp.array(dtype=float)
    target: wp.array(dtype=float)
    damping: wp.array(dtype=float)
    limit_stiffness: wp.array(dtype=float)
    lower: wp.array(dtype=float)
    upper: wp.array(dtype=float)
    armature: wp.array(dtype=float)
    mass: wp.array(dtype=float)
    com: wp.array(dtype=wp.vec3)
    inertia: wp.array(dtype=wp.mat33)
    contact_link: wp.array(dtype=int)
    contact_point: wp.array(dtype=wp.vec3)
    contact_radius: wp.array(dtype=float)
    contact_material: wp.array(dtype=wp.vec4)
    pair_dof: wp.array(dtype=int)  # every degree of freedom with each of its ancestors and itself
    pair_ancestor: wp.array(dtype=int)
    segment_muscle: wp.array(dtype=int)
    segment_links: wp.array(dtype=wp.vec2i)
    segment_start: wp.array(dtype=wp.vec3)
    segment_end: wp.array(dtype=wp.vec3)
    gravity: wp.vec3


@wp.struct
class Scratch:
    """Working arrays of one slice of the batch, all [envs, ...]; they carry the loops' state so that the adjoint can
    replay it."""

    rot: wp.array2d(dtype=wp.quat)  # [envs, links + 1]
    pos: wp.array2d(dtype=wp.vec3)
    com: wp.array2d(dtype=wp.vec3)
    axis_w: wp.array2d(dtype=wp.vec3)  # [envs, dofs] motion axes, angular and linear part
    axis_v: wp.array2d(dtype=wp.vec3)
    w: wp.array2d(dtype=wp.vec3)  # [envs, links + 1] twist
    v: wp.array2d(dtype=wp.vec3)
    joint_w: wp.array2d(dtype=wp.vec3)  # the joint's own share of it
    joint_v: wp.array2d(dtype=wp.vec3)
    acc_w: wp.array2d(dtype=wp.vec3)  # bias acceleration
    acc_v: wp.array2d(dtype=wp.vec3)
    torque: wp.array2d(dtype=wp.vec3)  # bias wrench minus external wrench
    force: wp.array2d(dtype=wp.vec3)
    sum_I: wp.array2d(dtype=wp.mat33)  # composite 6 x 6 inertia: angular, angular-linear and linear block
    sum_C: wp.array2d(dtype=wp.mat33)
    sum_M: wp.array2d(dtype=wp.mat33)
    H: wp.array3d(dtype=float)  # [envs, dofs, dofs], lower triangle
    H_grad: wp.array3d(dtype=float)
    tau: wp.array2d(dtype=float)  # [envs, dofs]
    tau_grad: wp.array2d(dtype=float)
    qdd: wp.array2d(dtype=float)
    qdd_grad: wp.array2d(dtype=float)
    y: wp.array2d(dtype=float)


@cache
def kernels(features: Features) -> SimpleNamespace:
    """The kernels for robots with these features: ``control_step`` (forward only), ``substep`` and ``mass_matrix``
    (adjoint)."""
    free_root, prismatic, ball, muscles = features.free_root, features.prismatic, features.ball, features.muscles
    first = 1 if free_root else 0  # the free root is peeled off every loop over links

    @wp.func
    def kinematics(e: int, m: Model, q: wp.array2d(dtype=float), s: Scratch):
        s.rot[e, 0] = wp.quat(0.0, 0.0, 0.0, 1.0)
        s.pos[e, 0] = wp.vec3(0.0)
        if wp.static(free_root):
            s.pos[e, 1] = wp.vec3(q[e, 0], q[e, 1], q[e, 2])
            s.rot[e, 1] = wp.quat(q[e, 3], q[e, 4], q[e, 5], q[e, 6])
            s.com[e, 1] = s.pos[e, 1] + wp.quat_rotate(s.rot[e, 1], m.com[0])
            for c in range(wp.static(3)):
                unit = wp.vec3(0.0)
                unit[c] = 1.0
                s.axis_w[e, c] = unit
                s.axis_v[e, c] = wp.vec3(0.0)
                s.axis_w[e, 3 + c] = wp.vec3(0.0)
                s.axis_v[e, 3 + c] = unit
        for i in range(wp.static(first), m.parent.shape[0]):
            k = i + 1
            j = m.q_start[i]
            d = m.qd_start[i]
            p = m.parent[i] + 1
            rp = s.rot[e, p]
            r = rp * m.frame_rot[i]
            x = s.pos[e, p] + wp.quat_rotate(rp, m.frame_pos[i])
            if wp.static(ball):
                if m.joint_type[i] == wp.static(BALL):
                    s.rot[e, k] = r * wp.quat(q[e, j], q[e, j + 1], q[e, j + 2], q[e, j + 3])
                    axes = wp.quat_to_matrix(r)
                    for c in range(3):
                        b = wp.vec3(axes[0, c], axes[1, c], axes[2, c])
                        s.axis_w[e, d + c] = b
                        s.axis_v[e, d + c] = wp.cross(x, b)
                else:
                    a = wp.quat_rotate(r, m.axis[i])
                    half = 0.5 * q[e, j]
                    u = m.axis[i] * wp.sin(half)
                    s.rot[e, k] = r * wp.quat(u[0], u[1], u[2], wp.cos(half))
                    s.axis_w[e, d] = a
                    s.axis_v[e, d] = wp.cross(x, a)
                s.pos[e, k] = x
            elif wp.static(prismatic):
                ap = wp.quat_rotate(r, m.axis[i])
                if m.joint_type[i] == wp.static(PRISMATIC):
                    s.rot[e, k] = r
                    s.pos[e, k] = x + ap * q[e, j]
                    s.axis_w[e, d] = wp.vec3(0.0)
                    s.axis_v[e, d] = ap
                else:
                    halfp = 0.5 * q[e, j]
                    up = m.axis[i] * wp.sin(halfp)
                    s.rot[e, k] = r * wp.quat(up[0], up[1], up[2], wp.cos(halfp))
                    s.pos[e, k] = x
                    s.axis_w[e, d] = ap
                    s.axis_v[e, d] = wp.cross(x, ap)
            else:
                ar = wp.quat_rotate(r, m.axis[i])
                halfr = 0.5 * q[e, j]
                ur = m.axis[i] * wp.sin(halfr)
                s.rot[e, k] = r * wp.quat(ur[0], ur[1], ur[2], wp.cos(halfr))
                s.pos[e, k] = x
                s.axis_w[e, d] = ar
                s.axis_v[e, d] = wp.cross(x, ar)
            if m.mass[i] > 0.0:
                s.com[e, k] = s.pos[e, k] + wp.quat_rotate(s.rot[e, k], m.com[i])

    @wp.func
    def velocities(e: int, m: Model, qd: wp.array2d(dtype=float), s: Scratch):
        zero = wp.vec3(0.0)
        s.w[e, 0] = zero
        s.v[e, 0] = zero
        s.acc_w[e, 0] = zero
        s.acc_v[e, 0] = zero
        s.torque[e, 0] = zero
        s.force[e, 0] = zero
        if wp.static(free_root):
            s.w[e, 1] = wp.vec3(qd[e, 0], qd[e, 1], qd[e, 2])
            s.v[e, 1] = wp.vec3(qd[e, 3], qd[e, 4], qd[e, 5])
            s.acc_w[e, 1] = zero
            s.acc_v[e, 1] = zero
        for i in range(wp.static(first), m.parent.shape[0]):
            k = i + 1
            d = m.qd_start[i]
            p = m.parent[i] + 1
            if wp.static(ball):
                if m.joint_type[i] == wp.static(BALL):
                    s.joint_w[e, k] = (
                        s.axis_w[e, d] * qd[e, d]
                        + s.axis_w[e, d + 1] * qd[e, d + 1]
                        + s.axis_w[e, d + 2] * qd[e, d + 2]
                    )
                    s.joint_v[e, k] = (
                        s.axis_v[e, d] * qd[e, d]
                        + s.axis_v[e, d + 1] * qd[e, d + 1]
                        + s.axis_v[e, d + 2] * qd[e, d + 2]
                    )
                else:
                    s.joint_w[e, k] = s.axis_w[e, d] * qd[e, d]
                    s.joint_v[e, k] = s.axis_v[e, d] * qd[e, d]
            else:
                s.joint_w[e, k] = s.axis_w[e, d] * qd[e, d]
                s.joint_v[e, k] = s.axis_v[e, d] * qd[e, d]
            jw = s.joint_w[e, k]
            jv = s.joint_v[e, k]
            w = s.w[e, p] + jw
            v = s.v[e, p] + jv
            s.w[e, k] = w
            s.v[e, k] = v
            s.acc_w[e, k] = s.acc_w[e, p] + wp.cross(w, jw)
            s.acc_v[e, k] = s.acc_v[e, p] + wp.cross(v, jw) + wp.cross(w, jv)

    @wp.func
    def inertial_wrenches(e: int, m: Model, s: Scratch):
        """I A + V x I V minus gravity, per link."""
        zero = wp.vec3(0.0)
        for i in range(m.parent.shape[0]):
            k = i + 1
            mass = m.mass[i]
            if mass > 0.0:
                if wp.static(ball):
                    # unnormalised ball quaternions (SNU resets) make the rotation non-orthogonal: Ad^T diag(I, m) Ad is
                    # then no rigid body's inertia and must be applied literally
                    rm = wp.quat_to_matrix(s.rot[e, k])
                    back = wp.transpose(rm)
                    cb = back * s.com[e, k]
                    wb = s.w[e, k]
                    vb = s.v[e, k]
                    wlb = back * wb
                    al = back * s.acc_w[e, k]
                    hb = (back * vb - wp.cross(cb, wlb)) * mass
                    fb = (back * s.acc_v[e, k] - wp.cross(cb, al)) * mass
                    momentum = rm * hb
                    angular = rm * (m.inertia[i] * wlb + wp.cross(cb, hb))
                    weight = m.gravity * mass
                    s.torque[e, k] = (
                        rm * (m.inertia[i] * al + wp.cross(cb, fb))
                        + wp.cross(wb, angular)
                        + wp.cross(vb, momentum)
                        - wp.cross(s.com[e, k], weight)
                    )
                    s.force[e, k] = rm * fb + wp.cross(wb, momentum) - weight
                else:
                    r = s.rot[e, k]
                    c = s.com[e, k]
                    w = s.w[e, k]
                    aw = s.acc_w[e, k]
                    wl = wp.quat_rotate_inv(r, w)
                    h = (s.v[e, k] + wp.cross(w, c)) * mass  # momentum
                    f = (s.acc_v[e, k] + wp.cross(aw, c) - m.gravity) * mass
                    spin = wp.quat_rotate(
                        r, m.inertia[i] * wp.quat_rotate_inv(r, aw) + wp.cross(wl, m.inertia[i] * wl)
                    )
                    s.torque[e, k] = spin + wp.cross(c, f) + wp.cross(w, wp.cross(c, h)) + wp.cross(s.v[e, k], h)
                    s.force[e, k] = f + wp.cross(w, h)
            else:
                s.torque[e, k] = zero
                s.force[e, k] = zero

    @wp.func
    def contact_wrenches(e: int, m: Model, s: Scratch):
        for c in range(m.contact_link.shape[0]):
            k = m.contact_link[c] + 1
            x = (
                s.pos[e, k]
                + wp.quat_rotate(s.rot[e, k], m.contact_point[c])
                - wp.vec3(0.0, m.contact_radius[c], 0.0)
            )
            if x[1] < 0.0:
                material = m.contact_material[c]
                depth = -x[1]
                u = s.v[e, k] + wp.cross(s.w[e, k], x)
                slip = wp.vec3(u[0], 0.0, u[2])
                normal = depth * (material[0] + material[1] * wp.max(-u[1], 0.0))
                friction = wp.min(material[2] * wp.length(slip), material[3] * material[0] * depth)
                f = wp.vec3(0.0, normal, 0.0) - wp.normalize(slip) * friction
                s.torque[e, k] = s.torque[e, k] - wp.cross(x, f)
                s.force[e, k] = s.force[e, k] - f

    @wp.func
    def muscle_wrenches(e: int, m: Model, tension: wp.array2d(dtype=float), s: Scratch):
        for g in range(m.segment_muscle.shape[0]):
            a = m.segment_links[g][0] + 1
            b = m.segment_links[g][1] + 1
            xa = s.pos[e, a] + wp.quat_rotate(s.rot[e, a], m.segment_start[g])
            xb = s.pos[e, b] + wp.quat_rotate(s.rot[e, b], m.segment_end[g])
            f = wp.normalize(xb - xa) * tension[e, m.segment_muscle[g]]
            s.torque[e, a] = s.torque[e, a] - wp.cross(xa, f)
            s.force[e, a] = s.force[e, a] - f
            s.torque[e, b] = s.torque[e, b] + wp.cross(xb, f)
            s.force[e, b] = s.force[e, b] + f

    @wp.func
    def generalized_forces(
        e: int,
        m: Model,
        q: wp.array2d(dtype=float),
        qd: wp.array2d(dtype=float),
        motor: wp.array2d(dtype=float),
        s: Scratch,
    ):
        n = m.parent.shape[0]
        for o in range(n):
            k = n - o
            p = m.parent[k - 1] + 1
            s.torque[e, p] = s.torque[e, p] + s.torque[e, k]
            s.force[e, p] = s.force[e, p] + s.force[e, k]
        for d in range(m.dof_link.shape[0]):
            link = m.dof_link[d] + 1
            x = q[e, m.dof_q[d]]
            limit = m.limit_stiffness[d] * (wp.max(m.lower[d] - x, 0.0) - wp.max(x - m.upper[d], 0.0))
            joint = motor[e, d] - m.stiffness[d] * (x - m.target[d]) - m.damping[d] * qd[e, d] + limit
            s.tau[e, d] = joint - wp.dot(s.axis_w[e, d], s.torque[e, link]) - wp.dot(s.axis_v[e, d], s.force[e, link])

    @wp.func
    def back_substitute(
        e: int, m: Model, L: wp.array3d(dtype=float), b: wp.array2d(dtype=float), x: wp.array2d(dtype=float)
    ):
        n = m.dof_parent.shape[0]
        for i in range(n):
            x[e, i] = b[e, i]
        for o in range(n):
            i = n - 1 - o
            j = m.dof_parent[i]
            xi = x[e, i]
            while j >= 0:
                x[e, j] = x[e, j] - L[e, i, j] * xi
                j = m.dof_parent[j]
        for i in range(n):
            acc = x[e, i] / L[e, i, i]
            j = m.dof_parent[i]
            while j >= 0:
                acc = acc - L[e, i, j] * x[e, j]
                j = m.dof_parent[j]
            x[e, i] = acc

    @wp.func
    def solve(e: int, m: Model, L: wp.array3d(dtype=float), s: Scratch):
        back_substitute(e, m, L, s.tau, s.qdd)

    @wp.func_grad(solve)
    def adj_solve(e: int, m: Model, L: wp.array3d(dtype=float), s: Scratch):
        """x = H^-1 b:  b_bar += y, H_bar -= y x^T + x y^T (lower triangle), with y = H^-1 x_bar."""
        back_substitute(e, m, L, s.qdd_grad, s.y)
        for i in range(m.dof_parent.shape[0]):
            s.qdd_grad[e, i] = 0.0
            s.tau_grad[e, i] = s.tau_grad[e, i] + s.y[e, i]
            s.H_grad[e, i, i] = s.H_grad[e, i, i] - s.y[e, i] * s.qdd[e, i]
            j = m.dof_parent[i]
            while j >= 0:
                s.H_grad[e, i, j] = s.H_grad[e, i, j] - s.y[e, i] * s.qdd[e, j] - s.y[e, j] * s.qdd[e, i]
                j = m.dof_parent[j]

    @wp.func
    def integrate(
        e: int,
        m: Model,
        dt: float,
        q: wp.array2d(dtype=float),
        qd: wp.array2d(dtype=float),
        s: Scratch,
        q1: wp.array2d(dtype=float),
        qd1: wp.array2d(dtype=float),
    ):
        for d in range(m.dof_parent.shape[0]):
            qd1[e, d] = qd[e, d] + dt * s.qdd[e, d]
        if wp.static(free_root):
            w = wp.vec3(qd1[e, 0], qd1[e, 1], qd1[e, 2])
            v = wp.vec3(qd1[e, 3], qd1[e, 4], qd1[e, 5])
            p = wp.vec3(q[e, 0], q[e, 1], q[e, 2])
            r = wp.quat(q[e, 3], q[e, 4], q[e, 5], q[e, 6])
            p1 = p + (v + wp.cross(w, p)) * dt
            r1 = wp.normalize(r + wp.quat(w[0], w[1], w[2], 0.0) * r * (0.5 * dt))
            for c in range(3):
                q1[e, c] = p1[c]
            for c in range(4):
                q1[e, 3 + c] = r1[c]
        for i in range(wp.static(first), m.parent.shape[0]):
            j = m.q_start[i]
            d = m.qd_start[i]
            if wp.static(ball):
                if m.joint_type[i] == wp.static(BALL):
                    rb = wp.quat(q[e, j], q[e, j + 1], q[e, j + 2], q[e, j + 3])
                    rb1 = wp.normalize(
                        rb + wp.quat(qd1[e, d], qd1[e, d + 1], qd1[e, d + 2], 0.0) * rb * (0.5 * dt)
                    )
                    for c in range(4):
                        q1[e, j + c] = rb1[c]
                else:
                    q1[e, j] = q[e, j] + dt * qd1[e, d]
            else:
                q1[e, j] = q[e, j] + dt * qd1[e, d]

    @wp.func
    def composite_mass_matrix(e: int, m: Model, s: Scratch):
        """Composite-rigid-body mass matrix plus armature, lower triangle of s.H; after kinematics()."""
        n = m.parent.shape[0]
        zero = wp.mat33(0.0)
        s.sum_I[e, 0] = zero
        s.sum_C[e, 0] = zero
        s.sum_M[e, 0] = zero
        for i in range(n):
            k = i + 1
            if m.mass[i] > 0.0:
                r = wp.quat_to_matrix(s.rot[e, k])
                back = wp.transpose(r)
                arm = wp.skew(back * s.com[e, k])
                s.sum_I[e, k] = r * (m.inertia[i] - arm * arm * m.mass[i]) * back
                s.sum_C[e, k] = r * arm * back * m.mass[i]
                s.sum_M[e, k] = r * back * m.mass[i]
            else:
                s.sum_I[e, k] = zero
                s.sum_C[e, k] = zero
                s.sum_M[e, k] = zero
        for o in range(n):
            b = n - o
            p = m.parent[b - 1] + 1
            s.sum_I[e, p] = s.sum_I[e, p] + s.sum_I[e, b]
            s.sum_C[e, p] = s.sum_C[e, p] + s.sum_C[e, b]
            s.sum_M[e, p] = s.sum_M[e, p] + s.sum_M[e, b]
        for pair in range(m.pair_dof.shape[0]):
            d = m.pair_dof[pair]
            a = m.pair_ancestor[pair]
            k2 = m.dof_link[d] + 1
            aw = s.axis_w[e, d]
            av = s.axis_v[e, d]
            torque = s.sum_I[e, k2] * aw + s.sum_C[e, k2] * av
            force = wp.transpose(s.sum_C[e, k2]) * aw + s.sum_M[e, k2] * av
            entry = wp.dot(s.axis_w[e, a], torque) + wp.dot(s.axis_v[e, a], force)
            if a == d:
                entry = entry + m.armature[d]
            s.H[e, d, a] = entry

    @wp.func
    def factorize(e: int, m: Model, H: wp.array3d(dtype=float), L: wp.array3d(dtype=float)):
        """Sparse H = L^T D L along the tree (Featherstone, section 6.5); D sits on L's diagonal."""
        n = m.dof_parent.shape[0]
        for i in range(n):
            L[e, i, i] = H[e, i, i]
            j = m.dof_parent[i]
            while j >= 0:
                L[e, i, j] = H[e, i, j]
                j = m.dof_parent[j]
        for o in range(n):
            k = n - 1 - o
            i = m.dof_parent[k]
            while i >= 0:
                a = L[e, k, i] / L[e, k, k]
                j = i
                while j >= 0:
                    L[e, i, j] = L[e, i, j] - L[e, k, j] * a
                    j = m.dof_parent[j]
                L[e, k, i] = a
                i = m.dof_parent[i]

    @wp.kernel(enable_backward=False, module="unique")
    def control_step(
        m: Model,
        dt: float,
        refresh: int,
        q: wp.array3d(dtype=float),
        qd: wp.array3d(dtype=float),
        motor: wp.array2d(dtype=float),
        tension: wp.array2d(dtype=float),
        L: wp.array4d(dtype=float),
        s: Scratch,
    ):
        e = wp.tid()
        for i in range(q.shape[0] - 1):
            kinematics(e, m, q[i], s)
            if i % refresh == 0:
                composite_mass_matrix(e, m, s)
                factorize(e, m, s.H, L[i // refresh])
            velocities(e, m, qd[i], s)
            inertial_wrenches(e, m, s)
            contact_wrenches(e, m, s)
            if wp.static(muscles):
                muscle_wrenches(e, m, tension, s)
            generalized_forces(e, m, q[i], qd[i], motor, s)
            solve(e, m, L[i // refresh], s)
            integrate(e, m, dt, q[i], qd[i], s, q[i + 1], qd[i + 1])

    @wp.kernel(module="unique")
    def substep(
        m: Model,
        dt: float,
        q: wp.array2d(dtype=float),
        qd: wp.array2d(dtype=float),
        motor: wp.array2d(dtype=float),
        tension: wp.array2d(dtype=float),
        L: wp.array3d(dtype=float),
        s: Scratch,
        q1: wp.array2d(dtype=float),
        qd1: wp.array2d(dtype=float),
    ):
        e = wp.tid()
        kinematics(e, m, q, s)
        velocities(e, m, qd, s)
        inertial_wrenches(e, m, s)
        contact_wrenches(e, m, s)
        if wp.static(muscles):
            muscle_wrenches(e, m, tension, s)
        generalized_forces(e, m, q, qd, motor, s)
        solve(e, m, L, s)
        integrate(e, m, dt, q, qd, s, q1, qd1)

    @wp.kernel(module="unique")
    def mass_matrix(m: Model, q: wp.array2d(dtype=float), s: Scratch):
        e = wp.tid()
        kinematics(e, m, q, s)
        composite_mass_matrix(e, m, s)

    return SimpleNamespace(control_step=control_step, substep=substep, mass_matrix=mass_matrix)
