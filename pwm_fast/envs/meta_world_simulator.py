"""Meta-World's simulators with less Python around the same physics: bit for bit the numbers of the originals.

What is left out is looked up again and again, or overwritten unread: names of bodies, the general forms of small
arrays, a check of each rotation matrix that MuJoCo made, and the first of the two times that a reset moves the hand.
Rewards are Meta-World's own.
"""

from copy import copy
from functools import cache, lru_cache
from math import sqrt
from typing import Any

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv

_TURNED = {  # tasks that show a quaternion made of a rotation matrix -> whose matrix
    **dict.fromkeys(("coffee-pull", "coffee-push"), ("geom", "mug")),
    **dict.fromkeys(("door-open", "door-close"), ("geom", "handle")),
    **dict.fromkeys((f"plate-slide{way}" for way in ("", "-side", "-back", "-back-side")), ("geom", "puck")),
    **dict.fromkeys(("push", "push-back", "push-wall", "pick-place", "pick-place-wall"), ("geom", "objGeom")),
    **dict.fromkeys(("reach", "reach-wall", "shelf-place", "sweep-into", "lever-pull"), ("geom", "objGeom")),
    "peg-insert-side": ("site", "pegGrasp"),
    "soccer": ("body", "soccer_ball"),
    **dict.fromkeys(("stick-push", "stick-pull"), ("body", "stick")),
}
_GRASPED = np.array([1.0, 0.0, 1.0, 0.0])  # how the hand is turned, always


@lru_cache(maxsize=2)  # of some 20 MB each
def compiled(path: str) -> mujoco.MjModel:
    """The model of a file, compiled once per process: a copy takes a tenth of the time."""
    return mujoco.MjModel.from_xml_path(path)


@cache
def simulator(task: str) -> type:
    """The class of a task (Meta-World's name of it, without the version)."""
    parts = {"_get_quat_objects": _quaternion_of(*_TURNED[task])} if task in _TURNED else {}
    return type(task, (_Lean, ALL_V3_ENVIRONMENTS[f"{task}-v3"]), parts)


def quaternion(matrix: np.ndarray) -> np.ndarray:
    """(x, y, z, w) of a rotation matrix [9], which must be one: as scipy's Rotation, which checks that first.

    From the largest of its four entries, for the least rounding (Markley 2008, Unit quaternion from rotation matrix).
    """
    a, b, c, d, e, f, g, h, i = matrix.tolist()
    trace = a + e + i
    largest = max(a, e, i, trace)
    if largest == a:
        x, y, z, w = 1 - trace + 2 * a, d + b, g + c, h - f
    elif largest == e:
        x, y, z, w = d + b, 1 - trace + 2 * e, h + f, c - g
    elif largest == i:
        x, y, z, w = g + c, h + f, 1 - trace + 2 * i, d - b
    else:
        x, y, z, w = h - f, c - g, d - b, 1 + trace
    norm = sqrt(x * x + y * y + z * z + w * w)
    return np.array([x / norm, y / norm, z / norm, w / norm])


def _quaternion_of(kind: str, name: str) -> Any:
    """What takes the place of `_get_quat_objects`: [4] or, where a task shows two things and turns one, [8]."""
    second = np.zeros(4 if name == "stick" else 0)
    return lambda env: np.concatenate((quaternion(getattr(env.data, kind)(name).xmat), second))


class _Lean(SawyerXYZEnv):
    """Before a task's class in the order of methods. Actions are float64; what is not said here is Meta-World's."""

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = copy(compiled(self.fullpath))
        screen = model.vis.global_
        screen.offwidth, screen.offheight = max(screen.offwidth, self.width), max(screen.offheight, self.height)
        data = mujoco.MjData(model)
        self._mocap_low, self._mocap_high = self.mocap_low.tolist(), self.mocap_high.tolist()
        self._bodies = {model.body(number).name: row for number, row in enumerate(data.xpos)}
        self._sites = {model.site(number).name: row for number, row in enumerate(data.site_xpos)}
        return model, data

    def get_body_com(self, body_name: str) -> np.ndarray:
        return self._bodies[body_name]

    def get_endeff_pos(self) -> np.ndarray:
        return self._bodies["hand"]

    def _get_site_pos(self, site_name: str) -> np.ndarray:
        return self._sites[site_name].copy()

    @property
    def tcp_center(self) -> np.ndarray:
        return (self._sites["rightEndEffector"] + self._sites["leftEndEffector"]) / 2.0

    def touching_object(self, object_geom_id: int) -> bool:
        """Whether both pads press on it."""
        contact = self.data.contact
        ones, others = contact.geom1.tolist(), contact.geom2.tolist()
        if object_geom_id not in ones and object_geom_id not in others:
            return False
        for pad in (self.model.geom(name).id for name in ("leftpad_geom", "rightpad_geom")):
            touching = [{pad, object_geom_id} <= set(pair) for pair in zip(ones, others)]
            if not 0 < sum(self.data.efc_force[contact.efc_address[touching]].tolist()):
                return False
        return True

    def _get_curr_obs_combined_no_goal(self) -> np.ndarray:
        obs = np.zeros(4 + self._obs_obj_max_len)
        apart = self._bodies["rightclaw"] - self._bodies["leftclaw"]
        obs[:3], obs[3] = self._bodies["hand"], min(max(sqrt(apart.dot(apart)) / 0.1, 0.0), 1.0)
        places, turns = self._get_pos_objects(), self._get_quat_objects()
        for number in range(len(places) // 3):
            first = 4 + 7 * number
            obs[first : first + 3] = places[3 * number : 3 * number + 3]
            obs[first + 3 : first + 7] = turns[4 * number : 4 * number + 4]
        return obs

    def _get_obs(self) -> np.ndarray:
        goal, before = self._get_pos_goal(), self._prev_obs
        self._prev_obs = self._get_curr_obs_combined_no_goal()
        return np.concatenate((self._prev_obs, before, np.zeros(3) if self._partially_observable else goal))

    def set_xyz_action(self, action: np.ndarray) -> None:
        wanted = zip(self.data.mocap_pos[0].tolist(), action.tolist(), self._mocap_low, self._mocap_high)
        scale = self.action_scale
        self.data.mocap_pos[0] = [
            min(max(place + min(max(move, -1.0), 1.0) * scale, low), high) for place, move, low, high in wanted
        ]
        self.data.mocap_quat[0] = _GRASPED

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Forces between bodies (MuJoCo's `cfrc_int` and the like) stay those of the reset; no task reads them."""
        if self.curr_path_length >= self.max_path_length:
            raise ValueError(f"an episode has {self.max_path_length} steps; call reset() before the next one")
        self.set_xyz_action(action[:3])
        self.data.ctrl[:] = action[3], -action[3]
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        self.curr_path_length += 1
        mujoco.mj_forward(self.model, self.data)  # in full: the solver of the next step starts from what it finds
        limits = self.sawyer_observation_space
        obs = np.minimum(np.maximum(self._get_obs(), limits.low), limits.high)
        self._last_stable_obs = obs
        reward, info = self.evaluate_state(obs, action)
        return obs.copy(), reward, False, self.curr_path_length == self.max_path_length, info

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Meta-World's goes twice through `reset_model`, and MuJoCo's state is reset in between: of the first time
        only what it draws and what it writes into the model stay."""
        self._first = True
        return super().reset(seed, options)

    def _reset_hand(self, steps: int = 50) -> None:
        super()._reset_hand(0 if self._first else steps)
        self._first = False
