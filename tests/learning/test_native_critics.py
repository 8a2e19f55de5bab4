"""Critics trained in one native call against the same steps minibatch by minibatch, on torch's float64 operations."""

import copy

import pytest
import torch
from small import extraction, relative, start_obs, world_model

from pwm_fast import backend

pytestmark = pytest.mark.skipif(backend.native is None, reason=f"no native module: {backend.native_reason}")


@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_agree_with_those_in_float64(shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = extraction(world_model(), policies=2, shuffle=shuffle)
    fast = extraction(world_model(dtype=torch.float32), policies=2, shuffle=shuffle)
    fast.actor.parameters.flat.copy_(exact.actor.parameters.flat)
    fast.critic.parameters.flat.copy_(exact.critic.parameters.flat)
    start = exact.critic.parameters.flat.clone()
    monkeypatch.setenv(backend.VARIABLE, "native")
    metrics, expected = fast.step(start_obs(fast)), exact.step(start_obs(exact))
    change, exact_change = fast.critic.parameters.flat.double() - start, exact.critic.parameters.flat - start
    assert relative(change, exact_change) < 1e-3  # Adam shows small gradients' rounding in full
    for name in ("critic_loss", "critic_grad_norm", "target"):
        assert relative(metrics[name].double(), expected[name]) < 1e-4, name


@pytest.mark.parametrize(("choice", "native"), [("native", True), ("torch", False)])
def test_the_backend_decides(choice: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, choice)
    assert extraction(world_model(dtype=torch.float32))._native_critics.available() is native
    assert not extraction(world_model())._native_critics.available()  # float64 is torch's


def test_a_copy_trains_its_own_critics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "native")
    original = extraction(world_model(dtype=torch.float32))
    original.step(start_obs(original))
    twin, before = copy.deepcopy(original._native_critics), original.critic.parameters.flat.clone()
    rows = original._rows(
        original.imagination.rollout(original.actor, start_obs(original), original.action_noise(original.iteration)),
        torch.ones(original.config.horizon, 1, original.config.batch_size),
    )
    lr, active = torch.full((1,), 0.01), torch.ones(1, dtype=torch.bool)
    twin(rows, original._orders(rows.latents.shape[1]), lr, active)
    assert torch.equal(original.critic.parameters.flat, before)
    assert not torch.equal(twin._critic.parameters.flat, before)
