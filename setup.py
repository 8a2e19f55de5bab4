"""Builds the optional C++ module `pwm_fast._native` with CMake and maps the folder `kernels/` to `pwm_fast.kernels`.

Everything static is in pyproject.toml. Without a working compiler the package installs all the same: the reason is
printed (`pip install -v` shows it) and kept beside the package, where `pwm_fast.backend` reads it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REASON_FILE = "_native_unavailable.txt"


def find_program(module: str, attribute: str, program: str) -> "str | None":
    """Path of a build tool, the wheel's copy (an isolated build has one) before the system's."""
    try:
        candidate = Path(getattr(__import__(module), attribute)) / program
    except (ImportError, AttributeError):
        candidate = None
    if candidate is not None and candidate.exists():
        return str(candidate)
    return shutil.which(program)


class CMakeBuild(build_ext):
    """Configures and compiles csrc/ in a fresh directory: a CMake cache must not survive between isolated builds,
    whose compilers' include paths vanish with them."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        places = [target.parent] + ([ROOT / "pwm_fast"] if self.editable_mode or self.inplace else [])
        for place in places:
            (place / REASON_FILE).unlink(missing_ok=True)
        try:
            self.compile(target)
        except (OSError, RuntimeError) as error:
            target.unlink(missing_ok=True)
            print(f"\npwm_fast: installing without the native module: {error}\n", file=sys.stderr)
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
                (place / REASON_FILE).write_text(f"{error}\n", encoding="utf-8")
                # An older build in the source tree would be imported in place of the one that just failed.
                for stale in place.glob("_native.*.so"):
                    stale.unlink()

    def compile(self, target: Path) -> None:
        """Writes the extension to `target`. Raises RuntimeError with the compiler's words."""
        cmake = find_program("cmake", "CMAKE_BIN_DIR", "cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found")
        try:
            import pybind11
        except ImportError:
            raise RuntimeError("pybind11 was not found") from None
        ninja = find_program("ninja", "BIN_DIR", "ninja")
        with tempfile.TemporaryDirectory(prefix="pwm_fast-cmake-") as build:
            configure = [
                cmake, "-S", str(ROOT), "-B", build,
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                f"-DPWM_FAST_OUTPUT_NAME={target.name}",
            ]  # fmt: skip
            if ninja:
                configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
            run(configure, "configuring")
            jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(min(4, os.cpu_count() or 1))
            run([cmake, "--build", build, "--parallel", jobs], "compiling")
        if not target.exists():
            raise RuntimeError(f"the build left no {target.name}")


def run(command: list[str], what: str) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(result.stdout)
    if result.returncode != 0:
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise RuntimeError(f"{what} failed: {' | '.join(errors[:3])[:500]}")


setup(
    packages=["pwm_fast.kernels", *find_packages(include=["pwm_fast", "pwm_fast.*"])],
    package_dir={"pwm_fast.kernels": "kernels"},
    package_data={"pwm_fast": ["py.typed", "assets/**/*", REASON_FILE]},
    ext_modules=[Extension("pwm_fast._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
