"""Actor and critic networks: explicit gradients against autograd, initialisation, sharing of inputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pwm_fast.models.critic import VALUE_ROWS, Critic
from pwm_fast.models.population_mlp import Activations, PopulationMLP
from pwm_fast.models.workspace import Workspace

WIDTHS = (5, 9, 7, 2)


def definition(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One network in elementary operations."""
    for i in range(2):
        x = F.mish(F.linear(x, tensors[f"{i}.weight"], tensors[f"{i}.bias"]))
        x = F.layer_norm(x, x.shape[-1:], tensors[f"{i}.ln.weight"], tensors[f"{i}.ln.bias"])
    return F.linear(x, tensors["2.weight"], tensors["2.bias"])


@pytest.mark.parametrize("groups", [1, 2, 6], ids=["one-input", "two-inputs", "own-inputs"])
def test_forward_and_backward(groups: int) -> None:
    members, rows = 6, 11
    mlp = PopulationMLP(members, WIDTHS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for view in mlp.parameters.views.values():
        view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(groups, rows, 5, generator=generator, dtype=torch.float64).requires_grad_()
    dy = torch.randn(members, rows, 2, generator=generator, dtype=torch.float64)
    copies = [{k: v.requires_grad_() for k, v in mlp.parameters.tensors(g).items()} for g in range(members)]
    expected = torch.stack([definition(copies[g], x[g * groups // members]) for g in range(members)])
    (expected * dy).sum().backward()

    y, saved = mlp.forward(x.detach())
    torch.testing.assert_close(y, expected.detach(), rtol=1e-11, atol=1e-12)
    mlp.backward(dy, saved)
    for g, copy in enumerate(copies):
        for name, value in copy.items():
            torch.testing.assert_close(mlp.parameters.grads[name][g], value.grad, rtol=1e-9, atol=1e-11)
    before = mlp.parameters.grad.clone()
    torch.testing.assert_close(mlp.input_gradient(dy, saved), x.grad, rtol=1e-9, atol=1e-11)
    assert torch.equal(mlp.parameters.grad, before)


def test_join_of_activations() -> None:
    mlp = PopulationMLP(2, WIDTHS, dtype=torch.float64)
    mlp.parameters.flat.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    dy = torch.randn(2, 6, 2, dtype=torch.float64)
    _, whole = mlp.forward(x)
    mlp.backward(dy, whole)
    expected = mlp.parameters.grad.clone()
    parts = [mlp.forward(x[:, :2])[1], mlp.forward(x[:, 2:])[1]]
    mlp.backward(dy, Activations.join(parts))
    torch.testing.assert_close(mlp.parameters.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_workspace_changes_no_number() -> None:
    mlp, workspace = PopulationMLP(2, WIDTHS, dtype=torch.float64), Workspace()
    mlp.parameters.flat.normal_(generator=torch.Generator().manual_seed(0))
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
        dy = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
        expected, saved = mlp.forward(x)
        mlp.backward(dy, saved)
        gradient = mlp.parameters.grad.clone()
        y, saved = mlp.forward(x, workspace)
        mlp.backward(dy, saved, workspace)
        assert torch.equal(y, expected) and torch.equal(mlp.parameters.grad, gradient)


def test_values_come_in_chunks() -> None:
    critic = Critic([1, 2], latent_dim=5, units=(9, 7), dtype=torch.float64)
    z = torch.randn(2, 2 * VALUE_ROWS + 3, 5, dtype=torch.float64)
    torch.testing.assert_close(critic.values(z, Workspace()), critic.forward(z)[0], rtol=1e-12, atol=1e-12)


def test_critic_initialisation() -> None:
    """Orthogonal with gain sqrt(2), zero biases, every critic its own."""
    critic = Critic([1, 2], latent_dim=16, units=(12, 8), dtype=torch.float64)
    weight = critic.parameters["0.weight"]
    assert weight.shape == (6, 12, 16)
    torch.testing.assert_close(weight @ weight.mT, 2 * torch.eye(12, dtype=torch.float64).expand(6, -1, -1))
    assert not critic.parameters["0.bias"].any() and (critic.parameters["0.ln.weight"] == 1).all()
    assert not any(torch.equal(weight[a], weight[b]) for a in range(6) for b in range(a))
    alone = Critic([2], latent_dim=16, units=(12, 8), dtype=torch.float64)
    assert torch.equal(alone.parameters.flat, critic.parameters.flat[3:])


@pytest.mark.parametrize("widths", [(3, 2), (3, 0, 2)])
def test_impossible_widths_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths must be"):
        PopulationMLP(1, widths)
