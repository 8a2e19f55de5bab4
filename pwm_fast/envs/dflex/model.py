"""Robots as tables: links, joints, inertia, ground contacts and muscles, read from ``pwm_fast/assets/dflex/*.npz``.

Links on fixed joints are welded to their nearest moving ancestor when a model is loaded (ANYmal: 76 links become 13),
so the dynamics know prismatic, revolute and ball joints and one free joint at the root.

Conventions: transforms are (x, y, z, qx, qy, qz, qw); the world is y-up; lengths in m, masses in kg, angles in rad.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

PRISMATIC, REVOLUTE, BALL, FIXED, FREE = 0, 1, 2, 3, 4
NUM_Q = np.array([1, 1, 4, 0, 7])  # coordinates of each joint type
NUM_QD = np.array([1, 1, 3, 0, 6])  # degrees of freedom of each joint type
SPHERE, BOX, CAPSULE = 0, 1, 2
ASSETS = Path(__file__).resolve().parents[2] / "assets" / "dflex"

INTEGER_TABLES = frozenset(
    "joint_type joint_parent shape_body shape_geo_type contact_body0 contact_material muscle_start muscle_links".split()
)
LINK_TABLES = (
    "joint_type joint_parent joint_X_pj joint_X_cm joint_axis joint_target_ke joint_target_kd joint_limit_ke "
    "joint_limit_kd body_I_m"
).split()
COORDINATE_TABLES = "joint_target joint_limit_lower joint_limit_upper start_joint_q".split()
OTHER_TABLES = (
    "joint_armature gravity shape_body shape_geo_type shape_geo_scale shape_transform shape_materials contact_body0 "
    "contact_point0 contact_dist contact_material"
).split()


class ModelError(ValueError):
    """A model file that is missing, incomplete or describes no robot this simulator can run."""


@dataclass(frozen=True)
class Segments:
    """Stretches of muscle between two different links; ``links`` [n, 2], end points [n, 3] in link coordinates."""

    muscle: np.ndarray
    links: np.ndarray
    start: np.ndarray
    end: np.ndarray


@dataclass(frozen=True)
class Shapes:
    """Collision shapes, for pictures: link [n], kind [n], size [n, 3], transform in the link [n, 7]."""

    link: np.ndarray
    kind: np.ndarray
    size: np.ndarray
    transform: np.ndarray


@dataclass(frozen=True)
class RobotModel:
    """One robot, in float32 and int32; [L] links, [D] degrees of freedom, [C] contact points, [Q] coordinates."""

    name: str
    joint_type: np.ndarray  # [L]
    parent: np.ndarray  # [L], -1 for the world
    q_start: np.ndarray  # [L]
    qd_start: np.ndarray  # [L]
    frame_pos: np.ndarray  # [L, 3] joint frame in the parent link
    frame_rot: np.ndarray  # [L, 4]
    axis: np.ndarray  # [L, 3] local unit axis
    mass: np.ndarray  # [L]
    com: np.ndarray  # [L, 3]
    inertia: np.ndarray  # [L, 3, 3] about the centre of mass, link axes
    dof_link: np.ndarray  # [D]
    dof_parent: np.ndarray  # [D] previous degree of freedom on the way to the root, -1 at its end
    dof_q: np.ndarray  # [D] the coordinate its spring and limits act on
    stiffness: np.ndarray  # [D]
    target: np.ndarray  # [D]
    damping: np.ndarray  # [D] joint damping plus limit damping: the latter always acts
    limit_stiffness: np.ndarray  # [D]
    lower: np.ndarray  # [D]
    upper: np.ndarray  # [D]
    armature: np.ndarray  # [D]
    contact_link: np.ndarray  # [C]
    contact_point: np.ndarray  # [C, 3]
    contact_radius: np.ndarray  # [C]
    contact_material: np.ndarray  # [C, 4] ke, kd, kf, mu
    gravity: np.ndarray  # [3]
    start_q: np.ndarray  # [Q]
    tension: np.ndarray  # [M] tension of each muscle at full activation, N
    segments: Segments
    shapes: Shapes

    @property
    def num_links(self) -> int:
        return len(self.parent)

    @property
    def nq(self) -> int:
        return len(self.start_q)

    @property
    def nqd(self) -> int:
        return len(self.dof_link)

    @property
    def num_commands(self) -> int:
        """At most: one per muscle, or per freedom of a robot without muscles."""
        return len(self.tension) or self.nqd

    @property
    def has_free_root(self) -> bool:
        return bool(self.joint_type[0] == FREE)

    @property
    def has_ball_joints(self) -> bool:
        return bool((self.joint_type == BALL).any())


def rotation_matrix(quat: np.ndarray) -> np.ndarray:
    """[4] unit quaternion xyzw -> [3, 3]."""
    x, y, z, w = np.asarray(quat, np.float64)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def compose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Product of two transforms [7]."""
    ua, wa, ub, wb = a[3:6], a[6], b[3:6], b[6]
    position = a[:3] + rotation_matrix(a[3:]) @ b[:3]
    return np.concatenate([position, wa * ub + wb * ua + np.cross(ua, ub), [wa * wb - ua @ ub]])


def _validated(tables: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    missing = [key for key in (*LINK_TABLES, *COORDINATE_TABLES, *OTHER_TABLES) if key not in tables]
    if missing:
        raise ModelError(f"model '{name}' lacks the tables {missing}; reinstall pwm_fast or rebuild the file")
    for key, value in tables.items():
        if not np.isfinite(value).all():
            raise ModelError(f"model '{name}': table '{key}' holds non-finite numbers")
    t = {k: v.astype(np.int32) if k in INTEGER_TABLES else v.astype(np.float64) for k, v in tables.items()}
    links, kinds = len(t["joint_type"]), t["joint_type"]
    for key in LINK_TABLES:
        if len(t[key]) != links:
            raise ModelError(f"model '{name}': table '{key}' has {len(t[key])} rows, expected one per link ({links})")
    if ((kinds < 0) | (kinds > FREE)).any():
        raise ModelError(f"model '{name}': joint types must be 0..4, got {sorted(set(kinds.tolist()))}")
    if (kinds[1:] == FREE).any():
        raise ModelError(f"model '{name}': a free joint is supported at the root (link 0) only")
    if (t["joint_parent"] >= np.arange(links)).any() or (t["joint_parent"] < -1).any():
        raise ModelError(f"model '{name}': every parent must come before its child and be >= -1")
    for key in COORDINATE_TABLES:
        if len(t[key]) < NUM_Q[kinds].sum():
            raise ModelError(f"model '{name}': table '{key}' has {len(t[key])} entries, needs {NUM_Q[kinds].sum()}")
    if len(t["joint_armature"]) != NUM_QD[kinds].sum():
        raise ModelError(f"model '{name}': 'joint_armature' needs {NUM_QD[kinds].sum()} entries, one per freedom")
    for key in ("contact_body0", "shape_body", "muscle_links"):
        if key in t and len(t[key]) and not 0 <= t[key].min() <= t[key].max() < links:
            raise ModelError(f"model '{name}': table '{key}' names a link outside 0..{links - 1}")
    return t


def merge_fixed_links(tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same robot with every link on a fixed joint welded to its nearest moving ancestor."""
    fixed = tables["joint_type"] == FIXED
    if not fixed.any():
        return tables
    if fixed[0]:
        raise ModelError("link 0 is fixed to the world; the root must move")
    t = {k: v.copy() for k, v in tables.items()}
    new_index = np.cumsum(~fixed) - 1
    owner = np.arange(len(fixed))  # moving ancestor of each link, and the link's pose in it
    pose = np.tile([0.0, 0, 0, 0, 0, 0, 1], (len(fixed), 1))
    mass, com, inertia = t["body_I_m"][:, 3, 3], t["joint_X_cm"][:, :3], t["body_I_m"][:, :3, :3]

    def spread(r):  # parallel-axis term of a unit mass
        return (r @ r) * np.eye(3) - np.outer(r, r)

    for i in range(len(fixed)):
        p = t["joint_parent"][i]
        if p >= 0:
            t["joint_X_pj"][i] = compose(pose[p], t["joint_X_pj"][i])
            t["joint_parent"][i] = p = owner[p]
        if fixed[i]:
            owner[i], pose[i] = p, t["joint_X_pj"][i]
            if mass[i] > 0:
                r = rotation_matrix(pose[i][3:])
                x, total = pose[i][:3] + r @ com[i], mass[p] + mass[i]
                both = (mass[p] * com[p] + mass[i] * x) / total
                inertia[p] += mass[p] * spread(com[p] - both) + r @ inertia[i] @ r.T + mass[i] * spread(x - both)
                com[p], mass[p] = both, total
    for c, link in enumerate(t["contact_body0"]):
        t["contact_point0"][c] = pose[link][:3] + rotation_matrix(pose[link][3:]) @ t["contact_point0"][c]
        t["contact_body0"][c] = new_index[owner[link]]
    for s, link in enumerate(t["shape_body"]):
        t["shape_transform"][s] = compose(pose[link], t["shape_transform"][s])
        t["shape_body"][s] = new_index[owner[link]]
    for key in LINK_TABLES:
        t[key] = t[key][~fixed]
    t["joint_parent"] = np.where(t["joint_parent"] < 0, -1, new_index[t["joint_parent"]]).astype(np.int32)
    return t


def muscle_segments(tables: dict[str, np.ndarray]) -> Segments:
    """Consecutive waypoints on different links; stretches within one link pull nothing."""
    rows = []
    starts = tables.get("muscle_start", np.zeros(1, np.int32))
    for muscle in range(len(starts) - 1):
        for w in range(starts[muscle], starts[muscle + 1] - 1):
            links = tables["muscle_links"][w : w + 2]
            if links[0] != links[1]:
                rows.append((muscle, links, tables["muscle_points"][w], tables["muscle_points"][w + 1]))
    muscle, links, start, end = zip(*rows) if rows else ([], [], [], [])
    points = [np.asarray(x, np.float32).reshape(-1, 3) for x in (start, end)]
    return Segments(np.asarray(muscle, np.int32), np.asarray(links, np.int32).reshape(-1, 2), *points)


def build_model(tables: dict[str, np.ndarray], name: str) -> RobotModel:
    """A RobotModel from raw tables (keys as in the shipped files). Raises ModelError if they describe no robot."""
    t = merge_fixed_links(_validated(tables, name))
    kind, parent = t["joint_type"], t["joint_parent"]
    q_start = np.concatenate([[0], np.cumsum(NUM_Q[kind])]).astype(np.int32)
    qd_start = np.concatenate([[0], np.cumsum(NUM_QD[kind])]).astype(np.int32)
    nq, nqd = int(q_start[-1]), int(qd_start[-1])
    dof = np.arange(nqd)
    link = np.repeat(np.arange(len(kind)), NUM_QD[kind])
    dof_parent = dof - 1
    for d in np.flatnonzero(dof == qd_start[link]):  # first freedom of a joint: continue at the parent link's last one
        p = parent[link[d]]
        dof_parent[d] = -1 if p < 0 else qd_start[p] + NUM_QD[kind[p]] - 1
    dof_q = q_start[link] + np.where(kind[link] == BALL, dof - qd_start[link], 0)
    jointed, limited = kind[link] != FREE, kind[link] < BALL  # free joints: no joint forces; ball joints: no limits

    def per_dof(key, mask):
        return np.where(mask, t[key][link], 0.0)

    float_tables = dict(
        frame_pos=t["joint_X_pj"][:, :3],
        frame_rot=t["joint_X_pj"][:, 3:],
        axis=t["joint_axis"],
        mass=t["body_I_m"][:, 3, 3],
        com=t["joint_X_cm"][:, :3],
        inertia=t["body_I_m"][:, :3, :3],
        stiffness=per_dof("joint_target_ke", jointed),
        target=t["joint_target"][dof_q],
        damping=per_dof("joint_target_kd", jointed) + per_dof("joint_limit_kd", limited),
        limit_stiffness=per_dof("joint_limit_ke", limited),
        lower=t["joint_limit_lower"][dof_q],
        upper=t["joint_limit_upper"][dof_q],
        armature=t["joint_armature"],
        contact_point=t["contact_point0"],
        contact_radius=t["contact_dist"],
        contact_material=t["shape_materials"][t["contact_material"]],
        gravity=t["gravity"],
        start_q=t["start_joint_q"][:nq],
        tension=t.get("muscle_strength_final", np.zeros(0)),
    )
    integer_tables = dict(
        joint_type=kind,
        parent=parent,
        q_start=q_start[:-1],
        qd_start=qd_start[:-1],
        dof_link=link,
        dof_parent=dof_parent,
        dof_q=dof_q,
        contact_link=t["contact_body0"],
    )
    return RobotModel(
        name=name,
        **{k: np.ascontiguousarray(v, np.float32) for k, v in float_tables.items()},
        **{k: np.ascontiguousarray(v, np.int32) for k, v in integer_tables.items()},
        segments=muscle_segments(t),
        shapes=Shapes(t["shape_body"], t["shape_geo_type"], t["shape_geo_scale"], t["shape_transform"]),
    )


@cache
def load_model(name: str, folder: Path = ASSETS) -> RobotModel:
    """The robot of ``folder/name.npz``. Raises ModelError if the file is missing, unreadable or inconsistent."""
    path = Path(folder) / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            tables = dict(file)
    except FileNotFoundError:
        known = sorted(p.stem for p in Path(folder).glob("*.npz"))
        raise ModelError(f"no model '{name}' in {folder}; there are {known}") from None
    except Exception as error:  # zipfile, zlib and numpy each raise their own kind on a damaged file
        raise ModelError(f"model file {path} is unreadable ({error}); reinstall pwm_fast") from error
    return build_model(tables, name)
