"""The persistent rollout in Triton's interpreter against its definition under autograd in float64."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from itertools import pairwise
from typing import Any

import pytest
from closeness import relative_error
from torch import Tensor

from pwm_fast.kernels import triton_support
from pwm_fast.kernels.dynamics_rollout import DynamicsRollout, dynamics_rollout
from pwm_fast.models.policy import Actor
from pwm_fast.models.world_model import FrozenLayer

pytestmark = pytest.mark.skipif(
    triton_support.unavailable is not None or not (triton_support.interpreting or torch.cuda.is_available()),
    reason="needs Triton with a GPU or its interpreter",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"float64": 1e-12, "fp32": 1e-6, "bf16": 2e-2}


class Case:
    """A random world model, actors and noise; everything drawn in float64 from what float32 can hold."""

    def __init__(
        self,
        policies: int,
        horizon: int,
        batch: int,
        latent: int,
        action: int,
        residual: bool = False,
        shared_bias: bool = False,
        units: tuple[int, ...] = (21, 19, 18),
        hidden: tuple[int, ...] = (40, 24),
    ):
        generator = torch.Generator().manual_seed(policies * 100 + latent)

        def draw(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            value = torch.randn(size, generator=generator, dtype=torch.float64) * scale + shift
            return value.float().double().to(DEVICE)

        self.residual = residual
        self.shape = (policies, horizon, batch, latent, action)
        self.z = draw(policies, batch, latent)
        self.noise = draw(policies, horizon, batch, action)
        self.dynamics = []
        kinds = [*("mish" for _ in hidden), "none" if residual else "simnorm"]
        for kind, (k, n) in zip(kinds, pairwise((latent + action, *hidden, latent)), strict=True):
            affine = (None, None) if kind == "none" else (draw(n, shift=1.0), draw(n))
            bias = draw(1 if shared_bias else policies, n)
            self.dynamics.append(FrozenLayer(draw(n, k, scale=k**-0.5), bias, kind, *affine))
        self.actor = Actor(list(range(policies)), latent, action, units, torch.float64, DEVICE)
        for name, view in self.actor.parameters.views.items():
            if "ln" in name:
                view += draw(*view.shape, scale=0.3)
        self.d_inputs = draw(horizon, policies, batch, latent + action)
        self.d_last = draw(policies, batch, latent)

    def exact(self, detach: bool) -> tuple[Tensor, Tensor, Tensor]:
        """inputs [H, P, B, Z + A], z_H and d_action of the definition."""
        nudge = torch.zeros_like(self.noise, requires_grad=True)
        inputs, last = dynamics_rollout(
            self.z, self.noise, self.actor.parameters.views, self.actor.mlp.depth, self.dynamics, self.residual, detach,
            nudge,
        )  # fmt: skip
        (d_action,) = torch.autograd.grad((inputs, last), nudge, (self.d_inputs, self.d_last))
        return inputs.detach(), last.detach(), d_action

    def plan(self, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[DynamicsRollout, Actor]:
        policies, horizon, batch, latent, action = self.shape
        units = self.actor.mlp.widths[1:-1]
        actor = Actor(list(range(policies)), latent, action, units, dtype, DEVICE)
        actor.parameters.flat.copy_(self.actor.parameters.flat)
        layers = [
            FrozenLayer(*(t if t is None or isinstance(t, str) else t.to(dtype) for t in vars(layer).values()))
            for layer in self.dynamics
        ]
        options = {"programs": 3, **options}
        rollout = DynamicsRollout(
            layers, actor.parameters, actor.mlp.widths, policies, horizon, batch, self.residual, **options
        )
        return rollout, actor

    def run(self, rollout: DynamicsRollout, actor: Actor, detach: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        dtype = actor.parameters.flat.dtype
        inputs, latents = rollout.forward(self.z.to(dtype), self.noise.to(dtype), actor.parameters)
        d_action = rollout.backward(self.d_inputs.to(dtype), self.d_last.to(dtype), actor.parameters, detach)
        return inputs, latents, d_action


CASES = {
    "one policy": Case(1, 3, 5, 24, 3),
    "two policies, shared biases": Case(2, 2, 17, 16, 5, shared_bias=True),
    "three policies, tiles that straddle them": Case(3, 2, 7, 72, 2, units=(33,), hidden=(104,)),
    "residual": Case(2, 3, 9, 11, 3, residual=True),
    "residual, one state": Case(1, 2, 1, 11, 1, residual=True, shared_bias=True),
}


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "not detached"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str, detach: bool) -> None:
    case = CASES[name]
    inputs, last, d_action = case.exact(detach)
    found, latents, gradient = case.run(*case.plan(), detach)
    assert relative_error(found[:-1], inputs) < TOLERANCE["float64"]
    assert relative_error(latents[:, -1], last) < TOLERANCE["float64"]
    assert torch.equal(latents.transpose(0, 1), found[..., : latents.shape[-1]])
    assert relative_error(gradient, d_action) < TOLERANCE["float64"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["two policies, shared biases", "residual"])
def test_lower_precision_stays_near_the_definition(name: str, precision: str) -> None:
    case = CASES[name]
    inputs, _, d_action = case.exact(True)
    found, _, gradient = case.run(*case.plan(torch.float32, precision=precision))
    assert relative_error(found[:-1], inputs) < TOLERANCE[precision]
    assert relative_error(gradient, d_action) < TOLERANCE[precision]


def test_one_launch_with_barriers_equals_a_launch_per_phase() -> None:
    case = CASES["one policy"]
    apart = case.run(*case.plan(programs=1))
    rollout, actor = case.plan(programs=1, fused=True)
    for _ in range(2):  # the barrier's counter goes on from launch to launch
        for a, b in zip(apart, case.run(rollout, actor), strict=True):
            assert torch.equal(a, b)


def test_actor_rows_are_those_of_the_actors_own_forward_pass() -> None:
    case = CASES["two policies, shared biases"]
    policies, horizon, batch, latent, _ = case.shape
    rollout, actor = case.plan()
    _, latents, _ = case.run(rollout, actor)
    z = latents[:, :-1].reshape(policies, horizon * batch, latent)
    expected = actor.forward(z, case.noise.reshape(policies, horizon * batch, -1)).activations
    for row, hidden in zip(rollout.actor_rows(), expected.hidden, strict=True):
        assert relative_error(row.pre, hidden.pre) < 1e-13
        assert relative_error(row.mean, hidden.mean) < 1e-13
        assert relative_error(row.rstd, hidden.rstd) < 1e-13


def test_nan_stays_in_its_policy() -> None:
    case = CASES["two policies, shared biases"]
    rollout, actor = case.plan()
    clean = [t.clone() for t in case.run(rollout, actor)]
    actor.parameters["1.weight"][0, 0, 0] = float("nan")
    inputs, latents, d_action = case.run(rollout, actor)
    assert inputs[1, 0].isnan().any()
    assert torch.equal(inputs[:-1, 1], clean[0][:-1, 1])
    assert torch.equal(latents[1], clean[1][1])
    assert torch.equal(d_action[1], clean[2][1])


def test_wrong_arguments_are_named() -> None:
    case = CASES["one policy"]
    rollout, actor = case.plan()
    with pytest.raises(ValueError, match=r"z must be torch.float64 \(1, 5, 24\), got torch.float64 \(1, 4, 24\)"):
        rollout.forward(case.z[:, :4], case.noise, actor.parameters)
    with pytest.raises(ValueError, match=r"d_last must be torch.float64 \(1, 5, 24\)"):
        rollout.backward(case.d_inputs, case.d_last.float(), actor.parameters)
    with pytest.raises(ValueError, match="dynamics must be mish layers and a none layer of width 24"):
        DynamicsRollout(case.dynamics, actor.parameters, actor.mlp.widths, 1, 3, 5, residual=True)
    with pytest.raises(ValueError, match="actors must be float32 rows of 2 policies"):
        DynamicsRollout(case.dynamics, actor.parameters, actor.mlp.widths, 2, 3, 5)
    if triton_support.interpreting:
        with pytest.raises(ValueError, match="a fused grid must be 1 program, got 3"):
            case.run(*case.plan(fused=True))
