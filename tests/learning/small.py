"""Small world models and extractions in float64, shared by the tests of extraction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast.learning.extraction import Extraction, ExtractionConfig
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

OBS_DIM, ACTION_DIM, TASKS = 7, 3, 4
SMALL = {"horizon": 5, "batch_size": 6, "actor_units": (12, 9), "critic_units": (13, 7), "critic_epochs": 2}


def world_model(
    seed: int = 0, dtype: torch.dtype = torch.float64, tasks: int = TASKS, latent: str = "simnorm", **options: Any
) -> WorldModel:
    """A world model with every parameter random, so that no gradient is zero by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    residual = latent == "observation"
    config = WorldModelConfig(
        OBS_DIM,
        ACTION_DIM,
        latent_dim=OBS_DIM if residual else 16,
        mlp_dim=24,
        encoder_dim=20,
        encoder_layers=0 if residual else 2,
        latent=latent,
        num_tasks=tasks,
        task_dim=5 if tasks else 0,
        **options,
    )
    model = WorldModel(config).to(dtype)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if "ln.weight" in name or name in ("obs_std", "reward_scale", "step_std"):
                value.copy_(1 + 0.1 * noise)
            else:
                value.copy_(0.4 * noise)
    return model


def extraction(
    model: WorldModel,
    policies: int = 1,
    seeds: list[int] | None = None,
    task_ids: list[int] | None = None,
    precision: str = "fp32",
    **options: Any,
) -> Extraction:
    """An extraction with the networks of `SMALL`; policy p has seed 10 + p and task p modulo the number of tasks."""
    tasks = model.config.num_tasks
    if task_ids is None and tasks:
        task_ids = [p % tasks for p in range(policies)]
    seeds = seeds or [10 + p for p in range(policies)]
    return Extraction(
        model, ExtractionConfig(**{**SMALL, **options}), task_ids, seeds, total_steps=50, precision=precision
    )


def start_obs(ext: Extraction, seed: int = 0) -> Tensor:
    """Random start observations [P, B, S] in the extraction's dtype; policy p's do not depend on the others."""
    batch = ext.config.batch_size
    obs = [
        torch.randn(batch, OBS_DIM, generator=torch.Generator().manual_seed(1000 * seed + s), dtype=torch.float64)
        for s in ext.seeds
    ]
    return torch.stack(obs).to(ext.actor.parameters.flat.dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected."""
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()
