"""The 30 tasks of MT30 on dm_control's physics: 500 agent steps, each two control steps, so at most 1000 in return."""

from copy import deepcopy
from functools import lru_cache
from typing import Any

import numpy as np

from pwm_fast.envs.extras import import_extra
from pwm_fast.envs.registry import Task
from pwm_fast.envs.suite_env import SuiteEnv

_DOMAINS = {"cup": "ball_in_cup"}


@lru_cache(maxsize=4)
def _prototype(name: str) -> tuple[Any, Any, float]:
    """dm_control's physics and task, and seconds of a control step. Compiling the model takes far longer than copying
    it."""
    suite = import_extra("dm_control.suite", "mt80")
    from pwm_fast.envs.dm_control_physics import lean
    from pwm_fast.envs.dm_control_tasks import CUSTOM

    if name in CUSTOM:
        made = CUSTOM[name]()
    else:
        domain, task = name.split("-", 1)
        made = suite.load(_DOMAINS.get(domain, domain), task.replace("-", "_"))
    physics: Any = type(made.physics)
    return lean(physics).from_model(made.physics.model), made.task, made.control_timestep()


class DmControlEnv(SuiteEnv):
    """A dm_control task as TD-MPC2 uses it (github.com/nicklashansen/tdmpc2): observations are dm_control's, joined in
    its order; actions are scaled to the actuators' ranges. `physics` is dm_control's, to be read or set."""

    def __init__(self, task: Task, render_mode: str | None = None):
        super().__init__(task, render_mode)
        physics, rules, timestep = _prototype(task.name)
        self.physics, self.rules = physics.copy(), deepcopy(rules)
        self._substeps = round(timestep / self.physics.timestep())
        spec = self.rules.action_spec(self.physics)
        self._low, self._range = spec.minimum, (spec.maximum - spec.minimum) / 2
        self.metadata = {**self.metadata, "render_fps": round(1 / (timestep * task.action_repeat))}

    def observation(self) -> np.ndarray:
        """Of the physics as it is now, [S] float32."""
        parts = self.rules.get_observation(self.physics).values()
        return np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)

    def _picture(self) -> np.ndarray:
        return self.physics.render(height=240, width=320, camera_id=0)

    def _begin(self, seed: int | None) -> np.ndarray:
        if seed is not None:
            self.rules.random.seed(seed % 2**32)
        with self.physics.reset_context():
            self.rules.initialize_episode(self.physics)
        return self.observation()

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, float, dict[str, Any]]:
        control, reward = self._low + (action + 1.0) * self._range, 0.0
        for _ in range(self.task.action_repeat):
            self.rules.before_step(control, self.physics)
            self.physics.step(self._substeps)
            self.rules.after_step(self.physics)
            reward += float(self.rules.get_reward(self.physics))
        return self.observation(), reward, {}
