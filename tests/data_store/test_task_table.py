"""The 80 tasks of the multi-task data."""

import numpy as np
import pytest

from pwm_fast.data.task_table import action_dims, fitted, padded_dims, select, set_of, tasks


def test_the_sets_have_their_tasks_in_order():
    assert len(tasks("mt80")) == 80 and tasks("mt80")[:30] == tasks("mt30")
    assert [tasks()[i].name for i in (0, 7, 26, 29, 30, 79)] == [
        "walker-stand", "pendulum-swingup", "reacher-three-easy", "pendulum-spin", "mw-assembly", "mw-hand-insert",
    ]  # fmt: skip
    assert all(task.suite == ("dm_control" if i < 30 else "metaworld") for i, task in enumerate(tasks()))
    assert {task.episode_length for task in tasks("mt30")} == {500}
    assert all((task.obs_dim, task.action_dim, task.episode_length) == (39, 4, 100) for task in tasks()[30:])
    with pytest.raises(ValueError, match="unknown set of tasks 'mt3'; did you mean 'mt30'"):
        tasks("mt3")


def test_padded_dimensions_tell_the_set():
    assert padded_dims("mt30") == (24, 6) and padded_dims("mt80") == (39, 6)
    assert set_of(24, 6) == "mt30" and set_of(39, 6) == "mt80" and set_of(11, 3) is None


def test_action_dims_fit_the_number_of_tasks():
    assert action_dims(30)[:8] == [6, 6, 6, 6, 2, 2, 1, 1] and len(action_dims(80)) == 80 and action_dims(7) is None


def test_tasks_are_chosen_by_name_set_and_suite():
    names = [task.name for task in tasks()]
    assert select(["mw-assembly", "walker-run"], names) == [2, 30]
    assert select(["mt30"], names) == list(range(30)) == select(["dm_control"], names)
    assert select(["metaworld"], names) == list(range(30, 80))
    with pytest.raises(ValueError, match="unknown task 'wlaker-run'; did you mean 'walker-run'"):
        select(["wlaker-run"], names)
    with pytest.raises(ValueError, match="unknown task 'metaworld'"):
        select(["metaworld"], names[:30])


def test_rows_are_padded_with_zeros_behind_or_cut():
    rows = np.arange(1.0, 11.0, dtype=np.float32).reshape(2, 5)
    wide = fitted(rows, 24)
    assert wide.shape == (2, 24) and wide.dtype == np.float32
    assert (wide[:, :5] == rows).all() and (wide[:, 5:] == 0).all()
    assert (fitted(rows, 3) == rows[:, :3]).all() and (fitted(rows, 5) == rows).all()
    assert fitted(rows[0], 6).tolist() == [1, 2, 3, 4, 5, 0]
