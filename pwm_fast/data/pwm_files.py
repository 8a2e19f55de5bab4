"""PWM's data of differentiable tasks: `ep_data_HopperEnv.pt` and the like, a TensorDict of sequences in one file.

obs [N, T, S], action [N, T, A], reward [N, T] and term [N, T], by rows that were arrived at (`foreign_episodes.py`).
A row whose `term` is set ended its episode for good.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pwm_fast.data.foreign_episodes import (
    EpisodeSource,
    ForeignEpisode,
    arriving_rows,
    find_columns,
    sequence_shape,
)
from pwm_fast.data.stored_zip import ForeignFileError
from pwm_fast.data.torch_files import open_torch_file

COLUMNS = ("obs", "action", "reward")
TASKS = {
    "HopperEnv": "hopper",
    "AntEnv": "ant",
    "AnymalEnv": "anymal",
    "HumanoidEnv": "humanoid",
    "SNUHumanoidEnv": "snu-humanoid",
}


def task_of(path: Path) -> str | None:
    """The task that a file's name tells, if any."""
    found = re.search(r"(?:^|_)([A-Za-z]+Env)(?:_|\.|$)", path.name)
    return TASKS.get(found.group(1)) if found else None


class DflexData(EpisodeSource):
    """A file of PWM's single-task data; a unit is a sequence. `task` names its task (default: by the file's name).

    Raises FileNotFoundError, ForeignFileError, and ValueError where the task is not known.
    """

    def __init__(self, path: str | os.PathLike[str], task: str | None = None, verify: bool = True, tree: Any = None):
        path = Path(path)
        columns = find_columns(open_torch_file(path, verify) if tree is None else tree, COLUMNS)
        if columns is None:
            raise ForeignFileError(f"{path} is no data of PWM: it needs columns {', '.join(COLUMNS)}")
        name = task or task_of(path)
        if name is None:
            raise ValueError(f"{path.name} does not tell its task (such as ep_data_HopperEnv.pt): give --task NAME")
        columns = {key: columns[key] for key in (*COLUMNS, "term") if key in columns}
        self.path, self.name, self.size, self.task_names = path, path.name, path.stat().st_size, [name]
        self.num_units, _, self.obs_dim, self.action_dim = sequence_shape(columns, path)
        if "term" in columns and columns["term"].shape[2:] not in ((), (1,)):
            raise ForeignFileError(f"{path}: term must be [N, T], got {columns['term'].shape}")
        self._columns = columns

    def episodes(self, first: int, tasks: frozenset[int] | None) -> Iterator[tuple[int, list[ForeignEpisode]]]:
        columns = {name: column.numpy() for name, column in self._columns.items()}
        for i in range(first, self.num_units):
            ended = columns["term"][i].reshape(-1) != 0 if "term" in columns else None
            obs, action, reward = (columns[name][i] for name in COLUMNS)
            yield i + 1, arriving_rows(obs, action, reward.reshape(-1), ended, 0)
