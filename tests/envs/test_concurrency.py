"""Simulators built and differentiated on several threads at once, with no compiled kernel in the cache."""

import os
import subprocess
import sys

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


def test_threads_build_and_differentiate_simulators_at_once(tmp_path):
    """Two threads that load one kernel at once crash the process; twelve simulators here must agree bit for bit."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "WARP_CACHE_PATH": str(tmp_path)},
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr}"
    assert result.stdout == "12 True\n"
    assert any(tmp_path.rglob("*.o")), "the kernels were compiled in this process"
