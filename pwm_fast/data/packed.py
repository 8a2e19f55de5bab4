"""A small part of an episode store in one file of a few megabytes, for shipping beside a world model.

Start states and model rehearsal need variety rather than whole episodes, so a pack holds short pieces of many episodes
from worst to best, half precision, compressed. `unpack` makes an episode store of it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError
from pwm_fast.state_files import atomic_file

FORMAT = "pwm_fast.episodes.1"


def pack(store: EpisodeStore, path: str | Path, transitions: int = 20_000, piece: int = 64, seed: int = 0) -> int:
    """Write about `transitions` transitions in pieces of at most `piece`; returns how many.

    Pieces come from episodes drawn uniformly by return rank; every other piece is an episode's end, so that falls are
    among them.
    """
    rng = np.random.default_rng(seed)
    by_return = np.argsort(store.statistics()["returns"], kind="stable")
    count = max(transitions // piece, 1)
    chosen = by_return[np.linspace(0, len(by_return) - 1, count).round().astype(int)]
    obs, action, reward, terminated, lengths = [], [], [], [], []
    for i, index in enumerate(chosen):
        episode = store.episode(int(index))
        total = len(episode["reward"])
        length = min(piece, total)
        start = total - length if i % 2 else int(rng.integers(total - length + 1))
        obs.append(episode["obs"][start : start + length + 1])
        action.append(episode["action"][start : start + length])
        reward.append(episode["reward"][start : start + length])
        terminated.append(bool(episode["terminated"][start + length - 1]))
        lengths.append(length)
    with atomic_file(path) as file:
        np.savez_compressed(
            file,
            format=np.array(FORMAT),
            task_names=np.array(store.task_names),
            lengths=np.array(lengths, np.int32),
            terminated=np.array(terminated),
            obs=np.concatenate(obs).astype(np.float16),
            action=np.concatenate(action).astype(np.float16),
            reward=np.concatenate(reward).astype(np.float16),
        )
    return int(np.sum(lengths))


def unpack(path: str | Path, destination: str | Path) -> EpisodeStore:
    """Make an episode store at `destination` (opened if it is there already) from a pack.

    Raises FileNotFoundError, or StoreError for a damaged pack.
    """
    if (Path(destination) / "meta.json").exists():
        return EpisodeStore.open(destination)
    try:
        with np.load(path, allow_pickle=False) as pack:
            if str(pack["format"]) != FORMAT:
                raise StoreError(f"{path} is no pack of episodes (format {pack['format']})")
            obs, action = pack["obs"].astype(np.float32), pack["action"].astype(np.float32)
            reward, lengths = pack["reward"].astype(np.float32), pack["lengths"]
            names = [str(n) for n in pack["task_names"]]
            row = np.concatenate([[0], np.cumsum(lengths)])
            with EpisodeWriter(destination, obs.shape[1], action.shape[1], task_names=names) as writer:
                for i, (a, b) in enumerate(pairwise(row)):
                    writer.add(obs[a + i : b + i + 1], action[a:b], reward[a:b], bool(pack["terminated"][i]))
    except (BadZipFile, KeyError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is damaged: {error}") from error
    return EpisodeStore.open(destination)
