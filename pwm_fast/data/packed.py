"""A small part of an episode store in one file of a few megabytes, for shipping beside a world model.

It holds short pieces of many episodes rather than few whole ones: start states and cloning need variety. Half
precision, compressed; the last action is left out of observations that show it. `unpack` makes an episode store of it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError
from pwm_fast.state_files import atomic_file

FORMAT = "pwm_fast.episodes.1"
TOP_SHARE = 0.2  # of transitions, in the best episodes
FROM_TOP = 0.8  # of the pieces


def best_episodes(store: EpisodeStore, share: float, episodes: np.ndarray | None = None) -> np.ndarray:
    """Ids of the episodes, of all or of some, with the highest returns that hold `share` of their transitions.

    Worst first. Pieces of episodes are ranked by the whole episodes' returns.
    Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    returns = np.asarray(store.meta.get("episode_return", store.statistics()["returns"]))
    ids = np.arange(store.num_episodes) if episodes is None else np.asarray(episodes)
    order = ids[np.argsort(returns[ids], kind="stable")]
    held = np.cumsum(store.lengths[order][::-1])[::-1]  # by each episode and all better ones
    return order[min(int(np.searchsorted(-held, -share * held[0])), len(order) - 1) :]


def pack(store: EpisodeStore, path: str | Path, transitions: int = 54_000, piece: int = 32, seed: int = 0) -> int:
    """Write about `transitions` transitions in pieces of at most `piece`; returns how many.

    Four fifths of the pieces come from the best episodes, which hold a fifth of the transitions, the rest from any. Of
    either, one in six is an episode's beginning and one in six its end, so that starts and falls are among them.
    """
    rng = np.random.default_rng(seed)
    returns = store.statistics()["returns"]
    best, order = best_episodes(store, TOP_SHARE), np.arange(store.num_episodes)
    chosen: list[tuple[int, int, int]] = []  # episode, first row, length
    while sum(length for *_, length in chosen) < transitions:
        source = best if rng.random() < FROM_TOP else order
        episode = int(source[rng.integers(len(source))])
        total = int(store.lengths[episode])
        length, place = min(piece, total), int(rng.integers(6))
        first = {0: 0, 1: total - length}.get(place, int(rng.integers(total - length + 1)))
        chosen.append((episode, first, length))
    obs, action, reward, terminated = [], [], [], []
    for episode, first, length in chosen:
        whole, span = store.episode(episode), slice(first, first + length)
        obs.append(whole["obs"][first : first + length + 1])
        action.append(whole["action"][span])
        reward.append(whole["reward"][span])
        terminated.append(bool(whole["terminated"][first + length - 1]))
    size = store.action_dim
    shown = all(np.array_equal(o[1:, -size:], a) for o, a in zip(obs, action))
    starts = np.stack([o[0, -size:] for o in obs])
    with atomic_file(path) as file:
        np.savez_compressed(
            file,
            format=np.array(FORMAT),
            task_names=np.array(store.task_names),
            lengths=np.array([length for *_, length in chosen], np.int32),
            episode_return=returns[[episode for episode, *_ in chosen]].astype(np.float32),
            terminated=np.array(terminated),
            obs=np.concatenate(obs)[:, : -size if shown else None].astype(np.float16),
            first_shown=starts.astype(np.float16) if shown else np.zeros((0, size), np.float16),
            action=np.concatenate(action).astype(np.float16),
            reward=np.concatenate(reward).astype(np.float16),
        )
    return sum(length for *_, length in chosen)


def unpack(path: str | Path, destination: str | Path) -> EpisodeStore:
    """Make an episode store at `destination` (opened if it is there already) from a pack.

    Raises FileNotFoundError, or StoreError for a damaged pack.
    """
    if (Path(destination) / "meta.json").exists():
        return EpisodeStore.open(destination)
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["format"]) != FORMAT:
                raise StoreError(f"{path} is no pack of episodes (format {file['format']})")
            pack = {name: file[name] for name in file.files}
        obs, action, reward = (pack[name].astype(np.float32) for name in ("obs", "action", "reward"))
        rows, first_shown = np.concatenate([[0], np.cumsum(pack["lengths"])]), pack["first_shown"].astype(np.float32)
        names = [str(name) for name in pack["task_names"]]
        meta = {"episode_return": pack["episode_return"].tolist()}
        width = obs.shape[1] + first_shown.shape[1] * bool(len(first_shown))
        with EpisodeWriter(destination, width, action.shape[1], task_names=names, meta=meta) as writer:
            for i, (a, b) in enumerate(pairwise(rows)):
                seen = obs[a + i : b + i + 1]
                if len(first_shown):
                    seen = np.concatenate([seen, np.concatenate([first_shown[i : i + 1], action[a:b]])], 1)
                writer.add(seen, action[a:b], reward[a:b], bool(pack["terminated"][i]))
    except (BadZipFile, KeyError, ValueError, IndexError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is damaged: {error}") from error
    return EpisodeStore.open(destination)
