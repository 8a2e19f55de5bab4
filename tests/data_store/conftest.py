"""Episodes whose every number says where it came from. The folder's tests share `archives.py`, so it is on the path."""

import sys
from pathlib import Path

import numpy as np
import pytest

from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter

sys.path.insert(0, str(Path(__file__).parent))
S, A = 5, 2


def make_episode(index: int, length: int) -> dict[str, np.ndarray]:
    """obs[t, s] = 1000 index + t + s/8, action[t, a] = -obs[t, a], reward[t] = index + t/256."""
    obs = 1000.0 * index + np.arange(length + 1)[:, None] + np.arange(S) / 8.0
    return {"obs": obs, "action": -obs[:-1, :A], "reward": index + np.arange(length) / 256.0}


def write_store(path: Path, lengths: list[int], tasks: int = 2, first: int = 0) -> EpisodeStore:
    """Episode i has lengths[i] transitions, terminates if i is odd and belongs to task i % tasks."""
    names = [f"task-{i}" for i in range(tasks)]
    with EpisodeWriter(path, S, A, task_names=names, append=first > 0) as writer:
        for i, length in enumerate(lengths, start=first):
            writer.add(**make_episode(i, length), terminated=i % 2 == 1, task=i % tasks)
    return EpisodeStore.open(path)


@pytest.fixture
def lengths() -> list[int]:
    return [7, 1, 12, 3, 20]


@pytest.fixture
def store(tmp_path: Path, lengths: list[int]) -> EpisodeStore:
    return write_store(tmp_path / "store", lengths)


@pytest.fixture
def write():
    """The function `write_store`, for tests that want stores of their own."""
    return write_store


@pytest.fixture
def episode():
    """The function `make_episode`."""
    return make_episode
