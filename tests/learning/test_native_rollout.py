"""Steps on the native rollout against the same steps in float64, step by step; when it runs and when it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small import OBS_DIM, extraction, relative, start_obs, world_model

from pwm_fast import backend
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.imagination import Rollout

pytestmark = pytest.mark.skipif(backend.native is None, reason=f"no native module: {backend.native_reason}")

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "not-detached": {"detach_actor_input": False},
    "terminations-not-detached": {"terminations": True, "detach_actor_input": False},
    "observation-latents": {"latent": "observation", "terminations": True},
}


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "native")


def make(
    dtype: torch.dtype = torch.float32,
    latent: str = "simnorm",
    policies: int = 2,
    dims: Sequence[int] = (),
    **options: Any,
) -> Extraction:
    """`dims`: how many actions each policy's task has."""
    ext = extraction(world_model(dtype=dtype, termination_dim=11, latent=latent), policies=policies, **options)
    if dims:
        ext.actor.restrict(dims)
    return ext


def pair(**options: Any) -> tuple[Extraction, Extraction]:
    """The same networks in float64 and in float32."""
    exact, fast = (make(dtype, **options) for dtype in (torch.float64, torch.float32))
    fast.actor.parameters.flat.copy_(exact.actor.parameters.flat)
    fast.critic.parameters.flat.copy_(exact.critic.parameters.flat)
    return exact, fast


def imagine(ext: Extraction) -> Rollout:
    return ext.imagination.rollout(ext.actor, start_obs(ext), ext.action_noise(ext.iteration))


@pytest.mark.parametrize("policies", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_agree_with_those_in_float64(name: str, policies: int) -> None:
    exact, fast = pair(policies=policies, **VARIANTS[name])
    metrics, expected = fast.step(start_obs(fast)), exact.step(start_obs(exact))
    assert fast.imagination._native._plans and not exact.imagination._native._plans
    assert relative(fast.actor.parameters.grad.double(), exact.actor.parameters.grad) < 1e-4
    for key in ("actor_loss", "imagined_return", "imagined_reward", "actor_grad_norm"):
        assert relative(metrics[key].double(), expected[key]) < 1e-4, key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rollouts_are_those_step_by_step(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, loops = (make(precision=precision) for _ in range(2))
    monkeypatch.setattr(loops.imagination._native, "available", lambda *_: False)
    fast, slow = imagine(at_once), imagine(loops)
    assert len(slow.dynamics) == at_once.config.horizon and not fast.dynamics
    for name in ("inputs", "latents", "reward"):
        ours, theirs = getattr(fast, name), getattr(slow, name)
        last = at_once.config.horizon if name == "inputs" else len(ours)  # a_H is unused
        assert relative(ours[:last], theirs[:last]) < 1e-5, name


@pytest.mark.parametrize(
    ("choice", "options", "at_once"),
    [
        ("native", {}, True),
        ("torch", {}, False),
        ("native", {"dtype": torch.float64}, False),
        ("native", {"simnorm_dim": 4}, False),
    ],
    ids=["native", "torch", "float64", "other-groups"],
)
def test_who_imagines(choice: str, options: dict[str, Any], at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, choice)
    ext = extraction(world_model(**{"dtype": torch.float32, **options}))
    assert bool(imagine(ext).dynamics) is not at_once
    ext.step(start_obs(ext))
    assert not ext.diverged.any()


def test_another_world_model_is_taken_from_the_next_step_on() -> None:
    ext, fresh = make(), extraction(world_model(1, torch.float32, termination_dim=11), policies=2)
    before = imagine(ext).latents.clone()
    ext.set_world_model(world_model(1, torch.float32, termination_dim=11))
    after = imagine(ext).latents
    assert torch.equal(after, imagine(fresh).latents) and not torch.equal(after, before)


def test_rollouts_of_other_shapes_have_memory_of_their_own() -> None:
    ext = make(policies=1)
    first, gradients = imagine(ext), []
    kept = first.latents.clone()
    for noise in (torch.randn(1, 9, 4, 3), torch.randn(1, 2, 7, 3)):
        ext.imagination.backward(ext.actor, first, torch.ones_like(first.reward), None, kept[:, -1])
        gradients.append(ext.actor.parameters.grad.clone())
        ext.imagination.rollout(ext.actor, torch.randn(1, noise.shape[2], OBS_DIM), noise)
    assert torch.equal(*gradients) and gradients[0].any() and torch.equal(first.latents, kept)
    assert imagine(ext).latents.data_ptr() == first.latents.data_ptr()


def test_tasks_of_fewer_actions() -> None:
    exact, fast = pair(detach_actor_input=False, dims=[3, 1])
    for ext in (exact, fast):
        ext.step(start_obs(ext))
        action = imagine(ext).inputs[:-1, 1, :, -3:]
        assert action[..., :1].abs().min() > 0 and not action[..., 1:].any()
    assert relative(fast.actor.parameters.grad.double(), exact.actor.parameters.grad) < 1e-4
