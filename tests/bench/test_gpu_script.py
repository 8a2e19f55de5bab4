"""bench/gpu.sh goes through everything on a machine without a GPU, and needs no more than it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ABSENT = ("warp", "gymnasium", "tyro", "rich", "matplotlib", "PIL", "nvtx")
BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ImportError(f"{{name}} is absent here")
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_dry_run_passes_with_few_packages(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    command = [str(ROOT / "bench" / "gpu.sh"), "--dry-run", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))
    assert found["dry_run"] and found["failures"] == []
    kinds = {name.split("/")[0] for name in found["results"]}
    assert kinds == {"ceiling", "gradient", "learning", "kernel", "pretraining", "ladder"}
    rungs = {name.split("/")[2] for name in found["results"] if name.startswith("ladder")}
    assert {"eager torch", "frozen and batched", "fused kernels", "graph", "overlap", "overlap, bf16"} <= rungs
    table = (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    assert "dry run" in table and all(name in table for name in found["results"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what a computer without a GPU is told")
def test_without_a_gpu_the_reason_is_given(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "sees no GPU; --dry-run goes through everything" in done.stderr
