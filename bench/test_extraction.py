"""Gradient steps per second of extraction, against the plain autograd version in the same run.

    pytest bench/test_extraction.py -s

Published MT80 shapes (observations 39, actions 6, task embedding 96), H = 16, batch 64, one thread, float32. Times are
CPU seconds of this process, naive and explicit steps in turn; the fastest of each counts, for other work slows both.
The roofline is what one core reaches in multiply-adds that need no memory, measured in the same run, and the GFLOP are
those the step needs in any case. A speed counts only if the actor's gradient equals float64 autograd's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "learning"))
from naive import NaiveExtraction

from pwm_fast import backend
from pwm_fast.kernels import linear
from pwm_fast.learning.extraction import PRESETS, Extraction
from pwm_fast.models.matmul import fast_matmul
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

pytestmark = pytest.mark.timeout(0)  # a busy machine may take an hour; the figures are CPU time

OBS_DIM, ACTION_DIM, TASKS, TASK_DIM = 39, 6, 80, 96
MIN_COSINE = 0.99999


def make_world_model(size: str) -> WorldModel:
    """A model with random weights; its reward head is not zero, so that gradients are not."""
    torch.manual_seed(0)
    config = WorldModelConfig.of_size(size, OBS_DIM, ACTION_DIM, num_tasks=TASKS, task_dim=TASK_DIM)
    model = WorldModel(config)
    torch.nn.init.normal_(model._reward[-1].weight, std=0.1)
    return model


def cpu_seconds(step: Callable[[], object], repeats: int) -> float:
    """CPU seconds of one call, averaged over `repeats`."""
    start = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - start) / repeats


def actor_gradient_cosine(size: str, preset: str) -> float:
    """Cosine between the explicit float32 gradient of the actor and autograd's in float64, same weights and noise."""
    model = make_world_model(size)
    ext = Extraction(model, PRESETS[preset], task_ids=[3])
    obs, noise = batch()
    naive = NaiveExtraction(model.double(), double_copy(ext, model))
    ext.step(obs, noise)
    naive.actor_loss(obs[0].double(), noise[0].double()).backward()
    exact = naive.actor_tensors()
    explicit = torch.cat([ext.actor.parameters.grads[name].flatten() for name in exact])
    expected = torch.cat([value.grad.flatten() for value in exact.values()])
    return torch.nn.functional.cosine_similarity(explicit.double(), expected, dim=0).item()


def double_copy(ext: Extraction, model: WorldModel) -> Extraction:
    """The same networks in float64."""
    copy = Extraction(model, ext.config, ext.task_ids, ext.seeds)
    copy.actor.parameters.flat.copy_(ext.actor.parameters.flat)
    copy.critic.parameters.flat.copy_(ext.critic.parameters.flat)
    return copy


def batch(policies: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Start observations [P, B, S] and noise [P, H, B, A]."""
    c, generator = PRESETS["paper"], torch.Generator().manual_seed(1)
    obs = torch.randn(policies, c.batch_size, OBS_DIM, generator=generator)
    return obs, torch.randn(policies, c.horizon, c.batch_size, ACTION_DIM, generator=generator)


def needed_flop(ext: Extraction) -> float:
    """Floating-point operations of one step's products: no weight gradients of frozen networks, no value twice."""
    c, imagination = ext.config, ext.imagination

    def weights(layers: list) -> int:
        return sum(layer.weight.numel() for layer in layers)

    def mlp(widths: tuple[int, ...]) -> int:
        return sum(a * b for a, b in pairwise(widths))

    rows = c.batch_size * c.horizon
    frozen = c.batch_size * weights(imagination.encoder.layers) + 2 * rows * (
        weights(imagination.dynamics.layers) + weights(imagination.reward.layers)
    )
    actor, critic = ext.actor.mlp.widths, ext.critic.mlp.widths
    actor_work = rows * (2 * mlp(actor) + mlp(actor[1:]))
    train = mlp(critic) * 2 + mlp(critic[1:])
    critic_work = c.num_critics * rows * (mlp(critic) + c.critic_epochs * train)
    return 2.0 * (frozen + actor_work + critic_work) * ext.policies_count


def roofline() -> float:
    """FLOP per second of one core: multiply-adds in registers, or without native code a product of 0.7 MB."""
    if backend.native is not None:
        rounds = 100_000
        flop = backend.native.gemm_peak(rounds)[0]
        return flop / min(cpu_seconds(lambda: backend.native.gemm_peak(rounds), 5) for _ in range(100))
    x, weight, out = torch.randn(1, 224, 256), torch.randn(1, 256, 256), torch.empty(1, 224, 256)
    with fast_matmul(torch.float32, torch.device("cpu")):
        seconds = min(cpu_seconds(lambda: linear.input_grad(x, weight, out=out), 50) for _ in range(20))
    return 2.0 * 224 * 256 * 256 / seconds


@pytest.mark.parametrize("size, repeats", [("1M", 3), ("5M", 2), ("48M", 1)])
def test_gradient_steps_against_autograd(size: str, repeats: int, record_property: Callable) -> None:
    cosine = actor_gradient_cosine(size, "published-code")
    model = make_world_model(size)
    ext = Extraction(model, PRESETS["published-code"], task_ids=[3])
    naive = NaiveExtraction(model, ext)
    obs, noise = batch()
    explicit_seconds, naive_seconds = [], []
    for _ in range(5):
        naive_seconds.append(cpu_seconds(lambda: naive.step(obs[0], noise[0]), repeats))
        explicit_seconds.append(cpu_seconds(lambda: ext.step(obs), repeats))
    ours, theirs = min(explicit_seconds), min(naive_seconds)
    flop, peak = needed_flop(ext), roofline()
    print(
        f"\n{size:>4}: {1e3 * ours:.0f} ms a step ({1 / ours:.2f}/s), autograd {1e3 * theirs:.0f} ms, "
        f"ratio {theirs / ours:.2f}; {flop / 1e9:.1f} GFLOP at {flop / ours / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s "
        f"({flop / ours / peak:.0%} of roofline, where the ratio would be {theirs * peak / flop:.2f}); "
        f"gradient cosine {cosine:.7f} ({backend.describe()}, 1 thread)"
    )
    for name, value in (("ms", 1e3 * ours), ("naive_ms", 1e3 * theirs), ("ratio", theirs / ours), ("cosine", cosine)):
        record_property(f"{size}_{name}", value)
    assert cosine > MIN_COSINE


@pytest.mark.parametrize("policies", [1, 4])
def test_policies_at_once(policies: int, record_property: Callable) -> None:
    ext = Extraction(make_world_model("5M"), PRESETS["paper"], task_ids=[3] * policies, seeds=range(policies))
    obs, _ = batch(policies)
    seconds = min(cpu_seconds(lambda: ext.step(obs), 1) for _ in range(4)) / policies
    print(f"\n  5M: {policies} policies at once, {1e3 * seconds:.0f} ms per policy and step")
    record_property(f"policies_{policies}_ms", 1e3 * seconds)
    assert not ext.diverged.any()
