"""Nested state comes back exactly, and a write that fails leaves what was there."""

import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pwm_fast.state_files import atomic_file, load_state, read_json, save_state, write_json


def same(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_state_comes_back_exactly(tmp_path: Path):
    flat = torch.randn(5, 7)
    tree = {
        "model": {"weight": flat, "view": flat[2], "transposed": flat.T, "empty": torch.zeros(0, 3)},
        "dtypes": [
            torch.ones(3, dtype=d) for d in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
        ],
        "scalar": torch.tensor(2.5),
        "rng": {"state": np.arange(4, dtype=np.uint64), "position": 2**127 + 1},
        "numbers": [0.1 + 0.2, math.nan, math.inf, -0.0, 3, True, None],
        "text": 'ü \u2028 "quoted"',
        "nothing": {},
        "a/b": {"c": 1},
    }
    save_state(tmp_path / "state", tree)
    assert same(tree, load_state(tmp_path / "state"))


def test_files_are_readable_as_the_user_wants(tmp_path: Path):
    before = os.umask(0o022)
    try:
        save_state(tmp_path / "state", {"x": torch.zeros(2)})
        write_json(tmp_path / "json", {})
    finally:
        os.umask(before)
    assert {(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {0o644}


def test_a_random_generator_continues_from_a_saved_state(tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    torch.rand(10, generator=generator)
    save_state(tmp_path / "state", {"generator": generator.get_state()})
    expected = torch.rand(5, generator=generator)
    resumed = torch.Generator()
    resumed.set_state(load_state(tmp_path / "state")["generator"])
    assert torch.equal(torch.rand(5, generator=resumed), expected)


@pytest.mark.parametrize("leaf", [object(), {1: 2}, {3}, b"bytes"], ids=["object", "integer key", "set", "bytes"])
def test_state_that_cannot_be_written_is_named(tmp_path: Path, leaf):
    with pytest.raises(TypeError, match="optimizer"):
        save_state(tmp_path / "state", {"optimizer": {"leaf": leaf}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other"])
def test_a_damaged_state_is_refused(tmp_path: Path, damage: str):
    path = tmp_path / "state"
    save_state(path, {"x": torch.zeros(100)})
    content = path.read_bytes()
    if damage == "other":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes({"truncated": content[:-50], "garbage": b"\x80\x04pickle" * 20, "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"damaged|holds no state"):
        load_state(path)


def test_a_missing_state_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_state(tmp_path / "nowhere")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_whole_and_damage_is_named(tmp_path: Path):
    path = tmp_path / "summary.json"
    write_json(path, {"return_mean": 1.5})
    assert read_json(path) == {"return_mean": 1.5}
    path.write_text(path.read_text()[:5])
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        read_json(path)


FULL_DISK = """
import resource, sys, torch
from pwm_fast.state_files import save_state, write_json
path = sys.argv[1]
save_state(path, {"step": 1, "x": torch.zeros(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
for write in (save_state, write_json):
    try:
        write(path, {"step": 2, "x": torch.zeros(100_000) if write is save_state else "x" * 100_000})
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs file size limits")
def test_a_full_disk_keeps_the_last_state_and_names_the_path(tmp_path: Path):
    path = tmp_path / "checkpoint.safetensors"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True)
    assert done.stdout.count(f"cannot write {path}: File too large") == 2, done.stderr
    assert load_state(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]
