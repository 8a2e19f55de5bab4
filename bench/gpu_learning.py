"""Pre-training steps per second, and a small task that must still be learned: a point mass that is to come to rest.

The task's world model is learned here from random motion, the policy extracted from it by captured steps, and judged in
the true dynamics.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import torch
from gpu_ladder import ACTION_DIM, OBS_DIM, TASKS, make_world_model
from gpu_timing import Run
from torch import Tensor

from pwm_fast.learning.captured import StepGraph
from pwm_fast.learning.configuration import ExtractionConfig
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.pretraining import PRESETS, Pretraining, PretrainingConfig, Windows
from pwm_fast.learning.pretraining_graph import PretrainingGraph
from pwm_fast.learning.step_inputs import StartTable
from pwm_fast.learning.store_training import fit_steps
from pwm_fast.models.policy import Policy
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

POINT_STEPS = 40
# Measured on a CPU: random actions -585, none -519, extracted policies of 5 seeds -25.7 to -22.5; the best of 576
# proportional-derivative controllers has -22.3.
LEAST_POINT_RETURN = -40.0


def random_windows(rows: int, horizon: int, device: torch.device) -> Windows:
    g = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
    task = torch.randint(TASKS, (rows,), generator=g, device=device)
    obs, action = draw(horizon + 1, rows, OBS_DIM), draw(horizon, rows, ACTION_DIM).tanh()
    return Windows(obs, action, draw(horizon, rows), torch.zeros(horizon, rows, device=device), task)


def pretraining(run: Run) -> None:
    """Steps per second of world-model learning: operation by operation, captured, captured in lower precisions."""
    for size in ("dry",) if run.dry else ("5M", "48M"):
        rows, horizon = (8, 2) if run.dry else (256, 16)
        plain = 0.0
        for name, precision in (("eager", "fp32"), ("graph", "fp32"), ("graph", "tf32"), ("graph", "bf16")):
            model = make_world_model(size, run.device)
            config = PretrainingConfig(batch_size=rows, horizon=horizon, precision=precision)
            windows = random_windows(rows, horizon, run.device)
            learner = Pretraining(model, config, lambda step, w=windows: w)
            first = learner.step()["total"]
            if name == "eager":
                seconds = run.seconds(learner.step, budget=1.0)
            else:
                graph, steps = PretrainingGraph(learner, ring=32), 2 if run.dry else 16
                seconds = run.seconds(lambda g=graph, n=steps: g.advance(n), budget=1.0) / steps
                last = float(graph.run(2)["total"][-1])
                run.require(last < first, f"pretraining {size} {name} {precision}: loss went from {first} to {last}")
            plain = plain or seconds
            run.record(
                f"pretraining/{size} {name} {precision}", 1 / seconds, "steps/s", "higher", times_eager=plain / seconds
            )
            del learner, model
            gc.collect()


def point_step(obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """The next state [..., 4] (position, speed) and the reward [...] of a point pushed by actions [..., 2]."""
    place, speed = obs[..., :2], obs[..., 2:]
    reward = -(place.square().sum(-1) + 0.1 * speed.square().sum(-1))
    after = 0.95 * speed + 0.2 * action
    return torch.cat([place + 0.2 * after, after], -1), reward


def point_windows(step: int, rows: int, device: torch.device) -> Windows:
    g = torch.Generator(device).manual_seed(step)
    obs = torch.randn(rows, 4, generator=g, device=device)
    action = 2 * torch.rand(rows, 2, generator=g, device=device) - 1
    after, reward = point_step(obs, action)
    return Windows(torch.stack([obs, after]), action[None], reward[None], torch.zeros(1, rows, device=device))


@torch.no_grad()
def point_return(policy: Policy, device: torch.device) -> float:
    """Mean sum of rewards of `POINT_STEPS` true steps from 256 states."""
    obs = torch.randn(256, 4, generator=torch.Generator(device).manual_seed(99), device=device)
    total = torch.zeros(256, device=device)
    for _ in range(POINT_STEPS):
        obs, reward = point_step(obs, policy.act(obs))
        total += reward
    return float(total.mean())


def learn_point(device: torch.device, seeds: tuple[int, ...] = (0, 1)) -> tuple[float, list[float]]:
    """The true return of untrained actors, and those of extracted ones by seed."""
    torch.manual_seed(0)
    with torch.device(device):
        model = WorldModel(WorldModelConfig(4, 2, 4, 64, 0, 0, latent="observation", num_bins=1))
    fit_steps(model, point_windows(0, 4096, device))
    config = replace(PRESETS["observation"], steps=500, batch_size=256, learning_rate=3e-3, reward_coef=1.0)
    learner = Pretraining(model, config, lambda step: point_windows(step, config.batch_size, device))
    PretrainingGraph(learner).run(config.steps)
    settings = ExtractionConfig(
        batch_size=32, actor_units=(32, 32), critic_units=(32, 32), critic_epochs=2, actor_lr=3e-3, critic_lr=2e-3
    )
    ext = Extraction(model, settings, seeds=seeds, total_steps=200)
    before = sum(point_return(p, device) for p in ext.policies()) / len(seeds)
    states = torch.randn(2000, 4, generator=torch.Generator(device).manual_seed(5), device=device)
    StepGraph(ext, StartTable(ext, states)).run(200)
    return before, [point_return(p, device) for p in ext.policies()]


def learning(run: Run) -> None:
    before, after = learn_point(run.device)
    run.require(min(after) > LEAST_POINT_RETURN, f"the point mass was not learned: {before:.1f} -> {after}")
    run.record("learning/point mass", min(after), "return", "higher", untrained=before)
