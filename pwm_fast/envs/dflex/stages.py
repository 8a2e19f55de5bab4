"""A step before and after the dynamics, one environment at a time: actions, rewards, observations, ends of episodes.

Torch's rows [N, k] on one side, the bundles of the dynamics on the other: environment n is lane n % LANES of a group.
``tasks.py`` defines in torch what a task observes and rewards; ``Terms`` are its numbers, and the kernels here compute
the same with hand-written adjoints, so that a whole step leaves Python once. The world is moved to the robot on the way
in and back on the way out: p - o, v + omega x o.
"""

from functools import cache
from types import SimpleNamespace

import warp as wp

from pwm_fast.envs.dflex.lanes import COMPILER_FLAGS
from pwm_fast.envs.dflex.rows import Bundles, Rows, Terms

LARGEST_STATE = 1e6  # beyond this a state counts as broken and the episode ends
LARGEST_FLOAT = 3.4028234663852886e38


@cache
def kernels(lanes: int, free_root: bool, observes: str | None) -> SimpleNamespace:
    """``arrive``, ``depart`` and their adjoints; ``observes``: "walker", "hopper", or None for the bare dynamics.

    All take (first environment of the slice, terms, rows, tape, gradients of the tape, status [2]). ``status`` counts
    the slice's finished environments and its non-finite actions.
    """
    module = wp.get_module(f"{__name__}.{lanes}.{'free' if free_root else 'fixed'}.{observes}")
    wp.set_module_options({"cpu_compiler_flags": COMPILER_FLAGS, "enable_backward": False}, module)
    task, walker = observes is not None, observes == "walker"

    @wp.func
    def origin_of(n: int, r: Rows):
        o = wp.vec3()
        if r.recentre == 1 or (r.recentre == 2 and r.progress0[n] > wp.int64(0)):
            if wp.static(task):
                o[0] = r.q0[n, 0]
                if wp.static(free_root):
                    o[2] = r.q0[n, 2]
            else:
                o[0] = r.origin[n, 0]
                if wp.static(free_root):
                    o[2] = r.origin[n, 1]
        return o

    @wp.func
    def reward_of(n: int, c: Terms, obs: wp.array2d(dtype=float)):
        h = obs[n, 0]
        value = obs[n, 5] + c.slope * h + c.constant - c.tilt * obs[n, 1] * obs[n, 1]
        value += c.up * obs[n, c.attitude] + c.heading * obs[n, c.attitude + 1]
        if c.height_scale > 0.0:
            x = wp.clamp(h + c.height_offset, -1.0, c.height_limit)
            value += wp.where(x < 0.0, -200.0 * x * x, c.height_scale * x)
        return value

    @wp.func
    def reward_slope(h: float, c: Terms):
        """Derivative of the reward with respect to obs[0] = h."""
        x = h + c.height_offset
        slope = c.slope
        if c.height_scale > 0.0 and x >= -1.0 and x <= c.height_limit:
            slope += wp.where(x < 0.0, -400.0 * x, c.height_scale)
        return slope

    @wp.func
    def observe(
        n: int,
        c: Terms,
        q: wp.array2d(dtype=float),
        qd: wp.array2d(dtype=float),
        action: wp.array2d(dtype=float),
        show: int,
        obs: wp.array2d(dtype=float),
    ):
        nq, nqd = q.shape[1], qd.shape[1]
        if wp.static(walker):
            p, w = wp.vec3(q[n, 0], q[n, 1], q[n, 2]), wp.vec3(qd[n, 0], qd[n, 1], qd[n, 2])
            rot = wp.vec4(q[n, 3], q[n, 4], q[n, 5], q[n, 6])
            v = wp.vec3(qd[n, 3], qd[n, 4], qd[n, 5]) + wp.cross(w, p)
            to = wp.vec2(c.target - p[0], -p[2])
            forward = wp.vec2(wp.dot(rot, c.form_x * rot) - 1.0, wp.dot(rot, c.form_z * rot))
            obs[n, 0] = p[1]
            for k in range(4):
                obs[n, 1 + k] = rot[k]
            for k in range(3):
                obs[n, 5 + k] = v[k]
                obs[n, 8 + k] = w[k]
            for k in range(7, nq):
                obs[n, 4 + k] = q[n, k]
            for k in range(6, nqd):
                obs[n, nq - 2 + k] = 0.1 * qd[n, k]
            obs[n, c.attitude] = wp.dot(rot, c.form_up * rot) - 1.0
            obs[n, c.attitude + 1] = wp.dot(forward, to) / wp.max(wp.length(to), 1e-12)
            for k in range(obs.shape[1] - c.attitude - 2):
                obs[n, c.attitude + 2 + k] = wp.where(show > 0, action[n, k], 0.0)
        else:
            for k in range(1, nq):
                obs[n, k - 1] = q[n, k]
            for k in range(nqd):
                obs[n, nq - 1 + k] = qd[n, k]

    @wp.kernel(module=module)
    def arrive(first: int, c: Terms, r: Rows, t: Bundles, g: Bundles, status: wp.array(dtype=int)):
        """Clip and reward the action; state and command into the bundles, moved to the origin."""
        i = wp.tid()
        n, b, lane = first + i, i // lanes, i % lanes
        if i == 0:
            status[0] = 0
            status[1] = 0
        num_actions, driven = r.action.shape[1], t.driven.shape[1]
        cost = float(0.0)  # noqa: UP018 (Warp's way to declare a variable)
        for k in range(num_actions):
            x = r.action[n, k]
            if wp.static(task):
                if not (wp.abs(x) <= LARGEST_FLOAT):
                    status[1] = status[1] + 1
                x = wp.clamp(x, -1.0, 1.0)
                r.action1[n, k] = x
                cost += c.square * x * x + c.absolute * wp.abs(x)
                t.driven[b, driven - num_actions + k, lane] = x * c.full[k]
            else:
                t.driven[b, driven - num_actions + k, lane] = x
        if wp.static(task):
            r.reward[n] = reward_of(n, c, r.obs0) - cost
        o = origin_of(n, r)
        for k in range(r.q0.shape[1]):
            t.q0[b, k, lane] = r.q0[n, k]
        for k in range(r.qd0.shape[1]):
            t.qd0[b, k, lane] = r.qd0[n, k]
        t.origin[b, 0, lane] = o[0]
        t.origin[b, 1, lane] = o[2]
        t.q0[b, 0, lane] = r.q0[n, 0] - o[0]
        if wp.static(free_root):
            turn = wp.cross(wp.vec3(r.qd0[n, 0], r.qd0[n, 1], r.qd0[n, 2]), o)
            t.q0[b, 2, lane] = r.q0[n, 2] - o[2]
            for k in range(3):
                t.qd0[b, 3 + k, lane] = r.qd0[n, 3 + k] + turn[k]

    @wp.kernel(module=module)
    def depart(first: int, c: Terms, r: Rows, t: Bundles, g: Bundles, status: wp.array(dtype=int)):
        """The state back into the world; observe it; end episodes and begin new ones."""
        i = wp.tid()
        n, b, lane = first + i, i // lanes, i % lanes
        nq, nqd = r.q0.shape[1], r.qd0.shape[1]
        o = wp.vec3(t.origin[b, 0, lane], 0.0, t.origin[b, 1, lane])
        for k in range(nq):
            r.q1[n, k] = t.q1[b, k, lane]
        for k in range(nqd):
            r.qd1[n, k] = t.qd1[b, k, lane]
        r.q1[n, 0] = t.q1[b, 0, lane] + o[0]
        if wp.static(free_root):
            turn = wp.cross(wp.vec3(t.qd1[b, 0, lane], t.qd1[b, 1, lane], t.qd1[b, 2, lane]), o)
            r.q1[n, 2] = t.q1[b, 2, lane] + o[2]
            for k in range(3):
                r.qd1[n, 3 + k] = t.qd1[b, 3 + k, lane] - turn[k]
        if wp.static(task):
            broken = int(0)  # noqa: UP018, RUF046
            fell = int(0)  # noqa: UP018, RUF046
            for k in range(nq):
                r.final_q[n, k] = r.q1[n, k]
                if not (wp.abs(r.q1[n, k]) <= LARGEST_STATE):
                    broken = 1
            for k in range(nqd):
                if not (wp.abs(r.qd1[n, k]) <= LARGEST_STATE):
                    broken = 1
            observe(n, c, r.q1, r.qd1, r.action1, r.show, r.obs1)
            if broken > 0 or (c.early_termination > 0 and r.obs1[n, 0] < c.termination_height):
                fell = 1
            late = wp.where(r.progress0[n] + wp.int64(1) > wp.int64(c.episode_length - 1), 1, 0)
            r.terminated[n] = wp.uint8(fell)
            r.truncated[n] = wp.uint8(late)
            r.progress1[n] = r.progress0[n] + wp.int64(1)
            for k in range(r.obs1.shape[1]):
                r.final_obs[n, k] = wp.where(broken > 0, r.obs0[n, k], r.obs1[n, k])
            t.ended[i] = 0
            if fell + late > 0:
                status[0] = status[0] + 1
                t.ended[i] = 1 + broken
                r.progress1[n] = wp.int64(0)
                e = int(r.episode[n])
                for k in range(nq):
                    r.q1[n, k] = r.starts_q[n, e, k]
                for k in range(nqd):
                    r.qd1[n, k] = r.starts_qd[n, e, k]
                for k in range(r.action1.shape[1]):
                    r.action1[n, k] = 0.0
                observe(n, c, r.q1, r.qd1, r.action1, 0, r.obs1)

    @wp.func
    def g_obs(n: int, k: int, ended: int, r: Rows):
        """Gradient of the k-th entry of the observation before any new episode; not called for broken states."""
        return r.g_final_obs[n, k] + wp.where(ended == 0, r.g_obs1[n, k], 0.0)

    @wp.kernel(module=module)
    def depart_adjoint(first: int, c: Terms, r: Rows, t: Bundles, g: Bundles, status: wp.array(dtype=int)):
        """Gradients of state and observations into the bundles; all others begin at 0."""
        i = wp.tid()
        n, b, lane = first + i, i // lanes, i % lanes
        nq, nqd = r.q0.shape[1], r.qd0.shape[1]
        o = wp.vec3(t.origin[b, 0, lane], 0.0, t.origin[b, 1, lane])
        ended = int(0)  # noqa: UP018, RUF046
        if wp.static(task):
            ended = t.ended[i]
        for k in range(nq):
            g.q0[b, k, lane] = 0.0
            g.q1[b, k, lane] = wp.where(ended == 0, r.g_q1[n, k], 0.0)
        for k in range(nqd):
            g.qd0[b, k, lane] = 0.0
            g.qd1[b, k, lane] = wp.where(ended == 0, r.g_qd1[n, k], 0.0)
        for k in range(g.driven.shape[1]):
            g.driven[b, k, lane] = 0.0
        if wp.static(task):
            for k in range(r.g_action.shape[1]):
                r.g_action[n, k] = 0.0
            if wp.static(walker):
                if ended < 2:
                    p = wp.vec3(t.q1[b, 0, lane], t.q1[b, 1, lane], t.q1[b, 2, lane]) + o
                    w = wp.vec3(t.qd1[b, 0, lane], t.qd1[b, 1, lane], t.qd1[b, 2, lane])
                    rot = wp.vec4(t.q1[b, 3, lane], t.q1[b, 4, lane], t.q1[b, 5, lane], t.q1[b, 6, lane])
                    to = wp.vec2(c.target - p[0], -p[2])
                    length = wp.max(wp.length(to), 1e-12)
                    to = to / length
                    forward = wp.vec2(wp.dot(rot, c.form_x * rot) - 1.0, wp.dot(rot, c.form_z * rot))
                    g_up, g_heading = g_obs(n, c.attitude, ended, r), g_obs(n, c.attitude + 1, ended, r)
                    g_v = wp.vec3(g_obs(n, 5, ended, r), g_obs(n, 6, ended, r), g_obs(n, 7, ended, r))
                    g_to = (forward - to * wp.dot(forward, to)) * (g_heading / length)
                    g_p = wp.cross(g_v, w) + wp.vec3(-g_to[0], g_obs(n, 0, ended, r), -g_to[1])
                    g_w = wp.cross(p, g_v)
                    g_rot = 2.0 * (
                        c.form_up * rot * g_up + (c.form_x * rot * to[0] + c.form_z * rot * to[1]) * g_heading
                    )
                    for k in range(3):
                        g.q1[b, k, lane] = g.q1[b, k, lane] + g_p[k]
                        g.qd1[b, k, lane] = g.qd1[b, k, lane] + g_w[k] + g_obs(n, 8 + k, ended, r)
                        g.qd1[b, 3 + k, lane] = g.qd1[b, 3 + k, lane] + g_v[k]
                    for k in range(4):
                        g.q1[b, 3 + k, lane] = g.q1[b, 3 + k, lane] + g_rot[k] + g_obs(n, 1 + k, ended, r)
                    for k in range(7, nq):
                        g.q1[b, k, lane] = g.q1[b, k, lane] + g_obs(n, 4 + k, ended, r)
                    for k in range(6, nqd):
                        g.qd1[b, k, lane] = g.qd1[b, k, lane] + 0.1 * g_obs(n, nq - 2 + k, ended, r)
                    if r.show > 0:
                        for k in range(r.obs0.shape[1] - c.attitude - 2):
                            r.g_action[n, k] = g_obs(n, c.attitude + 2 + k, ended, r)
            else:
                if ended < 2:
                    for k in range(1, nq):
                        g.q1[b, k, lane] = g.q1[b, k, lane] + g_obs(n, k - 1, ended, r)
                    for k in range(nqd):
                        g.qd1[b, k, lane] = g.qd1[b, k, lane] + g_obs(n, nq - 1 + k, ended, r)
        if wp.static(free_root):
            turn = wp.cross(wp.vec3(g.qd1[b, 3, lane], g.qd1[b, 4, lane], g.qd1[b, 5, lane]), o)
            for k in range(3):
                g.qd1[b, k, lane] = g.qd1[b, k, lane] + turn[k]

    @wp.func
    def sane(x: float):
        return wp.where(wp.abs(x) <= LARGEST_FLOAT, x, 0.0)

    @wp.kernel(module=module)
    def arrive_adjoint(first: int, c: Terms, r: Rows, t: Bundles, g: Bundles, status: wp.array(dtype=int)):
        """Gradients out of the bundles; with a task, those of the reward added and non-finite ones set to 0."""
        i = wp.tid()
        n, b, lane = first + i, i // lanes, i % lanes
        if wp.static(free_root):
            o = wp.vec3(t.origin[b, 0, lane], 0.0, t.origin[b, 1, lane])
            turn = wp.cross(wp.vec3(g.qd0[b, 3, lane], g.qd0[b, 4, lane], g.qd0[b, 5, lane]), o)
            for k in range(3):
                g.qd0[b, k, lane] = g.qd0[b, k, lane] - turn[k]
        for k in range(r.g_q0.shape[1]):
            r.g_q0[n, k] = g.q0[b, k, lane]
            if wp.static(task):
                r.g_q0[n, k] = sane(g.q0[b, k, lane])
        for k in range(r.g_qd0.shape[1]):
            r.g_qd0[n, k] = g.qd0[b, k, lane]
            if wp.static(task):
                r.g_qd0[n, k] = sane(g.qd0[b, k, lane])
        num_actions, driven = r.g_action.shape[1], g.driven.shape[1]
        for k in range(num_actions):
            command = g.driven[b, driven - num_actions + k, lane]
            if wp.static(task):
                x = wp.clamp(r.action[n, k], -1.0, 1.0)
                cost = 2.0 * c.square * x + c.absolute * wp.where(x > 0.0, 1.0, wp.where(x < 0.0, -1.0, 0.0))
                total = r.g_action[n, k] + command * c.full[k] - r.g_reward[n] * cost
                r.g_action[n, k] = wp.where(wp.abs(r.action[n, k]) <= 1.0, sane(total), 0.0)
            else:
                r.g_action[n, k] = command
        if wp.static(task):
            for k in range(r.g_obs0.shape[1]):
                r.g_obs0[n, k] = 0.0
            r.g_obs0[n, 0] = r.g_reward[n] * reward_slope(r.obs0[n, 0], c)
            r.g_obs0[n, 1] = -2.0 * c.tilt * r.obs0[n, 1] * r.g_reward[n]
            r.g_obs0[n, 5] = r.g_reward[n]
            if wp.static(walker):
                r.g_obs0[n, c.attitude] = c.up * r.g_reward[n]
                r.g_obs0[n, c.attitude + 1] = c.heading * r.g_reward[n]

    return SimpleNamespace(arrive=arrive, depart=depart, depart_adjoint=depart_adjoint, arrive_adjoint=arrive_adjoint)
