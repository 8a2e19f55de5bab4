"""Where a gradient step over static memory takes its inputs from: a table on the device, or buffers filled before it.

A table needs nothing from the host; buffers are for data that is larger than the device, or is made as training goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.sampling import START_STREAM
from pwm_fast.data.scheduler import Batch
from pwm_fast.learning import noise as counter_noise
from pwm_fast.learning.extraction import Extraction

LARGEST_TABLE = 2**31 - 1  # rows: what `noise.indices` can draw from


class StartTable:
    """All start observations on the device; a step's are drawn there, by (policy seed, step) alone.

    `obs` [N, S]; policy p draws from the `count[p]` rows that begin at `first[p]` (all of them by default). A table
    made by `start_rows` gives the states that `WindowSampler.start_states` gives, bit for bit.
    Raises ValueError for rows that are not there or not finite.
    """

    def __init__(
        self, extraction: Extraction, obs: Tensor | np.ndarray, first: Any = None, count: Any = None, check: bool = True
    ):
        e, like = extraction, extraction.actor.parameters.flat
        rows = torch.as_tensor(obs)
        if rows.dim() != 2 or rows.shape[1] != e.world_config.obs_dim:
            raise ValueError(f"start observations must be [N, {e.world_config.obs_dim}], got {tuple(rows.shape)}")
        if not 1 <= len(rows) <= LARGEST_TABLE:
            raise ValueError(f"a table holds 1 to {LARGEST_TABLE} start observations, got {len(rows)}")
        firsts = np.zeros(e.policies_count, np.int64) if first is None else np.asarray(first, np.int64)
        counts = len(rows) - firsts if count is None else np.asarray(count, np.int64)
        if firsts.shape != counts.shape or len(firsts) != e.policies_count:
            raise ValueError(f"first and count must have one entry for each of {e.policies_count} policies")
        if (firsts < 0).any() or (counts < 1).any() or (firsts + counts > len(rows)).any():
            raise ValueError(f"policies' ranges must lie within {len(rows)} rows, got {firsts} and {counts}")
        if check and not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows).all(1)).int().argmax())
            raise ValueError(f"start observations hold NaN or infinity in row {bad}: clean the data")
        self.obs = rows.to(like.device, like.dtype)
        self.first = torch.from_numpy(firsts).to(like.device)
        self.count = torch.from_numpy(counts).to(like.device)
        self.batch, self.seeds = e.config.batch_size, e.seed_tensor

    @classmethod
    def of_tasks(cls, extraction: Extraction, tables: Mapping[str, np.ndarray]) -> StartTable:
        """Each policy draws from its task's own observations [n, S]. Raises ValueError for a task without."""
        if missing := sorted(set(extraction.tasks) - set(tables)):
            raise ValueError(f"there are no start observations of {', '.join(missing)}")
        count = {task: len(table) for task, table in tables.items()}
        first = dict(zip(count, np.cumsum([0, *count.values()]).tolist()))
        of = extraction.tasks
        obs = np.concatenate(list(tables.values()))
        return cls(extraction, obs, [first[task] for task in of], [count[task] for task in of])

    def states(self, step: Tensor) -> Tensor:
        """Start observations [P, B, S] of gradient step number `step` [] int64."""
        rows = counter_noise.indices(self.seeds, step, START_STREAM, self.count, self.batch) + self.first[:, None]
        return self.obs.index_select(0, rows.flatten()).view(*rows.shape, -1)


def start_rows(store: EpisodeStore, episodes: np.ndarray | None = None) -> np.ndarray:
    """Every observation but the last of each of some episodes (None: all) [N, S], in the store's order."""
    starts = np.zeros(store.num_rows + 1, np.int8)  # +1 where an episode begins, -1 at its last row
    chosen = np.arange(store.num_episodes) if episodes is None else np.asarray(episodes)
    starts[store.episode_start[chosen]] = 1
    starts[store.episode_start[chosen + 1] - 1] = -1
    return np.asarray(store.obs)[np.cumsum(starts[:-1], dtype=np.int8) > 0]


class StagedStates:
    """A buffer of start observations [P, B, S] that the host fills before each step."""

    def __init__(self, extraction: Extraction):
        e = extraction
        self.obs = e.actor.parameters.flat.new_zeros(e.policies_count, e.config.batch_size, e.world_config.obs_dim)

    def stage(self, obs: Tensor | np.ndarray | Batch) -> None:
        """Fill the buffer, and release a batch; raises ValueError for another shape."""
        if not isinstance(obs, Batch):
            return _fill(self.obs, obs, "start observations [P, B, S]")
        with obs:
            _fill(self.obs, obs["obs"], "start observations [P, B, S]")
            obs.copied_to(self.obs.device)

    def states(self, step: Tensor) -> Tensor:
        """The buffer, whatever the step."""
        return self.obs


class StagedTrajectories:
    """Buffers of windows of the policies' own real trajectories, as `Extraction.step_along` takes them."""

    def __init__(self, extraction: Extraction):
        e, c, w = extraction, extraction.config, extraction.world_config
        like, rows = e.actor.parameters.flat, (c.horizon, e.policies_count, c.batch_size)
        self.buffers = {
            "obs": like.new_zeros(c.horizon + 1, *rows[1:], w.obs_dim),
            "action": like.new_zeros(*rows, w.action_dim),
            "reward": like.new_zeros(rows),
            "terminated": like.new_zeros(rows),
            "valid": torch.ones(rows, dtype=torch.bool, device=like.device),
        }

    def stage(self, windows: Mapping[str, Tensor | np.ndarray]) -> None:
        """Fill the buffers; raises ValueError for a missing one or another shape."""
        if missing := sorted(set(self.buffers) - set(windows)):
            raise ValueError(f"windows lack {', '.join(missing)}")
        for name, buffer in self.buffers.items():
            _fill(buffer, windows[name], name)


StepInputs = StartTable | StagedStates | StagedTrajectories


def _fill(buffer: Tensor, value: Tensor | np.ndarray, name: str) -> None:
    given = torch.as_tensor(value)
    if given.shape != buffer.shape:
        raise ValueError(f"{name} must have shape {tuple(buffer.shape)}, got {tuple(given.shape)}")
    buffer.copy_(given, non_blocking=given.device.type == "cpu" and given.is_pinned())
