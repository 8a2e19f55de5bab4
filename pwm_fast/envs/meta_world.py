"""The 50 Meta-World tasks of MT80: 100 agent steps of two, a new goal in each episode, success as of the last step."""

from typing import Any

import numpy as np

from pwm_fast.envs.extras import import_extra
from pwm_fast.envs.registry import Task
from pwm_fast.envs.suite_env import SuiteEnv


class MetaWorldEnv(SuiteEnv):
    """A Meta-World task as TD-MPC2 uses it (github.com/nicklashansen/tdmpc2): obs 39 with the goal in it; after
    `reset` the simulator takes one step of no action, which the first observation does not show yet.
    `info["success"]` is Meta-World's at this step. `simulator` is Meta-World's environment."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 40}  # noqa: RUF012

    def __init__(self, task: Task, render_mode: str | None = None):
        super().__init__(task, render_mode)
        import_extra("metaworld", "mt80")
        from pwm_fast.envs.meta_world_simulator import simulator

        made = simulator(task.name.removeprefix("mw-"))
        self.simulator: Any = made(render_mode=render_mode, camera_name="corner2", width=320, height=240)
        self.simulator.model.cam_pos[self.simulator.model.camera("corner2").id] = (0.75, 0.075, 0.7)  # nearer
        # What Meta-World's own goal-observable classes set: goals are shown, and drawn from the seeded generator.
        self.simulator._partially_observable = False
        del self.simulator.sawyer_observation_space
        self.simulator._freeze_rand_vec = False
        self.simulator.seeded_rand_vec = True
        self.simulator._set_task_called = True

    def _picture(self) -> np.ndarray:
        return self.simulator.render()[::-1, ::-1]  # the camera hangs upside down

    def _begin(self, seed: int | None) -> np.ndarray:
        if seed is not None:
            self.simulator.seed(seed)
        obs = self.simulator.reset()[0].astype(np.float32)
        self.simulator.step(np.zeros(4))
        return obs

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, float, dict[str, Any]]:
        total = 0.0
        for _ in range(self.task.action_repeat):
            obs, reward, _, _, info = self.simulator.step(action)
            total += float(reward)
        return obs.astype(np.float32), total, {"success": bool(info["success"])}
