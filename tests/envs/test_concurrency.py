"""Simulators built and differentiated on several threads at once, in a process that has loaded no kernel yet."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
from threading import Barrier, Thread

import torch

from pwm_fast.envs.dflex import DifferentiableEnv

torch.set_num_threads(1)
start, gradients = Barrier(4), {}


def work(i):
    start.wait()
    for round in range(3):
        env = DifferentiableEnv("hopper", 40, seed=5, threads=1 + i % 2, early_termination=False)
        action = torch.full((40, 3), 0.1, requires_grad=True)
        sum(env.step(action)[1].sum() for _ in range(4)).backward()
        gradients[i, round] = action.grad


threads = [Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
first = gradients[0, 0]
assert first.abs().max() > 0
print(len(gradients), all(torch.equal(g, first) for g in gradients.values()))
"""


EMPTY = pytest.param("empty", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])  # compiles for about half a minute


@pytest.mark.parametrize("cache", ["the user's", EMPTY])
def test_threads_build_and_differentiate_simulators_at_once(cache, tmp_path):
    """Two threads that load one kernel at once crash the process; twelve simulators here must agree bit for bit."""
    folder = {"WARP_CACHE_PATH": str(tmp_path)} if cache == "empty" else {}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **folder})
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr}"
    assert result.stdout == "12 True\n"
    if cache == "empty":
        assert any(tmp_path.rglob("*.o")), "the kernels were compiled in this process"
