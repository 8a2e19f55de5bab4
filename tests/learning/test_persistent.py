"""The gradient step on persistent kernels against the same step without them, in float64 in Triton's interpreter.

A few steps of tiny networks take 10 to 20 CPU seconds there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import OBS_DIM, extraction, relative, start_obs, world_model

from pwm_fast.kernels.triton_support import refusal
from pwm_fast.learning.captured import StepGraph
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.step_inputs import StagedStates

reason = refusal(torch.empty(1))
pytestmark = pytest.mark.skipif(bool(reason), reason=f"no persistent kernels here: {reason}")

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "fixed-blocks": {"shuffle": False},
    "terminations-not-detached": {"terminations": True, "detach_actor_input": False},
    "observation-latents": {"latent": "observation", "terminations": True},
}


def make(latent: str = "simnorm", **options: Any) -> Extraction:
    small = {"horizon": 2, "batch_size": 6, "critic_epochs": 1, "critic_minibatches": 2}
    return extraction(world_model(termination_dim=11, latent=latent), policies=2, **{**small, **options})


@pytest.mark.parametrize(
    "name, overlap",
    [
        ("paper", True),
        pytest.param("fixed-blocks", False, marks=pytest.mark.slow),
        pytest.param("terminations-not-detached", True, marks=pytest.mark.slow),
        pytest.param("observation-latents", False, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_without_them(name: str, overlap: bool) -> None:
    ext, plain = make(**VARIANTS[name]), make(**VARIANTS[name])
    graph = StepGraph(ext, StagedStates(ext), ExecutionConfig(overlap=overlap, persistent=True))
    rows = graph.run(2, lambda i: start_obs(ext, i))
    for step in range(2):
        for key, value in plain.step(start_obs(plain, step)).items():
            assert relative(rows[key][step], value) < 1e-8, (key, step)
    for one, other in ((ext.actor, plain.actor), (ext.critic, plain.critic)):
        assert relative(one.parameters.flat, other.parameters.flat) < 1e-9
    assert torch.equal(ext.critic_adam.steps, plain.critic_adam.steps)


@pytest.mark.slow
def test_another_world_model_is_taken_in_place() -> None:
    ext, plain = make(), make()
    graph = StepGraph(ext, StagedStates(ext), ExecutionConfig(overlap=False, persistent=True))
    graph.run(1, lambda i: start_obs(ext, 0))
    kernel = ext.imagination.recurrence._kernel
    places = kernel._world.data_ptr(), kernel._vectors.data_ptr()
    plain.step(start_obs(plain, 0))
    for one in (ext, plain):
        one.set_world_model(world_model(1, termination_dim=11))
    graph.run(1, lambda i: start_obs(ext, 1))
    plain.step(start_obs(plain, 1))
    assert relative(ext.actor.parameters.flat, plain.actor.parameters.flat) < 1e-9
    assert (kernel._world.data_ptr(), kernel._vectors.data_ptr()) == places


@pytest.mark.slow
def test_a_diverged_policy_is_left_alone() -> None:
    ext = make()
    graph = StepGraph(ext, StagedStates(ext), ExecutionConfig(overlap=False, persistent=True))
    ext.critic.parameters["2.bias"][: ext.config.num_critics] = 1e200
    before = ext.critic.parameters.flat.clone()
    graph.run(1, lambda i: torch.randn(2, 6, OBS_DIM))
    assert ext.diverged.tolist() == [True, False]
    assert torch.equal(ext.critic.parameters.flat[:3], before[:3])
    assert not torch.equal(ext.critic.parameters.flat[3:], before[3:])
