"""Curves and rollouts become pictures a person can open."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pwm_fast.pictures import Series, curve, frame_indices, series, write_gif


def test_metrics_become_a_line_per_seed():
    rows = [
        {"minutes": 0.5, "seed": 1, "real_return": 10.0},
        {"minutes": 0.5, "seed": 0, "real_return": 20.0},
        {"minutes": 0.6, "seed": 0, "imagined_return": 1.0},
        {"minutes": 1.0, "seed": 0, "real_return": float("nan")},
        {"minutes": 1.5, "seed": 0, "real_return": 40},
    ]
    assert series(rows, "real_return") == [
        Series("seed 0", [0.5, 1.5], [20.0, 40]),
        Series("seed 1", [0.5], [10.0]),
    ]
    assert series(rows, "absent") == []


@pytest.mark.parametrize("seeds", [0, 1, 3])
def test_a_curve_is_written_for_any_number_of_seeds(tmp_path: Path, seeds: int):
    lines = [Series(f"seed {s}", [0.0, 1.0 + s, 2.0 + s], [70.0, 500.0, 4000.0]) for s in range(seeds)]
    curve(tmp_path / "curve.png", "humanoid", lines, lines, lines, {"paper": 8661.0, "random": 70, "cloning": None})
    picture = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB"))
    assert min(picture.shape[:2]) > 500 and picture.std() > 5
    assert list(tmp_path.iterdir()) == [tmp_path / "curve.png"]


def test_seeds_without_common_times_have_no_mean(tmp_path: Path):
    curve(tmp_path / "curve.png", "x", [Series("a", [0, 1], [1, 2]), Series("b", [3, 4], [1, 2])])
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_playback_is_real_time():
    shown = frame_indices(1000, seconds=7.0)
    assert len(shown) == 7 * 25 and shown[0] == 0
    np.testing.assert_allclose(shown / 60, np.arange(175) / 25, atol=0.51 / 60)
    assert frame_indices(1, 7.0).tolist() == [0]
    assert frame_indices(30, 7.0).max() <= 29 and len(frame_indices(30, 7.0)) == 12


def test_a_gif_plays_its_frames(tmp_path: Path):
    frames = np.zeros((10, 48, 64, 3), np.uint8)
    for t in range(10):
        frames[t, 10:20, 5 * t : 5 * t + 10] = (200, 80, 40)
    write_gif(tmp_path / "rollout.gif", frames)
    gif = Image.open(tmp_path / "rollout.gif")
    assert gif.n_frames == 10 and gif.size == (64, 48)
    assert gif.info["loop"] == 0 and gif.info["duration"] == 40
    gif.seek(9)
    assert np.asarray(gif.convert("RGB"))[15, 50].tolist() == pytest.approx([200, 80, 40], abs=12)


def test_a_large_gif_is_made_smaller(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (8, 200, 300, 3), dtype=np.uint8)
    write_gif(tmp_path / "rollout.gif", noise, limit=150_000)
    assert (tmp_path / "rollout.gif").stat().st_size < 150_000


def test_each_task_and_seed_has_a_line_of_its_own():
    rows = [
        {"minutes": minute, "task": task, "seed": seed, "real_return": 100 * seed + minute}
        for minute in (1.0, 2.0)
        for task in ("ant", "hopper")
        for seed in (0, 1)
    ]
    lines = {line.label: (line.minutes, line.values) for line in series(rows, "real_return")}
    assert list(lines) == ["ant seed 0", "ant seed 1", "hopper seed 0", "hopper seed 1"]
    assert lines["hopper seed 1"] == ([1.0, 2.0], [101.0, 102.0])
