"""Steps per second of world-model learning, against autograd's in the same run.

    pytest bench/test_pretraining.py -s

Batches and horizons as `PRESETS`; "observation" and "simnorm" on the humanoid's shapes, "tasks" a simnorm model of 80
tasks (observations 39, actions 6, embedding 96). Float32; times are CPU seconds of this process on one thread, both
kinds of steps in turn, and the fastest of each counts, for other work slows both. On two threads, which other work
delays far more, wall time counts. The roofline is a core's multiply-adds in registers, in the same run. A speed counts
only if the gradient is that of float64 autograd.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "learning"))
from autograd_pretraining import AutogradPretraining, fused_rollout, loss_terms

from pwm_fast import backend
from pwm_fast.learning.pretraining import PRESETS, Pretraining, Windows
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

pytestmark = pytest.mark.timeout(0)
MIN_COSINE, MAX_ERROR = 0.999999, 1e-3
KINDS = {"observation": (76, 21, 0), "simnorm": (76, 21, 0), "tasks": (39, 6, 80)}


def make(kind: str, size: str) -> tuple[WorldModel, Windows]:
    torch.manual_seed(0)
    obs_dim, action_dim, tasks = KINDS[kind]
    latent = "observation" if kind == "observation" else "simnorm"
    options = {"num_tasks": tasks, "task_dim": 96} if tasks else {}
    config = WorldModelConfig.of_size(size, obs_dim, action_dim, latent, termination_dim=128, **options)
    model = WorldModel(config)
    torch.nn.init.normal_(model._reward[-1].weight, std=0.1)
    horizon, batch = PRESETS[latent].horizon, PRESETS[latent].batch_size
    ended = (torch.rand(horizon, batch) < 0.01).float()
    task = torch.randint(tasks, (batch,)) if tasks else None
    obs, action = torch.randn(horizon + 1, batch, obs_dim), torch.randn(horizon, batch, action_dim).tanh()
    return model, Windows(obs, action, torch.randn(horizon, batch), ended, task, torch.ones(horizon, batch))


def gradient_against_float64(kind: str, size: str) -> tuple[float, float]:
    """Cosine and relative error of the explicit float32 gradient."""
    model, w = make(kind, size)
    few = slice(0, 32)
    w = Windows(w.obs[:, few], w.action[:, few], w.reward[:, few], w.terminated[:, few],
                None if w.task is None else w.task[few])  # fmt: skip
    config = PRESETS[model.config.latent]
    learner = Pretraining(model, config, lambda step: w)
    learner.gradients(w)
    found = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    wide = model.double()
    fields = (w.obs, w.action, w.reward, w.terminated)
    total = loss_terms(wide, Windows(*(x.double() for x in fields), w.task), config, fused_rollout)["total"]
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(wide.parameters()))])
    return float(cosine_similarity(found, exact, dim=0)), float((found - exact).norm() / exact.norm())


def needed_flop(model: WorldModel, w: Windows) -> float:
    """Of a step's products: none with a task's embedding column twice, no gradient at what is not learned."""
    c, rows, batch = model.config, w.reward.numel(), w.reward.shape[1]
    weights = lambda layers: sum(layer.weight.numel() for layer in layers or ())  # noqa: E731
    heads = weights(model._dynamics) + weights(model._reward) + weights(model._termination)
    first = model._dynamics[0].weight.shape[0] + model._reward[0].weight.shape[0]
    # forward and weight gradients of all; input gradients, but at actions, and at observations that are not learned
    work = 3 * rows * heads - rows * first * c.action_dim - (batch * first * c.latent_dim if c.residual else 0)
    encoder = weights(model._encoder)
    return 2.0 * (work + (rows + batch) * encoder + 2 * batch * encoder)


def seconds(clock: Callable[[], float], calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """The fastest of `repeats` calls of each, taken in turn."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(repeats):
        for i, call in enumerate(calls):
            start = clock()
            call()
            best[i] = min(best[i], clock() - start)
    return best


@pytest.mark.parametrize("size", ["1M", "5M"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_against_autograd(kind: str, size: str, record_property: Callable) -> None:
    cosine, error = gradient_against_float64(kind, size)
    learners, w = [], None
    for maker in (Pretraining, AutogradPretraining):
        model, w = make(kind, size)
        learners.append(maker(model, PRESETS[model.config.latent], lambda step, w=w: w))
    steps = [learner.step for learner in learners]
    ours, theirs = seconds(time.process_time, steps, 40 if kind == "observation" else 8)
    torch.set_num_threads(2)
    two, their_two = seconds(time.perf_counter, steps, 20 if kind == "observation" else 4)
    flop, peak = needed_flop(model, w), float("nan")
    if backend.native is not None:
        rounds = 100_000
        work = backend.native.gemm_peak(rounds)[0]
        peak = work / seconds(time.process_time, [lambda: backend.native.gemm_peak(rounds)], 50)[0]
    print(
        f"\n{kind:>12} {size}: {1e3 * ours:.1f} ms a step, autograd {1e3 * theirs:.1f}, ratio {theirs / ours:.2f} "
        f"(2 threads, wall: {1e3 * two:.1f}, {1e3 * their_two:.1f}, {their_two / two:.2f}); {flop / 1e9:.2f} GFLOP at "
        f"{flop / ours / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s ({flop / ours / peak:.0%}); gradient cosine "
        f"{cosine:.8f}, error {error:.1e} ({backend.describe()})",
        end="",
    )
    for name, value in (("ms", 1e3 * ours), ("ratio", theirs / ours), ("ratio_2_threads", their_two / two)):
        record_property(f"{kind}_{size}_{name}", value)
    assert cosine > MIN_COSINE and error < MAX_ERROR
