"""Where the links are: forward kinematics in numpy, for pictures and checks (the simulator has its own, on Warp)."""

import numpy as np

from pwm_fast.envs.dflex.model import BALL, FREE, PRISMATIC, RobotModel


def rotation_matrices(quat: np.ndarray) -> np.ndarray:
    """Quaternions xyzw [..., 4], normalised here -> [..., 3, 3]."""
    x, y, z, w = np.moveaxis(quat / np.linalg.norm(quat, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def link_poses(model: RobotModel, joint_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """joint_q [T, nq] -> link positions [T, L, 3] and orientations [T, L, 3, 3]."""
    q = np.asarray(joint_q, np.float64)
    positions = np.zeros((len(q), model.num_links, 3))
    orientations = np.zeros((len(q), model.num_links, 3, 3))
    frames = rotation_matrices(model.frame_rot.astype(np.float64))
    for i, (kind, parent, j) in enumerate(zip(model.joint_type, model.parent, model.q_start)):
        if kind == FREE:
            positions[:, i], orientations[:, i] = q[:, j : j + 3], rotation_matrices(q[:, j + 3 : j + 7])
            continue
        base = orientations[:, parent] if parent >= 0 else np.eye(3)
        origin = positions[:, parent] if parent >= 0 else np.zeros(3)
        positions[:, i] = origin + base @ model.frame_pos[i]
        orientations[:, i] = base @ frames[i]
        if kind == PRISMATIC:
            positions[:, i] += (orientations[:, i] @ model.axis[i]) * q[:, j, None]
        elif kind == BALL:
            orientations[:, i] = orientations[:, i] @ rotation_matrices(q[:, j : j + 4])
        else:
            half = 0.5 * q[:, j, None]
            turn = np.concatenate([np.sin(half) * model.axis[i], np.cos(half)], -1)
            orientations[:, i] = orientations[:, i] @ rotation_matrices(turn)
    return positions, orientations
