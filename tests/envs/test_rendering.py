"""Pictures: the robot is in them, where its coordinates say."""

import numpy as np
import pytest
from recorded import TASKS

from pwm_fast.envs.dflex.model import load_model
from pwm_fast.envs.dflex.rendering import render
from pwm_fast.envs.dflex.tasks import get_task


def start(task):
    return load_model(get_task(task).model).start_q.astype(float)


def robot_pixels(picture):
    """Pixels [H, W] of a robot's saturated colours; ground, shadows and sky are nearly grey."""
    spread = np.ptp(picture.astype(int), axis=-1)
    return (spread > 60) & (picture.max(-1) > 60)


@pytest.mark.parametrize("task", TASKS)
def test_the_robot_stands_in_the_middle(task):
    picture = render(task, start(task), 200, 150)
    assert picture.shape == (150, 200, 3) and picture.dtype == np.uint8
    rows, columns = np.nonzero(robot_pixels(picture))
    assert len(rows) > 100
    assert 60 < columns.mean() < 140 and 30 < rows.mean() < 130


def test_a_robot_far_above_the_camera_is_not_in_the_picture():
    q = start("hopper")
    there = robot_pixels(render("hopper", q, 200, 150)).sum()
    q[1] += 30.0
    assert robot_pixels(render("hopper", q, 200, 150)).sum() < 0.02 * there


def test_the_camera_follows_and_the_ground_moves():
    q = np.stack([start("ant")] * 3)
    q[1, 0] += 2.0  # two tiles of the checker: the same picture but for the distance
    q[2, 0] += 0.5
    film = render("ant", q, 120, 90)
    assert film.shape == (3, 90, 120, 3)
    robots = [robot_pixels(picture) for picture in film]
    assert (robots[0] == robots[2]).mean() > 0.99
    assert (film[0] != film[2]).any(-1).mean() > 0.05


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"joint_q must be \[6\] or \[T, 6\] for hopper, got \[7\]"):
        render("hopper", np.zeros(7))
    with pytest.raises(ValueError, match="non-finite"):
        render("hopper", np.full(6, np.nan))
    with pytest.raises(ValueError, match="width and height must be >= 1, got 0 x 5"):
        render("hopper", np.zeros(6), 0, 5)
