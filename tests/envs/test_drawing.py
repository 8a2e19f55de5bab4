"""Pictures of MuJoCo's tasks off screen, or a clear word where this machine cannot draw. Each in a process of its own:
MuJoCo chooses its library once."""

import os
import subprocess
import sys
from ctypes.util import find_library

import pytest

PROGRAM = """
from pwm_fast.envs import registry
try:
    for name in {names}:
        env = registry.get(name).make(render_mode="rgb_array")
        env.reset(seed=0)
        first = env.render()
        for _ in range(5):
            env.step(env.action_space.sample())
        print(name, first.shape, first.dtype, (env.render() != first).any(), first.std() > 10)
except (RuntimeError, ValueError) as error:
    print(type(error).__name__, error)
"""
EPISODE = """
from pwm_fast.envs.drawing import drawn_episode
steps = []
def policy(obs):
    steps.append(obs)
    return obs[:, :1]
frames = drawn_episode(registry.get("pendulum-swingup"), policy, 0, frames_per_second=12.5, seconds=0.64)
print(frames.shape, frames.dtype, len(steps))
"""


def run(program, **variables):
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.fixture(autouse=True)
def suites():
    for package in ("dm_control", "metaworld"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra mt80)")


@pytest.mark.skipif(not find_library("EGL"), reason="draws off screen with EGL: install libegl1")
def test_pictures_need_no_setting():
    names = ["walker-walk", "mw-drawer-open"]
    lines = run(PROGRAM.format(names=names) + EPISODE)
    assert lines == [f"{name} (240, 320, 3) uint8 True True" for name in names] + ["(8, 240, 320, 3) uint8 14"]


def test_a_machine_that_cannot_draw_says_so():
    text = "RuntimeError MUJOCO_GL is disable, so nothing can be drawn; install EGL (libegl1) or OSMesa (libosmesa6)"
    (line,) = run(PROGRAM.format(names=["mw-reach"]), MUJOCO_GL="disable")
    assert line.startswith(text)
    (line,) = run(PROGRAM.format(names=["walker-walk"]), MUJOCO_GL="glfw")
    assert line.startswith("RuntimeError there is no display to draw with (MUJOCO_GL=glfw); install EGL")


@pytest.mark.skipif(not find_library("EGL"), reason="draws off screen with EGL: install libegl1")
def test_too_late_says_what_to_call():
    lines = run("import mujoco\n" + PROGRAM.format(names=["walker-walk"]))
    assert lines[0].startswith("RuntimeError MuJoCo was imported without a display to draw with; call pwm_fast.envs.")


def test_without_a_mode_nothing_is_drawn():
    from pwm_fast.envs import registry

    env = registry.get("cartpole-swingup").make()
    env.reset(seed=0)
    assert env.render() is None
    with pytest.raises(ValueError, match="render_mode must be None or 'rgb_array', got 'human'"):
        registry.get("cartpole-swingup").make(render_mode="human")
