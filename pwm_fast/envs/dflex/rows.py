"""What a step exchanges with torch (``Rows``), a task as the kernels see it (``Terms``), a tape's ends (``Bundles``).

``Stages`` is the description from which a simulator makes them: what surrounds the dynamics.
"""

from dataclasses import dataclass
from typing import Any

import warp as wp

from pwm_fast.envs.dflex.model import RobotModel


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
