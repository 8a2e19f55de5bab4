"""May extraction round more coarsely here? The actors' gradient decides, against float64 on the same step.

A low precision is a choice of speed over digits, so it is checked on the world model and the states it is to run on:
rounding that is harmless with one model is amplified by another's 16 steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pwm_fast.learning.configuration import ExtractionConfig
from pwm_fast.learning.extraction import Extraction
from pwm_fast.models.world_model import WorldModel

# Measured on a CPU with random models, 32 start states: 1 - cosine of 5e-14 (1M) and 4e-14 (5M) in fp32, 5e-5 and 2e-5
# in bf16; with 64 of MT80's shapes 8e-6 and 8e-5 in bf16, 7e-6 and 7e-5 on native products, which round factors only.
# TF32 needs a GPU. A gradient 2.5 degrees off its direction (0.999) still ascends; below, something is lost.
LEAST_COSINE = {"fp32": 0.99999, "tf32": 0.9999, "bf16": 0.999}


class PrecisionError(ValueError):
    """A precision whose gradients are too far from float64's."""


@torch.no_grad()
def gradient_cosines(
    world_model: WorldModel,
    config: ExtractionConfig,
    obs: Tensor,
    precision: str,
    task_ids: Tensor | None = None,
    seeds: list[int] | None = None,
) -> Tensor:
    """Cosine [P] between the actors' gradient in `precision` and in float64, of a first step from obs [P, B, S].

    The batch size is that of `obs`. NaN where either is not finite.
    """
    settings = replace(config, batch_size=obs.shape[1])
    known = seeds or list(range(obs.shape[0]))
    low = Extraction(world_model, settings, task_ids, known, precision=precision)
    exact = Extraction(world_model.copy().double(), settings, task_ids, known)
    for mine, theirs in ((exact.actor, low.actor), (exact.critic, low.critic)):
        mine.parameters.flat.copy_(theirs.parameters.flat)
    noise = low.action_noise(low.iteration)
    low.step(obs, noise)
    exact.step(obs, noise.double())
    return cosine_similarity(low.actor.parameters.grad.double(), exact.actor.parameters.grad, dim=1)


def check_precision(
    world_model: WorldModel,
    config: ExtractionConfig,
    obs: Tensor,
    precision: str,
    task_ids: Tensor | None = None,
    seeds: list[int] | None = None,
) -> float:
    """The lowest of `gradient_cosines`; raises PrecisionError if it is below `LEAST_COSINE[precision]`."""
    least = float(gradient_cosines(world_model, config, obs, precision, task_ids, seeds).min())
    if not least >= LEAST_COSINE[precision]:
        raise PrecisionError(
            f"precision {precision}: the actor gradient's cosine with float64 is {least:.6f}, at least "
            f"{LEAST_COSINE[precision]} is needed; use a higher precision (fp32 is the highest)"
        )
    return least
