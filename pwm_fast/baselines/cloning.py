"""Behaviour cloning on the best episodes of a store: what the same data gives without a world model's imagination."""

from __future__ import annotations

import numpy as np
import torch

from pwm_fast.data.episodes import EpisodeStore, WindowSampler
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.optim import Adam
from pwm_fast.models.policy import Policy
from pwm_fast.models.world_model import WorldModel


@torch.no_grad()
def clone(
    world_model: WorldModel,
    store: EpisodeStore,
    task: str,
    share: float = 0.1,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 5e-4,
    seed: int = 0,
) -> Policy:
    """Regress the actions of the `share` of episodes with the highest returns; extraction's own actor and encoder.

    Raises ValueError for a share outside (0, 1] or steps < 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    returns = store.statistics()["returns"]
    best = np.argsort(returns)[-max(int(share * len(returns)), 1) :]
    sampler = WindowSampler(store, 1, best, seed=seed)
    extraction = Extraction(world_model, seeds=[seed], tasks=[task])
    actor, active = extraction.actor, torch.ones(1, dtype=torch.bool)
    optimizer = Adam(actor.parameters, 1, (0.9, 0.999))
    for step in range(steps):
        batch = sampler.windows(step, batch_size)
        obs, goal = torch.from_numpy(batch["obs"][0]), torch.from_numpy(batch["action"][0])
        noise = torch.zeros(1, *goal.shape)
        sample = actor.forward(world_model.encode(obs)[None], noise)
        error = sample.action - goal
        actor.backward(error * (2.0 / error.numel()), noise, sample)
        rate = learning_rate * (1.0 - step / steps)
        optimizer.step(torch.tensor([rate]), 1.0, active)
    return extraction.policies()[0]
