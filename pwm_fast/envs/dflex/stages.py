"""A step before and after the dynamics, one environment at a time: actions, rewards, observations, ends of episodes.

Torch's rows [N, k] on one side, the bundles of the dynamics on the other: environment n is lane n % LANES of a group.
``tasks.py`` defines in torch what a task observes and rewards; ``Terms`` are its numbers, and the kernels here compute
the same with hand-written adjoints, so that a whole step leaves Python once. The world is moved to the robot on the way
in and back on the way out: p - o, v + omega x o.
"""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import warp as wp

from pwm_fast.envs.dflex.lanes import COMPILER_FLAGS
from pwm_fast.envs.dflex.model import RobotModel

LARGEST_STATE = 1e6  # beyond this a state counts as broken and the episode ends
LARGEST_FLOAT = 3.4028234663852886e38


@wp.struct
class Terms:
    """A task's numbers. reward = obs[5] + slope obs[0] + constant - tilt obs[1]^2 - square |a|^2 - absolute |a|_1
    + up obs[attitude] + heading obs[attitude + 1] + height_reward(obs[0] + height_offset)."""

    full: wp.array(dtype=float)  # torque or tension at action 1
    slope: float
    constant: float
    tilt: float
    square: float
    absolute: float
    up: float
    heading: float
    attitude: int
    height_offset: float
    height_limit: float
    height_scale: float  # 0: no height_reward
    form_up: wp.mat44  # symmetric; up = r^T F r - 1
    form_x: wp.mat44
    form_z: wp.mat44
    target: float
    termination_height: float
    early_termination: int
    episode_length: int


@wp.struct
class Rows:
    """One step of the whole batch as torch sees it, [N, .]: inputs, results, gradients of the results, of the inputs.

    ``starts``: the next [episodes] start states of each environment; a finished one continues from its ``episode``-th.
    """

    q0: wp.array2d(dtype=float)
    qd0: wp.array2d(dtype=float)
    action: wp.array2d(dtype=float)
    origin: wp.array2d(dtype=float)
    obs0: wp.array2d(dtype=float)
    progress0: wp.array(dtype=wp.int64)
    episode: wp.array(dtype=wp.int64)
    starts_q: wp.array3d(dtype=float)
    starts_qd: wp.array3d(dtype=float)
    q1: wp.array2d(dtype=float)
    qd1: wp.array2d(dtype=float)
    action1: wp.array2d(dtype=float)  # as applied; 0 where a new episode began
    obs1: wp.array2d(dtype=float)
    reward: wp.array(dtype=float)
    progress1: wp.array(dtype=wp.int64)
    final_q: wp.array2d(dtype=float)
    final_obs: wp.array2d(dtype=float)
    terminated: wp.array(dtype=wp.uint8)
    truncated: wp.array(dtype=wp.uint8)
    g_q1: wp.array2d(dtype=float)
    g_qd1: wp.array2d(dtype=float)
    g_obs1: wp.array2d(dtype=float)
    g_final_obs: wp.array2d(dtype=float)
    g_reward: wp.array(dtype=float)
    g_q0: wp.array2d(dtype=float)
    g_qd0: wp.array2d(dtype=float)
    g_action: wp.array2d(dtype=float)
    g_obs0: wp.array2d(dtype=float)
    show: int  # whether observations show the action
    recentre: int  # 0: no; 1: to ``origin``, or with a task to the robot's own place; 2: but not right after a reset


@wp.struct
class Bundles:
    """Ends of a slice's tape, [groups, k, LANES], and per environment what the adjoint must know of the step."""

    q0: wp.array3d(dtype=float)
    qd0: wp.array3d(dtype=float)
    q1: wp.array3d(dtype=float)
    qd1: wp.array3d(dtype=float)
    driven: wp.array3d(dtype=float)  # motor or tension; commands are its last entries
    origin: wp.array3d(dtype=float)
    ended: wp.array(dtype=int)  # 0: goes on; 1: a new episode began; 2: the same, and the state was broken


@dataclass(frozen=True)
class Stages:
    """What surrounds the dynamics. ``observes``: "walker", "hopper", or None for nothing: rows in, rows out.
    ``terms``: fields of ``Terms``. ``widths``: of action and obs, and how many start states ``starts`` holds."""

    observes: str | None = None
    terms: dict[str, Any] | None = None
    widths: tuple[int, int, int] = (1, 1, 1)

    def make_terms(self) -> Terms:
        terms = Terms()
        for name, value in {"full": [0.0], **(self.terms or {})}.items():
            var = Terms.vars[name].type
            setattr(terms, name, wp.array(value, dtype=float) if isinstance(var, wp.array) else var(value))
        return terms

    def rows(self, model: RobotModel) -> Rows:
        """Rows with the widths of everything and addresses of nothing."""
        action, obs, starts = self.widths
        widths = {
            "q": model.nq,
            "qd": model.nqd,
            "obs": obs,
            "action": action,
            "origin": 2 if model.has_free_root else 1,
        }
        rows = Rows()
        for name, var in Rows.vars.items():
            quantity = name.removeprefix("g_").removeprefix("final_").removeprefix("starts_").rstrip("01")
            if name.startswith("starts"):
                setattr(rows, name, wp.zeros((1, starts, widths[quantity]), dtype=float))
            elif quantity in widths:
                setattr(rows, name, wp.zeros((1, widths[quantity]), dtype=float))
            elif isinstance(var.type, wp.array):
                setattr(rows, name, wp.zeros(1, dtype=var.type.dtype))
        return rows


@cache
def kernels(lanes: int, free_root: bool, observes: str | None) -> SimpleNamespace:
    """``arrive``, ``depart`` and their adjoints; ``observes``: "walker", "hopper", or None for the bare dynamics.

    All take (first environment of the slice, terms, rows, tape, gradients of the tape, status [2]). ``status`` counts
    the slice's finished environments and its non-finite actions.
    """
    options = {"cpu_compiler_flags": COMPILER_FLAGS}
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

    @wp.kernel(enable_backward=False, module="unique", module_options=options)
    def arrive(first: int, c: Terms, r: Rows, t: Bundles, g: Bundles, status: wp.array(dtype=int)):
        """Clip and reward the action; state and command into the bundles, moved to the origin."""
        i = wp.tid()
        n, b, l = first + i, i // lanes, i % lanes
        if i == 0:
            status[0] = 0
            status[1] = 0
        num_actions, driven = r.action.shape[1], t.driven.shape[1]
        cost = float(0.0)
        for k in range(num_actions):
            x = r.action[n, k]
            if wp.static(task):
                if not (wp.abs(x) <= LARGEST_FLOAT):
                    status[1] = status[1] + 1
                x = wp.clamp(x, -1.0, 1.0)
                r.action1[n, k] = x
                cost += c.square * x * x + c.absolute * wp.abs(x)
                t.driven[b, driven - num_actions + k, l] = x * c.full[k]
            else:
                t.driven[b, driven - num_actions + k, l] = x
        if wp.static(task):
            r.reward[n] = reward_of(n, c, r.obs0) - cost
        o = origin_of(n, r)
        for k in range(r.q0.shape[1]):
            t.q0[b, k, l] = r.q0[n, k]
        for k in range(r.qd0.shape[1]):
            t.qd0[b, k, l] = r.qd0[n, k]
        t.origin[b, 0, l] = o[0]
        t.origin[b, 1, l] = o[2]
        t.q0[b, 0, l] = r.q0[n, 0] - o[0]
        if wp.static(free_root):
            turn = wp.cross(wp.vec3(r.qd0[n, 0], r.qd0[n, 1], r.qd0[n, 2]), o)
            t.q0[b, 2, l] = r.q0[n, 2] - o[2]
            for k in range(3):
                t.qd0[b, 3 + k, l] = r.qd0[n, 3 + k] + turn[k]

    @wp.kernel(enable_backward=False, module="unique", module_options=options)
    def depart(first: int, c: Terms, r: Rows, t: Bundles, g: Bundles, status: wp.array(dtype=int)):
        """The state back into the world; observe it; end episodes and begin new ones."""
        i = wp.tid()
        n, b, l = first + i, i // lanes, i % lanes
        nq, nqd = r.q0.shape[1], r.qd0.shape[1]
        o = wp.vec3(t.origin[b, 0, l], 0.0, t.origin[b, 1, l])
        for k in range(nq):
            r.q1[n, k] = t.q1[b, k, l]
        for k in range(nqd):
            r.qd1[n, k] = t.qd1[b, k, l]
        r.q1[n, 0] = t.q1[b, 0, l] + o[0]
        if wp.static(free_root):
            turn = wp.cross(wp.vec3(t.qd1[b, 0, l], t.qd1[b, 1, l], t.qd1[b, 2, l]), o)
            r.q1[n, 2] = t.q1[b, 2, l] + o[2]
            for k in range(3):
                r.qd1[n, 3 + k] = t.qd1[b, 3 + k, l] - turn[k]
        if wp.static(task):
            broken, fell = int(0), int(0)
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

    @wp.kernel(enable_backward=False, module="unique", module_options=options)
    def depart_adjoint(first: int, c: Terms, r: Rows, t: Bundles, g: Bundles, status: wp.array(dtype=int)):
        """Gradients of state and observations into the bundles; all others begin at 0."""
        i = wp.tid()
        n, b, l = first + i, i // lanes, i % lanes
        nq, nqd = r.q0.shape[1], r.qd0.shape[1]
        o = wp.vec3(t.origin[b, 0, l], 0.0, t.origin[b, 1, l])
        ended = int(0)
        if wp.static(task):
            ended = t.ended[i]
        for k in range(nq):
            g.q0[b, k, l] = 0.0
            g.q1[b, k, l] = wp.where(ended == 0, r.g_q1[n, k], 0.0)
        for k in range(nqd):
            g.qd0[b, k, l] = 0.0
            g.qd1[b, k, l] = wp.where(ended == 0, r.g_qd1[n, k], 0.0)
        for k in range(g.driven.shape[1]):
            g.driven[b, k, l] = 0.0
        if wp.static(task):
            for k in range(r.g_action.shape[1]):
                r.g_action[n, k] = 0.0
            if wp.static(walker):
                if ended < 2:
                    p = wp.vec3(t.q1[b, 0, l], t.q1[b, 1, l], t.q1[b, 2, l]) + o
                    w = wp.vec3(t.qd1[b, 0, l], t.qd1[b, 1, l], t.qd1[b, 2, l])
                    rot = wp.vec4(t.q1[b, 3, l], t.q1[b, 4, l], t.q1[b, 5, l], t.q1[b, 6, l])
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
                        g.q1[b, k, l] = g.q1[b, k, l] + g_p[k]
                        g.qd1[b, k, l] = g.qd1[b, k, l] + g_w[k] + g_obs(n, 8 + k, ended, r)
                        g.qd1[b, 3 + k, l] = g.qd1[b, 3 + k, l] + g_v[k]
                    for k in range(4):
                        g.q1[b, 3 + k, l] = g.q1[b, 3 + k, l] + g_rot[k] + g_obs(n, 1 + k, ended, r)
                    for k in range(7, nq):
                        g.q1[b, k, l] = g.q1[b, k, l] + g_obs(n, 4 + k, ended, r)
                    for k in range(6, nqd):
                        g.qd1[b, k, l] = g.qd1[b, k, l] + 0.1 * g_obs(n, nq - 2 + k, ended, r)
                    if r.show > 0:
                        for k in range(r.obs0.shape[1] - c.attitude - 2):
                            r.g_action[n, k] = g_obs(n, c.attitude + 2 + k, ended, r)
            else:
                if ended < 2:
                    for k in range(1, nq):
                        g.q1[b, k, l] = g.q1[b, k, l] + g_obs(n, k - 1, ended, r)
                    for k in range(nqd):
                        g.qd1[b, k, l] = g.qd1[b, k, l] + g_obs(n, nq - 1 + k, ended, r)
        if wp.static(free_root):
            turn = wp.cross(wp.vec3(g.qd1[b, 3, l], g.qd1[b, 4, l], g.qd1[b, 5, l]), o)
            for k in range(3):
                g.qd1[b, k, l] = g.qd1[b, k, l] + turn[k]

    @wp.func
    def sane(x: float):
        return wp.where(wp.abs(x) <= LARGEST_FLOAT, x, 0.0)

    @wp.kernel(enable_backward=False, module="unique", module_options=options)
    def arrive_adjoint(first: int, c: Terms, r: Rows, t: Bundles, g: Bundles, status: wp.array(dtype=int)):
        """Gradients out of the bundles; with a task, those of the reward added and non-finite ones set to 0."""
        i = wp.tid()
        n, b, l = first + i, i // lanes, i % lanes
        if wp.static(free_root):
            o = wp.vec3(t.origin[b, 0, l], 0.0, t.origin[b, 1, l])
            turn = wp.cross(wp.vec3(g.qd0[b, 3, l], g.qd0[b, 4, l], g.qd0[b, 5, l]), o)
            for k in range(3):
                g.qd0[b, k, l] = g.qd0[b, k, l] - turn[k]
        for k in range(r.g_q0.shape[1]):
            r.g_q0[n, k] = g.q0[b, k, l]
            if wp.static(task):
                r.g_q0[n, k] = sane(g.q0[b, k, l])
        for k in range(r.g_qd0.shape[1]):
            r.g_qd0[n, k] = g.qd0[b, k, l]
            if wp.static(task):
                r.g_qd0[n, k] = sane(g.qd0[b, k, l])
        num_actions, driven = r.g_action.shape[1], g.driven.shape[1]
        for k in range(num_actions):
            command = g.driven[b, driven - num_actions + k, l]
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
