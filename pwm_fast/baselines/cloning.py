"""Behaviour cloning on the best episodes of a store: a baseline, and where extraction may start from.

A cloned policy lives where the data is, so where the world model is right; one that starts from random weights first
finds the model's errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pwm_fast.data.episodes import EpisodeStore, WindowSampler
from pwm_fast.data.packed import best_episodes
from pwm_fast.data.task_table import fitted
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.optim import Adam
from pwm_fast.models.world_model import WorldModel

LOG_STD = -2.3  # of cloned actors: with 0.37, what random ones start with, clones of the humanoid fall in 100 steps
ENOUGH = 40_000  # transitions: below, clones of the humanoid fall


@torch.no_grad()
def clone(
    extraction: Extraction,
    world_model: WorldModel,
    data: EpisodeStore | Sequence[tuple[EpisodeStore, np.ndarray]],
    share: float | None = None,
    steps: int = 4000,
    batch_size: int = 256,
    learning_rate: float = 5e-4,
) -> None:
    """Set the extraction's actors, each by its own seed, to regress the actions of the best episodes (Adam, MSE).

    `data`: a store, or for each policy one and the ids of the episodes to learn from. `share` of their transitions: by
    default a tenth, and of few as much as gives `ENOUGH`, at most 60%.
    Raises ValueError for a share outside (0, 1] or steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    actor, policies, c = extraction.actor, len(extraction.seeds), world_model.config
    everything = (data, np.arange(data.num_episodes)) if isinstance(data, EpisodeStore) else None
    best: dict[tuple[int, bytes], np.ndarray] = {}  # of each different choice once
    samplers = []
    for (store, ids), seed in zip([everything] * policies if everything else data, extraction.seeds, strict=True):
        key = (id(store), ids.tobytes())
        if key not in best:
            enough = min(max(0.1, ENOUGH / int(store.lengths[ids].sum())), 0.6)
            best[key] = best_episodes(store, enough if share is None else share, ids)
        samplers.append(WindowSampler(store, 1, best[key], seed=seed))
    actor.parameters["log_std"].fill_(LOG_STD)
    device = actor.parameters.flat.device
    optimizer = Adam(actor.parameters, policies, (0.9, 0.999))
    active = torch.ones(policies, dtype=torch.bool, device=device)
    for step in range(steps):
        batches = [sampler.windows(step, batch_size) for sampler in samplers]
        obs = torch.from_numpy(np.stack([fitted(b["obs"][0], c.obs_dim) for b in batches])).to(device)  # [P, B, S]
        goal = torch.from_numpy(np.stack([fitted(b["action"][0], c.action_dim) for b in batches])).to(device)
        noise = torch.zeros_like(goal)
        sample = actor.forward(world_model.encode(obs, _task(extraction)), noise)
        actor.backward((sample.action - goal) * (2.0 / goal[0].numel()), noise, sample)
        rate = torch.full((policies,), learning_rate * (1.0 - step / steps), device=device)
        optimizer.step(rate, 1.0, active)


def _task(extraction: Extraction) -> torch.Tensor | None:
    ids = extraction.task_ids
    return None if ids is None else ids[:, None].to(extraction.iteration.device)
