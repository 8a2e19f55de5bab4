"""`gym:ID`: any Gymnasium environment of continuous control as a task, with its own sizes and time limit."""

from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, flatdim
from gymnasium.wrappers import FlattenObservation, RescaleAction, TransformObservation

from pwm_fast.envs.registry import Task, UnknownTask
from pwm_fast.errors import nearest


def _refusal(space: gymnasium.Space) -> str | None:
    """Why actions of this space cannot be learned through gradients of a world model; None where they can."""
    if not isinstance(space, Box):
        return f"its actions are {type(space).__name__}, and policies here are continuous (Box)"
    if len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
        return f"its actions are {space.dtype} of shape {space.shape}, and policies give one vector of real numbers"
    if not np.isfinite([space.low, space.high]).all():
        return "its actions have no limits to scale [-1, 1] to; wrap it with gymnasium.wrappers.ClipAction first"
    return None


def _made(environment: str, **options: Any) -> Any:
    try:
        return gymnasium.make(environment, **options)
    except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        raise ImportError(f"gym:{environment}: {error}") from error
    except gymnasium.error.UnregisteredEnv as error:
        known = [spec for spec in gymnasium.registry if not spec.startswith("pwm_fast/")]
        hint = "MODULE:ID imports the module that registers it"
        raise UnknownTask(nearest("Gymnasium environment", environment, known, hint=hint)) from error


@cache
def gymnasium_task(name: str) -> Task:
    """The task `gym:ID`; its sizes come from the environment.

    Raises UnknownTask for an id that Gymnasium does not know, ImportError where the environment needs a package that is
    not installed, ValueError for one that cannot be used: discrete or unlimited actions, no time limit.
    """
    environment = name.removeprefix("gym:")
    env = _made(environment)
    try:
        refusal = _refusal(env.action_space)
        if refusal:
            raise ValueError(f"{name} cannot be used: {refusal}")
        if env.spec.max_episode_steps is None:
            raise ValueError(
                f"{name} cannot be used: its episodes have no time limit; register it with max_episode_steps"
            )
        if not env.observation_space.is_np_flattenable:
            raise ValueError(f"{name} cannot be used: its observations ({env.observation_space}) are no vector")
        obs_dim = flatdim(env.observation_space)
        steps = env.spec.max_episode_steps
        return Task(name, "gymnasium", environment, obs_dim, env.action_space.shape[0], steps, None, None)
    finally:
        env.close()


def make_env(task: Task, render_mode: str | None = None, **options: Any) -> gymnasium.Env:
    """The environment with flat float32 observations and actions in [-1, 1]; `options` go to `gymnasium.make`."""
    if render_mode is not None:  # environments that draw nothing need not know the word
        options["render_mode"] = render_mode
    env = RescaleAction(FlattenObservation(_made(task.gym_id, **options)), np.float32(-1.0), np.float32(1.0))
    return TransformObservation(env, np.float32, Box(-np.inf, np.inf, (task.obs_dim,), np.float32))
