"""Environment steps per CPU-second of the robots' physics, alone and with gradients, and the memory a backward holds.

    pytest bench/test_physics.py -s
    PWM_FAST_PROTOTYPE=DIR pytest bench/test_physics.py -s -k "64 and hopper"

A window is 16 steps of the whole environment (observation, reward, resets) under random actions of +-0.5; "both" adds
the gradient of the summed rewards. Times are CPU seconds of the process, all workloads in turn, the fastest of each, so
other work on the machine disturbs the ratios little; scaling over two threads alone is wall time and means something on
an idle machine only. Beside it stands what the share of one thread's time outside the interpreter lock allows at best.
A speed counts only if the recorded gradients come out. PWM_FAST_PROTOTYPE names the folder of
another simulator to run beside ours: a module ``tasks`` with DifferentiableEnv(name, model_folder, num_envs, threads).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "envs"))
from recorded import FILES, TASKS, gradients

from pwm_fast.envs.dflex import DifferentiableEnv
from pwm_fast.envs.dflex.model import ASSETS

pytestmark = [
    pytest.mark.timeout(0),
    pytest.mark.benchmark(timer=time.process_time, min_rounds=1, max_time=0.1, warmup=False),
]

HORIZON = 16
ROUNDS = 8
SETTLE = 60  # steps after which most robots touch the ground
MEMORY_LIMIT = 100e6  # bytes of a 16-step backward of 64 humanoids
PROTOTYPE = os.environ.get("PWM_FAST_PROTOTYPE")


@cache
def recorded_gradient_error(task: str) -> float:
    """Median over eight environments of the relative error of 16-step gradients recorded from dflex."""
    data = gradients(task)
    env = DifferentiableEnv(task, 8, early_termination=False)
    env.set_state(data["start_joint_q"], data["start_joint_qd"])
    action = data["action"].clone().requires_grad_()
    torch.stack([env.step(a)[1] for a in action]).sum().backward()
    expected = data["grad_H16"]
    error = (action.grad - expected).pow(2).sum((0, 2)) / expected.pow(2).sum((0, 2))
    return float(error.median().sqrt())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The robots under the names by which the other simulator looks for them."""
    folder = tmp_path_factory.mktemp("model")
    for name in FILES.values():
        (folder / f"{name}_model.npz").symlink_to(ASSETS / f"{name}.npz")
    return folder


def windows(env: Any, num_envs: int, action_dim: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward, both) over one window of a settled environment."""
    generator = torch.Generator().manual_seed(0)
    actions = [torch.rand(num_envs, action_dim, generator=generator) - 0.5 for _ in range(HORIZON)]
    leaves = [action.clone().requires_grad_() for action in actions]

    def forward() -> None:
        with torch.no_grad():
            for action in actions:
                env.step(action)

    def both() -> None:
        env.initialize_trajectory()
        sum(env.step(action)[1].sum() for action in leaves).backward()
        env.initialize_trajectory()

    for _ in range(SETTLE // HORIZON):
        forward()
    both()  # kernels of the adjoint are compiled or loaded here
    return forward, both


def share_outside_lock(env: Any, call: Callable[[], object]) -> float:
    """Of one thread's CPU time, what native code takes that holds no lock: the most two threads can halve."""
    crew, shares = env.simulator.crew, []
    run, native = crew.run, 0.0

    def timed(programs: Any) -> None:
        nonlocal native
        start = time.thread_time()
        run(programs)
        native += time.thread_time() - start

    crew.run = timed
    for _ in range(ROUNDS):
        native, start = 0.0, time.thread_time()
        call()
        shares.append(native / (time.thread_time() - start))
    crew.run = run
    return sorted(shares)[len(shares) // 2]


def fastest(calls: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
    """Least CPU and wall seconds of each call, in turns."""
    best = {name: (float("inf"), float("inf")) for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            best[name] = min(best[name][0], spent[0]), min(best[name][1], spent[1])
    return best


@pytest.mark.parametrize("num_envs", [8, 64, 512])
@pytest.mark.parametrize("task", TASKS)
def test_steps_per_cpu_second(benchmark: Any, task: str, num_envs: int, model_folder: Path) -> None:
    assert recorded_gradient_error(task) < 1e-4
    calls, envs = {}, {}
    for threads in (1, 2):
        envs[threads] = env = DifferentiableEnv(task, num_envs, threads=threads)
        calls[f"forward {threads}"], calls[f"both {threads}"] = windows(env, num_envs, env.action_dim)
    if PROTOTYPE:
        sys.path.insert(0, PROTOTYPE)
        from tasks import DifferentiableEnv as Yardstick

        sys.path.remove(PROTOTYPE)
        other = Yardstick(FILES[task], str(model_folder), num_envs, threads=1)
        calls["forward yardstick"], calls["both yardstick"] = windows(other, num_envs, env.action_dim)
    best = fastest(calls)
    print(f"\n  {task}, {num_envs} environments")
    for work in ("forward", "both"):
        rate = {which: HORIZON * num_envs / best[f"{work} {which}"][0] for which in ("1", "2")}
        scaling = best[f"{work} 1"][1] / best[f"{work} 2"][1]
        line = f"    {work:8s}{rate['1']:10,.0f} env-steps per CPU-second, {rate['2']:10,.0f} on two threads"
        share = share_outside_lock(envs[1], calls[f"{work} 1"])
        line += f" (wall time x{scaling:.2f}; {share:.0%} outside the lock: at best x{1 / (1 - share / 2):.2f})"
        benchmark.extra_info.update(
            {
                f"{work}_outside_lock": share,
                f"{work}_rate": rate["1"],
                f"{work}_rate_2": rate["2"],
                f"{work}_scaling": scaling,
            }
        )
        if PROTOTYPE:
            ratio = best[f"{work} yardstick"][0] / best[f"{work} 1"][0]
            line += f"; yardstick {HORIZON * num_envs / best[f'{work} yardstick'][0]:,.0f}, ratio {ratio:.2f}"
            benchmark.extra_info[f"{work}_ratio"] = ratio
        print(line)
    benchmark(calls["both 1"])


MEMORY = """
import torch

from pwm_fast.envs.dflex import DifferentiableEnv
from pwm_fast.envs.dflex.batch_slice import LANES
from pwm_fast.envs.dflex.structs import scratch_struct

torch.set_num_threads(1)


def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def backward(env, steps):
    env.initialize_trajectory()
    action = torch.zeros(64, 21, requires_grad=True)
    sum(env.step(action)[1].sum() for _ in range(steps)).backward()
    env.initialize_trajectory()


warm = DifferentiableEnv("humanoid", 64, threads=1)
backward(warm, 1)  # code and the libraries' own buffers
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the highest resident size so far
before = status("VmRSS")
env = DifferentiableEnv("humanoid", 64, threads=1)
backward(env, 16)
part = env.simulator.parts[0]
arrays = [array for tape in (part.work, *part.free_tapes) for array in tape.arrays.values()]
arrays += [getattr(part.scratch, name) for name in scratch_struct(LANES).vars]
arrays += [array.grad for array in arrays if array.grad is not None]
held = sum({array.ptr: array.capacity for array in arrays}.values())
print(held, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_of_a_backward(benchmark: Any) -> None:
    """Arrays held by tapes and buffers, and how far the resident size rises, in a process of its own."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    held, risen = map(int, result.stdout.split())
    print(
        f"\n  16 steps and backward of 64 humanoids: {held / 1e6:.1f} MB in arrays, resident size +{risen / 1e6:.1f} MB"
    )
    benchmark.extra_info.update(held_mb=held / 1e6, risen_mb=risen / 1e6)
    assert held < MEMORY_LIMIT and risen < MEMORY_LIMIT
    benchmark(lambda: None)
