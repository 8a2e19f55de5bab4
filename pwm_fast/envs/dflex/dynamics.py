"""Batched, differentiable articulated-body dynamics on Warp (Featherstone, Rigid Body Dynamics Algorithms, ch. 5-6).

One thread per bundle of environments (lanes/). All spatial quantities are (angular, linear) pairs about the world
origin, so twists, wrenches and composite inertias of a subtree add without shifting, and a mass matrix stays meaningful
when it is held over several substeps.

``kernels(features, lanes)`` compiles one module per kind of robot: what a robot lacks (ball joints, muscles, prismatic
joints, a free root) is not compiled in.
"""

from functools import cache
from types import SimpleNamespace

import warp as wp

from pwm_fast.envs.dflex.lanes import COMPILER_FLAGS, algebra
from pwm_fast.envs.dflex.model import BALL, PRISMATIC, REVOLUTE
from pwm_fast.envs.dflex.structs import Features, Model, scratch_struct


@cache
def kernels(features: Features, lanes: int) -> SimpleNamespace:
    """``control_step`` (forward only), ``substep`` and ``mass_matrix`` (for the adjoint) of robots with these features.

    Arguments of all stages: g, the bundle of environments; t, its row of the scratch arrays.
    """
    a = algebra(lanes)
    Scratch = scratch_struct(lanes)
    Lane, Vec, Sym = a.Lane, a.Vec, a.Sym
    free_root, prismatic, ball = features.free_root, features.prismatic, features.ball
    muscles, turned_frames = features.muscles, features.turned_frames
    first = 1 if free_root else 0  # the free root is peeled off every loop over links
    unit_x, unit_y, unit_z = wp.vec3(1.0, 0.0, 0.0), wp.vec3(0.0, 1.0, 0.0), wp.vec3(0.0, 0.0, 1.0)
    options = {"cpu_compiler_flags": COMPILER_FLAGS}

    @wp.func
    def kinematics(g: int, t: int, m: Model, q: wp.array2d(dtype=Lane), s: Scratch):
        one = Lane(1.0)
        zero = Lane(0.0)
        s.rot[t, 0] = a.quat(zero, zero, zero, one)
        s.pos[t, 0] = Vec()
        if wp.static(free_root):
            s.pos[t, 1] = a.vec(q[g, 0], q[g, 1], q[g, 2])
            s.rot[t, 1] = a.quat(q[g, 3], q[g, 4], q[g, 5], q[g, 6])
            s.com[t, 1] = s.pos[t, 1] + a.rotate_point(s.rot[t, 1], m.com[0])
            s.axis_w[t, 0] = a.vec(one, zero, zero)
            s.axis_w[t, 1] = a.vec(zero, one, zero)
            s.axis_w[t, 2] = a.vec(zero, zero, one)
            s.axis_v[t, 3] = a.vec(one, zero, zero)
            s.axis_v[t, 4] = a.vec(zero, one, zero)
            s.axis_v[t, 5] = a.vec(zero, zero, one)
            for c in range(wp.static(3)):
                s.axis_v[t, c] = Vec()
                s.axis_w[t, 3 + c] = Vec()
        for i in range(first, m.parent.shape[0]):
            k = i + 1
            j = m.q_start[i]
            d = m.qd_start[i]
            p = m.parent[i] + 1
            s.pos[t, k] = s.pos[t, p]
            if m.offset[i] > 0:
                s.pos[t, k] = s.pos[t, k] + a.rotate_point(s.rot[t, p], m.frame_pos[i])
            if wp.static(turned_frames):
                s.frame[t, k] = a.product_constant(s.rot[t, p], m.frame_rot[i])
            else:
                s.frame[t, k] = s.rot[t, p]
            if m.joint_type[i] == REVOLUTE:
                s.axis_w[t, d] = a.rotate_point(s.frame[t, k], m.axis[i])
                s.axis_v[t, d] = a.cross(s.pos[t, k], s.axis_w[t, d])
                s.rot[t, k] = a.hinge(s.frame[t, k], m.axis[i], q[g, j])
            if wp.static(ball):
                if m.joint_type[i] == BALL:
                    s.axis_w[t, d] = a.rotate_point(s.frame[t, k], unit_x)
                    s.axis_w[t, d + 1] = a.rotate_point(s.frame[t, k], unit_y)
                    s.axis_w[t, d + 2] = a.rotate_point(s.frame[t, k], unit_z)
                    s.axis_v[t, d] = a.cross(s.pos[t, k], s.axis_w[t, d])
                    s.axis_v[t, d + 1] = a.cross(s.pos[t, k], s.axis_w[t, d + 1])
                    s.axis_v[t, d + 2] = a.cross(s.pos[t, k], s.axis_w[t, d + 2])
                    turned = a.quat(q[g, j], q[g, j + 1], q[g, j + 2], q[g, j + 3])
                    s.rot[t, k] = a.product(s.frame[t, k], turned)
            if wp.static(prismatic):
                if m.joint_type[i] == PRISMATIC:
                    s.axis_w[t, d] = Vec()
                    s.axis_v[t, d] = a.rotate_point(s.frame[t, k], m.axis[i])
                    s.rot[t, k] = s.frame[t, k]
                    s.pos[t, k] = s.pos[t, k] + a.scale(s.axis_v[t, d], q[g, j])
            if m.mass[i] > 0.0:
                s.com[t, k] = s.pos[t, k] + a.rotate_point(s.rot[t, k], m.com[i])

    @wp.func
    def velocities(g: int, t: int, m: Model, qd: wp.array2d(dtype=Lane), s: Scratch):
        s.w[t, 0] = Vec()
        s.v[t, 0] = Vec()
        s.acc_w[t, 0] = Vec()
        s.acc_v[t, 0] = Vec()
        if wp.static(free_root):
            s.w[t, 1] = a.vec(qd[g, 0], qd[g, 1], qd[g, 2])
            s.v[t, 1] = a.vec(qd[g, 3], qd[g, 4], qd[g, 5])
            s.acc_w[t, 1] = Vec()
            s.acc_v[t, 1] = Vec()
        for i in range(first, m.parent.shape[0]):
            k = i + 1
            d = m.qd_start[i]
            p = m.parent[i] + 1
            s.joint_w[t, k] = a.scale(s.axis_w[t, d], qd[g, d])
            s.joint_v[t, k] = a.scale(s.axis_v[t, d], qd[g, d])
            if wp.static(ball):
                if m.joint_type[i] == BALL:
                    s.joint_w[t, k] = (
                        s.joint_w[t, k]
                        + a.scale(s.axis_w[t, d + 1], qd[g, d + 1])
                        + a.scale(s.axis_w[t, d + 2], qd[g, d + 2])
                    )
                    s.joint_v[t, k] = (
                        s.joint_v[t, k]
                        + a.scale(s.axis_v[t, d + 1], qd[g, d + 1])
                        + a.scale(s.axis_v[t, d + 2], qd[g, d + 2])
                    )
            jw = s.joint_w[t, k]
            jv = s.joint_v[t, k]
            w = s.w[t, p] + jw
            v = s.v[t, p] + jv
            s.w[t, k] = w
            s.v[t, k] = v
            s.acc_w[t, k] = s.acc_w[t, p] + a.cross(w, jw)
            s.acc_v[t, k] = s.acc_v[t, p] + a.cross(v, jw) + a.cross(w, jv)

    @wp.func
    def inertial_wrenches(g: int, t: int, m: Model, s: Scratch):
        """I A + V x I V minus gravity, per link."""
        s.torque[t, 0] = Vec()
        s.force[t, 0] = Vec()
        for i in range(m.parent.shape[0]):
            k = i + 1
            mass = m.mass[i]
            if mass > 0.0:
                if wp.static(ball):
                    # unnormalised ball quaternions (SNU resets) make the rotation non-orthogonal: Ad^T diag(I, m) Ad is
                    # then no rigid body's inertia and must be applied literally
                    r = a.matrix(s.rot[t, k])
                    com = a.transposed_times(r, s.com[t, k])
                    omega = a.transposed_times(r, s.w[t, k])
                    alpha = a.transposed_times(r, s.acc_w[t, k])
                    local = (a.transposed_times(r, s.v[t, k]) - a.cross(com, omega)) * mass
                    push = (a.transposed_times(r, s.acc_v[t, k]) - a.cross(com, alpha)) * mass
                    momentum = a.times(r, local)
                    angular = a.times(r, a.constant_times(m.inertia[i], omega) + a.cross(com, local))
                    weight = a.shift(Vec(), m.gravity * mass)
                    s.torque[t, k] = (
                        a.times(r, a.constant_times(m.inertia[i], alpha) + a.cross(com, push))
                        + a.cross(s.w[t, k], angular)
                        + a.cross(s.v[t, k], momentum)
                        - a.cross(s.com[t, k], weight)
                    )
                    s.force[t, k] = a.times(r, push) + a.cross(s.w[t, k], momentum) - weight
                else:
                    q = s.rot[t, k]
                    c = s.com[t, k]
                    w = s.w[t, k]
                    aw = s.acc_w[t, k]
                    spin = a.rotate_back(q, w)
                    v = s.v[t, k] + a.cross(w, c)
                    f = a.shift(s.acc_v[t, k] + a.cross(aw, c) + a.cross(w, v), -m.gravity) * mass
                    couple = a.constant_times(m.inertia[i], a.rotate_back(q, aw)) + a.cross(
                        spin, a.constant_times(m.inertia[i], spin)
                    )
                    s.torque[t, k] = a.rotate(q, couple) + a.cross(c, f)
                    s.force[t, k] = f
            else:
                s.torque[t, k] = Vec()
                s.force[t, k] = Vec()

    @wp.func
    def contact_wrenches(g: int, t: int, m: Model, s: Scratch):
        for c in range(m.contact_link.shape[0]):
            k = m.contact_link[c] + 1
            if a.near_ground(s.rot[t, k], s.pos[t, k], m.contact_point[c], m.contact_radius[c]) > 0:
                arm = a.rotate_point(s.rot[t, k], m.contact_point[c])
                x = a.shift(s.pos[t, k] + arm, wp.vec3(0.0, -m.contact_radius[c], 0.0))
                u = s.v[t, k] + a.cross(s.w[t, k], x)
                f = a.ground_force(x, u, m.contact_material[c])
                s.torque[t, k] = s.torque[t, k] - a.cross(x, f)
                s.force[t, k] = s.force[t, k] - f

    @wp.func
    def muscle_wrenches(g: int, t: int, m: Model, tension: wp.array2d(dtype=Lane), s: Scratch):
        for n in range(m.segment_muscle.shape[0]):
            k = m.segment_links[n][0] + 1
            h = m.segment_links[n][1] + 1
            x = s.pos[t, k] + a.rotate_point(s.rot[t, k], m.segment_start[n])
            y = s.pos[t, h] + a.rotate_point(s.rot[t, h], m.segment_end[n])
            f = a.along(y - x, tension[g, m.segment_muscle[n]])
            s.torque[t, k] = s.torque[t, k] - a.cross(x, f)
            s.force[t, k] = s.force[t, k] - f
            s.torque[t, h] = s.torque[t, h] + a.cross(y, f)
            s.force[t, h] = s.force[t, h] + f

    @wp.func
    def generalized_forces(
        g: int,
        t: int,
        m: Model,
        q: wp.array2d(dtype=Lane),
        qd: wp.array2d(dtype=Lane),
        motor: wp.array2d(dtype=Lane),
        s: Scratch,
    ):
        n = m.parent.shape[0]
        for o in range(n):
            k = n - o
            p = m.parent[k - 1] + 1
            if p > 0:
                s.torque[t, p] = s.torque[t, p] + s.torque[t, k]
                s.force[t, p] = s.force[t, p] + s.force[t, k]
        for d in range(m.dof_link.shape[0]):
            k = m.dof_link[d] + 1
            bias = a.power(s.axis_w[t, d], s.torque[t, k], s.axis_v[t, d], s.force[t, k])
            spring = a.spring_force(q[g, m.dof_q[d]], m.springs[d], m.limit_stiffness[d])
            s.tau[t, d] = motor[g, d] + spring - qd[g, d] * m.damping[d] - bias

    @wp.func
    def solve(r: int, g: int, t: int, m: Model, L: wp.array3d(dtype=Lane), s: Scratch):
        a.back_substitute(r, g, t, m.row, m.ancestor, L, s.tau, s.qdd)

    @wp.func_grad(solve)
    def adj_solve(r: int, g: int, t: int, m: Model, L: wp.array3d(dtype=Lane), s: Scratch):
        a.back_substitute(r, g, t, m.row, m.ancestor, L, s.qdd_grad, s.y)
        a.spread_solve_gradient(g, t, m.row, m.ancestor, s.qdd, s.y, s.qdd_grad, s.tau_grad, s.H_grad)

    @wp.func
    def integrate(
        g: int,
        t: int,
        m: Model,
        dt: float,
        q: wp.array2d(dtype=Lane),
        qd: wp.array2d(dtype=Lane),
        s: Scratch,
        q1: wp.array2d(dtype=Lane),
        qd1: wp.array2d(dtype=Lane),
    ):
        for d in range(m.dof_link.shape[0]):
            qd1[g, d] = qd[g, d] + s.qdd[t, d] * dt
        if wp.static(free_root):
            w = a.vec(qd1[g, 0], qd1[g, 1], qd1[g, 2])
            v = a.vec(qd1[g, 3], qd1[g, 4], qd1[g, 5])
            p = a.vec(q[g, 0], q[g, 1], q[g, 2])
            p1 = p + (v + a.cross(w, p)) * dt
            r1 = a.turn(a.quat(q[g, 3], q[g, 4], q[g, 5], q[g, 6]), w, 0.5 * dt)
            q1[g, 0] = p1[0]
            q1[g, 1] = p1[1]
            q1[g, 2] = p1[2]
            q1[g, 3] = r1[0]
            q1[g, 4] = r1[1]
            q1[g, 5] = r1[2]
            q1[g, 6] = r1[3]
        for i in range(first, m.parent.shape[0]):
            j = m.q_start[i]
            d = m.qd_start[i]
            if m.joint_type[i] != BALL:
                q1[g, j] = q[g, j] + qd1[g, d] * dt
            if wp.static(ball):
                if m.joint_type[i] == BALL:
                    rate = a.vec(qd1[g, d], qd1[g, d + 1], qd1[g, d + 2])
                    b1 = a.turn(a.quat(q[g, j], q[g, j + 1], q[g, j + 2], q[g, j + 3]), rate, 0.5 * dt)
                    q1[g, j] = b1[0]
                    q1[g, j + 1] = b1[1]
                    q1[g, j + 2] = b1[2]
                    q1[g, j + 3] = b1[3]

    @wp.func
    def composite_mass_matrix(g: int, t: int, m: Model, s: Scratch):
        """Composite-rigid-body mass matrix plus armature, packed in s.H; after kinematics()."""
        n = m.parent.shape[0]
        for i in range(n):
            k = i + 1
            if m.mass[i] > 0.0:
                r = a.matrix(s.rot[t, k])
                if wp.static(ball):
                    com = a.transposed_times(r, s.com[t, k])
                    s.inertia[t, k] = a.congruence(r, a.parallel_axis_constant(m.inertia[i], m.mass[i], com))
                    s.moment[t, k] = a.cofactor_times(r, com) * m.mass[i]
                    s.spread_mass[t, k] = (
                        a.congruence(r, a.parallel_axis_constant(wp.identity(3, float), 0.0, com)) * m.mass[i]
                    )
                else:
                    # the very com of the first moment: another rounding of it would not cancel in what legs see of H
                    own = a.congruence_constant(r, m.inertia[i])
                    s.inertia[t, k] = a.parallel_axis(own, m.mass[i], s.com[t, k])
                    s.moment[t, k] = s.com[t, k] * m.mass[i]
            else:
                s.inertia[t, k] = Sym()
                s.moment[t, k] = Vec()
                if wp.static(ball):
                    s.spread_mass[t, k] = Sym()
        for o in range(n):
            k = n - o
            p = m.parent[k - 1] + 1
            if p > 0:
                s.inertia[t, p] = s.inertia[t, p] + s.inertia[t, k]
                s.moment[t, p] = s.moment[t, p] + s.moment[t, k]
                if wp.static(ball):
                    s.spread_mass[t, p] = s.spread_mass[t, p] + s.spread_mass[t, k]
        for d in range(m.dof_link.shape[0]):
            k = m.dof_link[d] + 1
            w = s.axis_w[t, d]
            v = s.axis_v[t, d]
            s.dof_torque[t, d] = a.symmetric_times(s.inertia[t, k], w) + a.cross(s.moment[t, k], v)
            if wp.static(ball):
                s.dof_force[t, d] = a.symmetric_times(s.spread_mass[t, k], v) - a.cross(s.moment[t, k], w)
            else:
                s.dof_force[t, d] = v * m.subtree_mass[m.dof_link[d]] - a.cross(s.moment[t, k], w)
        for e in range(m.ancestor.shape[0]):
            d = m.entry_dof[e]
            b = m.ancestor[e]
            entry = a.power(s.axis_w[t, b], s.dof_torque[t, d], s.axis_v[t, b], s.dof_force[t, d])
            if b == d:
                s.H[g, e] = entry + Lane(m.armature[d])
            else:
                s.H[g, e] = entry

    @wp.kernel(enable_backward=False, module="unique", module_options=options)
    def control_step(
        m: Model,
        dt: float,
        refresh: int,
        q: wp.array3d(dtype=Lane),
        qd: wp.array3d(dtype=Lane),
        motor: wp.array2d(dtype=Lane),
        tension: wp.array2d(dtype=Lane),
        L: wp.array3d(dtype=Lane),
        s: Scratch,
    ):
        g = wp.tid()
        t = wp.min(g, s.tau.shape[0] - 1)
        for i in range(q.shape[0] - 1):
            kinematics(g, t, m, q[i], s)
            if i % refresh == 0:
                composite_mass_matrix(g, t, m, s)
                a.factorize(i // refresh, g, m.row, m.ancestor, s.H, L)
            velocities(g, t, m, qd[i], s)
            inertial_wrenches(g, t, m, s)
            contact_wrenches(g, t, m, s)
            if wp.static(muscles):
                muscle_wrenches(g, t, m, tension, s)
            generalized_forces(g, t, m, q[i], qd[i], motor, s)
            solve(i // refresh, g, t, m, L, s)
            integrate(g, t, m, dt, q[i], qd[i], s, q[i + 1], qd[i + 1])

    @wp.kernel(module="unique", module_options=options)
    def substep(
        m: Model,
        dt: float,
        r: int,
        q: wp.array2d(dtype=Lane),
        qd: wp.array2d(dtype=Lane),
        motor: wp.array2d(dtype=Lane),
        tension: wp.array2d(dtype=Lane),
        L: wp.array3d(dtype=Lane),
        s: Scratch,
        q1: wp.array2d(dtype=Lane),
        qd1: wp.array2d(dtype=Lane),
    ):
        g = wp.tid()
        t = wp.min(g, s.tau.shape[0] - 1)
        kinematics(g, t, m, q, s)
        velocities(g, t, m, qd, s)
        inertial_wrenches(g, t, m, s)
        contact_wrenches(g, t, m, s)
        if wp.static(muscles):
            muscle_wrenches(g, t, m, tension, s)
        generalized_forces(g, t, m, q, qd, motor, s)
        solve(r, g, t, m, L, s)
        integrate(g, t, m, dt, q, qd, s, q1, qd1)

    @wp.kernel(module="unique", module_options=options)
    def mass_matrix(m: Model, q: wp.array2d(dtype=Lane), s: Scratch):
        g = wp.tid()
        t = wp.min(g, s.tau.shape[0] - 1)
        kinematics(g, t, m, q, s)
        composite_mass_matrix(g, t, m, s)

    return SimpleNamespace(control_step=control_step, substep=substep, mass_matrix=mass_matrix)
