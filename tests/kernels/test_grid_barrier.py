"""The grid barrier's memory ordering, as compiled: what no run on one program can show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pwm_fast.kernels import triton_support

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pwm_fast.kernels.grid_barrier import grid_barrier
from pwm_fast.kernels.triton_support import tl


@triton.jit
def kernel(x, counter):
    i = tl.arange(0, 128)
    tl.store(x + tl.program_id(0) * 128 + i, i)
    grid_barrier(counter)
    y = tl.load(x + (tl.program_id(0) + 1) % tl.num_programs(0) * 128 + i)
    tl.store(x + tl.program_id(0) * 128 + i, y + 1)


source = ASTSource(kernel, signature={"x": "*i32", "counter": "*i64"}, constexprs={})
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


@pytest.mark.skipif(triton_support.unavailable is not None, reason="needs Triton")
def test_stores_are_released_and_loads_wait_for_an_acquire(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ptx = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"st\.global|bar\.sync|atom\.global\S*|ld\.global\S*", ptx)
    release = next(i for i, op in enumerate(found) if op.startswith("atom"))
    acquire = next(i for i, op in enumerate(found) if "acquire" in op)
    loads = [i for i, op in enumerate(found) if op.startswith("ld.global") and "acquire" not in op]
    assert ".gpu" in found[release]
    assert ".release" in found[release]
    assert ".gpu" in found[acquire]
    assert "st.global" in found[:release]
    assert "bar.sync" in found[found.index("st.global") : release]  # all threads' stores, then one thread's release
    assert release < acquire < loads[0]
    assert "bar.sync" in found[acquire : loads[0]]  # no thread reads before the one that acquired
