"""TD-MPC2's multi-task data: chunks of sequences in files of torch.save, tens of gigabytes in all.

A chunk is a TensorDict of obs [N, T, S], action [N, T, A], reward [N, T] and task [N, T], with T = 501 for MT30 and 101
for MT80 (there partly pieces of longer episodes). It is read by memory map, one sequence at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pwm_fast.data.foreign_episodes import (
    MAX_TASKS,
    EpisodeSource,
    ForeignEpisode,
    arriving_rows,
    find_columns,
    sequence_shape,
)
from pwm_fast.data.stored_zip import ForeignFileError
from pwm_fast.data.task_table import set_of, tasks
from pwm_fast.data.torch_files import open_torch_file

COLUMNS = ("obs", "action", "reward", "task")


class Chunk(EpisodeSource):
    """A chunk of TD-MPC2's data; a unit is a sequence.

    `verify` compares checksums, which reads the file once more. Raises FileNotFoundError and ForeignFileError.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True, tree: Any = None):
        path = Path(path)
        columns = find_columns(open_torch_file(path, verify) if tree is None else tree, COLUMNS)
        if columns is None:
            raise ForeignFileError(f"{path} is no chunk of TD-MPC2's data: it needs columns {', '.join(COLUMNS)}")
        columns = {name: columns[name] for name in COLUMNS}
        self.path, self.name, self.size = path, path.name, path.stat().st_size
        self.num_units, _, self.obs_dim, self.action_dim = sequence_shape(columns, path)
        if columns["task"].storage.dtype.kind != "i" or len(columns["task"].shape) != 2:
            raise ForeignFileError(f"{path}: task must be whole numbers [N, T], got {columns['task'].shape}")
        self._columns = columns
        known = set_of(self.obs_dim, self.action_dim)
        if known is not None:
            self.task_names = [task.name for task in tasks(known)]
        else:
            last = int(np.max(columns["task"].numpy()[:, -1]))
            if not 0 <= last < MAX_TASKS:
                raise ForeignFileError(f"{path}: task numbers must be in [0, {MAX_TASKS}), got {last}")
            self.task_names = [f"task-{number}" for number in range(last + 1)]

    def episodes(self, first: int, tasks: frozenset[int] | None) -> Iterator[tuple[int, list[ForeignEpisode]]]:
        obs, action, reward, task = (self._columns[name].numpy() for name in COLUMNS)
        for i in range(first, self.num_units):
            number = int(task[i, -1])
            if not 0 <= number < len(self.task_names) or (task[i, 1:] != number).any():
                raise ForeignFileError(
                    f"{self.path}: sequence {i} must be of one task in [0, {len(self.task_names)}), got "
                    f"{task[i].min()} to {task[i].max()}"
                )
            if tasks is not None and number not in tasks:
                yield i + 1, []
            else:
                yield i + 1, arriving_rows(obs[i], action[i], reward[i].reshape(-1), None, number)
