"""Without a working compiler the package still installs, says why it has no native module, and runs without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "THIRD_PARTY_NOTICES")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package built with a compiler that always fails, unpacked in a directory of its own."""
    work = tmp_path_factory.mktemp("install")
    source, target = work / "source", work / "target"
    source.mkdir()
    for name in PARTS:
        shutil.copy(ROOT / name, source / name)
    skip = shutil.ignore_patterns("__pycache__", "*.so", "assets", "_native_unavailable.txt")
    for name in ("csrc", "kernels", "pwm_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    result = subprocess.run(
        [*command, "--target", str(target), str(source)],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": "/bin/false", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return target, result.stdout + result.stderr


# An editable install of this repository must not lend the copy its native module.
PRELUDE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"


def python(target, program, *arguments, **environment):
    """Runs a program on the installed copy."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=target,
        env={**os.environ, "PYTHONPATH": str(target), **environment},
    )


def test_the_build_says_why(installed):
    _, output = installed
    assert "installing without the native module: configuring failed" in output


def test_it_runs_on_torch_and_tells_the_reason(installed):
    target, _ = installed
    program = "import pwm_fast.kernels, pwm_fast.backend as b; print(pwm_fast.__file__, b.native, b.describe())"
    result = python(target, program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(target))
    assert "None backend: torch (native module missing: it was not built: configuring failed" in result.stdout


def test_forcing_native_raises_with_the_reason(installed):
    target, _ = installed
    result = python(target, "import pwm_fast.backend as b; b.resolve()", PWM_FAST_BACKEND="native")
    assert result.returncode != 0
    assert "RuntimeError: PWM_FAST_BACKEND='native', but the native module cannot be used" in result.stderr
    assert "configuring failed" in result.stderr


def test_the_sampler_works_without_it(installed, tmp_path):
    target, _ = installed
    program = """
import sys
import numpy as np
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, WindowSampler
with EpisodeWriter(sys.argv[1], 3, 1, task_names=["t"]) as writer:
    writer.add(np.ones((9, 3)), np.ones((8, 1)), np.ones(8), True)
print(WindowSampler(EpisodeStore.open(sys.argv[1]), 4).windows(0, 6)["obs"].shape)
"""
    result = python(target, program, tmp_path / "s")
    assert result.stdout == "(5, 6, 3)\n", result.stderr
