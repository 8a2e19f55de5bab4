"""The scheduler started, stopped, resized and broken 10,000 times under ThreadSanitizer and AddressSanitizer, and as
many jobs for the worker threads of the kernels."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("c++"), reason="needs a C++ compiler on Linux"),
    pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake"),
]


def build(folder: Path, sanitizer: str, program: str) -> subprocess.CompletedProcess[str]:
    """Configures with the package's own CMakeLists.txt, and builds one stress program alone."""
    import pybind11

    configure = [
        "cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPWM_FAST_SANITIZE={sanitizer}",
    ]  # fmt: skip
    done = subprocess.run(configure, capture_output=True, text=True)
    if done.returncode == 0:
        done = subprocess.run(["cmake", "--build", folder, "--target", program], capture_output=True, text=True)
    return done


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("program", ["stress_scheduler", "stress_threads"])
def test_stress(tmp_path: Path, program: str, sanitizer: str) -> None:
    built = build(tmp_path / "build", sanitizer, program)
    assert built.returncode == 0, built.stdout + built.stderr
    done = subprocess.run(
        [tmp_path / "build" / program, "10000"], cwd=tmp_path, capture_output=True, text=True, timeout=1500
    )
    print(done.stdout)
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, done.stdout + done.stderr
    assert done.stdout.startswith("10000 rounds: ")


def test_an_unknown_sanitizer_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path / "build", "mind", "stress_threads")
    assert done.returncode != 0 and "must be thread or address, got 'mind'" in done.stderr
