"""Every Triton kernel compiles for the A100 and the H100 without a GPU, without spills, within shared memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from closeness import needs_triton

from pwm_fast.kernels import ahead_of_time

pytestmark = needs_triton


@pytest.mark.timeout(3600)  # a minute of one core for each architecture, shared with other tests; six for all
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["usual", "all"])
def test_every_kernel_compiles_and_fits(tmp_path: Path, every: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the interpreter compiles nothing
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-m", "pwm_fast.kernels.ahead_of_time", "--arch", "80", "90"]
    command += ["--all"] * every
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^sm_(\d+) (.*?)\s+(\d+) registers\s+(\d+) B local\s+(\d+) B shared$", done.stdout, re.M)
    kernels = [c for c in ahead_of_time.compilations() if every or not c.slow]
    expected = [(arch, c) for arch in ahead_of_time.ARCHITECTURES for c in kernels]
    assert len(found) == len(expected) > 0
    for (arch, _, _, local, shared), (_, compilation) in zip(found, expected):
        assert int(local) <= compilation.may_spill
        assert int(shared) <= ahead_of_time.SHARED_LIMIT[int(arch)]


def test_a_kernel_that_asks_for_too_much_fails(monkeypatch, capsys) -> None:
    small, large = (ahead_of_time.Resources(255, local, shared) for local, shared in ((0, 1024), (16, 1024)))
    greedy = ahead_of_time.Resources(32, 0, ahead_of_time.SHARED_LIMIT[80] + 1)
    compilation = ahead_of_time.Compilation("some kernel", None, {})
    monkeypatch.setattr(ahead_of_time, "compilations", lambda: [compilation])
    monkeypatch.setattr(sys, "argv", ["ahead_of_time", "--arch", "80"])
    for resources, code in ((small, 0), (large, 1), (greedy, 1)):
        monkeypatch.setattr(ahead_of_time, "compile_kernel", lambda c, arch, r=resources: r)
        assert ahead_of_time.main() == code
        assert ("too much" in capsys.readouterr().out) == bool(code)
