"""Compiles every Triton kernel without a GPU and shows what it needs on the chip.

    python -m pwm_fast.kernels.ahead_of_time --arch 80 90 [--all]

Each op file lists its `COMPILATIONS`. A kernel that spills registers to local memory, or asks for more shared memory
than its limit, is an error: both cost far more than they look.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pwm_fast import kernels
from pwm_fast.kernels.triton_support import interpreting, triton, unavailable

ARCHITECTURES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes one block may use (CUDA C++ Programming Guide, table 27)


@dataclass(frozen=True)
class Compilation:
    """One specialisation of a kernel: `signature` has a Triton type per argument ("*fp32", "i32"), `constants` a value
    for each that is known when compiling (their "constexpr" in the signature may be left out)."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    may_spill: int = 0  # bytes of local memory per thread that are tolerated; the reason stands beside it
    slow: bool = False  # ten seconds and more: compiled with --all only


def signature(names_of: dict[str, str]) -> dict[str, str]:
    """A signature from names by type: {"*fp32": "x y", "i32": "rows"}."""
    return {name: kind for kind, names in names_of.items() for name in names.split()}


@dataclass(frozen=True)
class Resources:
    """What the assembler reports for one kernel."""

    registers: int  # per thread
    local: int  # bytes per thread: spilled registers and arrays that did not fit
    shared: int  # bytes per block


def compile_kernel(c: Compilation, arch: int) -> Resources:
    """Compile for sm_`arch`; raises RuntimeError without Triton or in its interpreter."""
    if unavailable is not None:
        raise RuntimeError(unavailable)
    if interpreting:
        raise RuntimeError("TRITON_INTERPRET=1 turns compilation off: unset it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = c.signature | dict.fromkeys(c.constants, "constexpr")
    # As torch's allocations are: without it, loads would not be vectors.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(c.kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(c.kernel, signature=signature, constexprs=c.constants, attrs=aligned)
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(found["REG"], max(found["STACK"], found["LOCAL"]), binary.metadata.shared)


def compilations() -> list[Compilation]:
    """Those of every op in `pwm_fast.kernels`."""
    found: list[Compilation] = []
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name != "ahead_of_time":
            found += getattr(importlib.import_module(f"pwm_fast.kernels.{module.name}"), "COMPILATIONS", ())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, as 80 or 90")
    parser.add_argument("--all", action="store_true", help="slow ones too: some minutes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at once")
    options = parser.parse_args()
    wanted = [(arch, c) for arch in options.arch for c in compilations() if options.all or not c.slow]
    wrong = 0
    with ThreadPoolExecutor(options.jobs) as pool:  # the assembler, which takes most of the time, is its own process
        for (arch, c), r in zip(wanted, pool.map(lambda job: compile_kernel(job[1], job[0]), wanted)):
            bad = r.local > c.may_spill or r.shared > SHARED_LIMIT.get(arch, min(SHARED_LIMIT.values()))
            wrong += bad
            print(
                f"sm_{arch} {c.name:48s} {r.registers:4d} registers {r.local:5d} B local {r.shared:7d} B shared"
                f"{'  <-- too much' if bad else ''}",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
