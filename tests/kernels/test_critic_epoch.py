"""The persistent critic update in Triton's interpreter against its float64 definition, and `Critic` with `Adam`."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from typing import Any

import pytest
from closeness import relative_error
from torch import Tensor

from pwm_fast.kernels import triton_support
from pwm_fast.kernels.critic_epoch import CriticEpoch, EpochResult, critic_epoch
from pwm_fast.learning.optim import Adam
from pwm_fast.models.critic import Critic

pytestmark = pytest.mark.skipif(
    triton_support.unavailable is not None or not (triton_support.interpreting or torch.cuda.is_available()),
    reason="needs Triton with a GPU or its interpreter",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS = (0.7, 0.95)
TOLERANCE = {"float64": 1e-11, "fp32": 1e-6, "bf16": 1e-2}
# Adam divides by the gradient's own size, so the smallest gradients' rounding shows in full in the parameters' changes.
CHANGE_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}


class Case:
    """Critics, states and targets; everything drawn in float64 from what float32 can hold."""

    def __init__(
        self, policies: int, critics: int, units: tuple[int, ...], rows: int, latent: int, epochs: int = 2,
        parts: int = 2, max_norm: float = 1.0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(rows)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).float().double().to(DEVICE)

        self.policies, self.critics, self.units, self.latent = policies, critics, units, latent
        self.rows, self.epochs, self.parts, self.max_norm = rows, epochs, parts, max_norm
        self.x, self.targets = draw(policies, rows + 3, latent)[:, :rows], draw(policies, rows) * 3
        orders = [torch.randperm(rows, generator=generator) for _ in range(policies * epochs)]
        self.order = torch.stack(orders).view(policies, epochs, rows).to(DEVICE)
        self.start = draw(policies * critics, self.critic().parameters.size)

    def m_shape(self) -> tuple[int, int]:
        return self.policies, self.start.numel() // self.policies

    def critic(self, dtype: torch.dtype = torch.float64) -> Critic:
        critic = Critic(list(range(self.policies)), self.latent, self.critics, self.units, dtype, DEVICE)
        if hasattr(self, "start"):
            for name, view in critic.parameters.views.items():
                offset = view.storage_offset()
                noise = self.start.as_strided(view.shape, view.stride(), offset).to(dtype)
                view += noise * (0.3 if "ln" in name or "bias" in name else 0.05)
        return critic

    def state(self, dtype: torch.dtype) -> tuple[Critic, dict[str, Tensor]]:
        return self.critic(dtype), {
            "x": self.x.to(dtype),
            "targets": self.targets.to(dtype),
            "order": self.order,
            "m": torch.zeros(self.m_shape(), dtype=dtype, device=DEVICE),
            "v": torch.zeros(self.m_shape(), dtype=dtype, device=DEVICE),
            "lr": torch.linspace(0.001, 0.002, self.policies, dtype=dtype, device=DEVICE),
            "step": torch.arange(self.policies, device=DEVICE) * 7,
            "active": torch.ones(self.policies, dtype=torch.bool, device=DEVICE),
        }

    def exact(self, **changes: Tensor) -> tuple[Critic, dict[str, Tensor], EpochResult]:
        critic, state = self.state(torch.float64)
        state |= changes
        result = critic_epoch(
            critic.parameters, critic.mlp.depth, minibatches=self.parts, max_norm=self.max_norm, betas=BETAS, eps=1e-8,
            **state,
        )  # fmt: skip
        return critic, state, result

    def run(
        self, dtype: torch.dtype = torch.float64, changes: dict[str, Tensor] | None = None, **options: Any
    ) -> tuple[Critic, dict[str, Tensor], EpochResult]:
        critic, state = self.state(dtype)
        state |= changes or {}
        options = {"programs": 5, **options}
        epoch = CriticEpoch(
            critic.parameters, critic.mlp.widths, self.policies, self.critics, self.rows, self.epochs, self.parts,
            self.max_norm, BETAS, **options,
        )  # fmt: skip
        return critic, state, epoch.run(**state)


CASES = {
    "one policy": Case(1, 3, (19, 13), 23, 16),
    "two policies, one hidden layer": Case(2, 1, (33,), 11, 7, epochs=1, parts=3, max_norm=100.0),
    "three policies, three hidden layers": Case(3, 2, (17, 40, 9), 9, 5, parts=1, max_norm=float("inf")),
    "more than one tile": Case(1, 2, (72, 70), 70, 40, epochs=1, parts=1),
}


def changes_of(critic: Critic, case: Case) -> Tensor:
    """How far the parameters went: their own size would hide it."""
    return critic.parameters.flat.double() - case.critic().parameters.flat


@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str) -> None:
    case = CASES[name]
    exact, expected, wanted = case.exact()
    critic, state, found = case.run()
    assert relative_error(changes_of(critic, case), changes_of(exact, case)) < TOLERANCE["float64"]
    for key in ("m", "v"):
        assert relative_error(state[key], expected[key]) < TOLERANCE["float64"]
    assert torch.equal(state["step"], expected["step"])
    assert relative_error(found.loss, wanted.loss) < TOLERANCE["float64"]
    assert relative_error(found.norm, wanted.norm) < TOLERANCE["float64"]
    assert found.active.all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lower_precision_stays_near_the_definition(precision: str) -> None:
    case = CASES["one policy"]
    exact, _, wanted = case.exact()
    critic, _, found = case.run(torch.float32, precision=precision)
    assert relative_error(changes_of(critic, case), changes_of(exact, case)) < CHANGE_TOLERANCE[precision]
    assert relative_error(found.loss, wanted.loss) < TOLERANCE[precision]
    assert relative_error(found.norm, wanted.norm) < TOLERANCE[precision]


def test_one_launch_with_barriers_equals_a_launch_per_phase() -> None:
    case = CASES["two policies, one hidden layer"]
    apart, _, _ = case.run(programs=1)
    together, _, _ = case.run(programs=1, fused=True)
    assert torch.equal(apart.parameters.flat, together.parameters.flat)


def test_is_what_the_critics_and_adam_of_extraction_do() -> None:
    case = CASES["one policy"]
    critic, state = case.state(torch.float64)
    adam = Adam(critic.parameters, case.policies, BETAS)
    adam.steps.copy_(state["step"])
    for order in case.order[0]:
        for picks in order.tensor_split(case.parts):
            values, saved = critic.forward(case.x[:, picks].contiguous())
            error = values - case.targets[:, None, picks]
            critic.backward(error * (2 / (case.critics * len(picks))), saved)
            norm = adam.step(state["lr"], case.max_norm, state["active"])
    found, moments, result = case.run()
    assert relative_error(found.parameters.flat, critic.parameters.flat) < 1e-12
    assert relative_error(moments["m"], adam.m) < TOLERANCE["float64"]
    assert relative_error(result.norm, norm) < TOLERANCE["float64"]


def test_a_policy_that_diverges_stops_alone_and_one_that_is_not_active_keeps_everything() -> None:
    case = CASES["three policies, three hidden layers"]
    targets = case.targets.clone()
    targets[1, case.order[1, 0, 2]] = float("nan")
    active = torch.tensor([True, True, False], device=DEVICE)
    critic, state, found = case.run(changes={"targets": targets, "active": active})
    whole, _, _ = case.run()
    start = case.critic().parameters.flat.view(3, -1)
    flat = critic.parameters.flat.view(3, -1)
    assert found.active.tolist() == [True, False, False]
    assert state["step"].tolist() == [0 + 2, 7, 14]
    assert torch.equal(flat[0], whole.parameters.flat.view(3, -1)[0])
    assert torch.equal(flat[1:], start[1:])
    assert not state["m"][1:].any()
    assert found.norm.isfinite().tolist() == [True, False, True]


def test_wrong_arguments_are_named() -> None:
    case = CASES["one policy"]
    with pytest.raises(ValueError, match=r"order must be torch.int64 \(1, 2, 23\), got torch.int32 \(1, 2, 23\)"):
        case.run(changes={"order": case.order.int()})
    with pytest.raises(ValueError, match=r"lr must be torch.float64 \(1,\)"):
        case.run(changes={"lr": torch.ones(2, dtype=torch.float64)})
    critic = case.critic()
    with pytest.raises(ValueError, match="minibatches must be between 1 and the 23 rows, got 24"):
        CriticEpoch(critic.parameters, critic.mlp.widths, 1, 3, 23, 1, 24, 1.0, BETAS)
    with pytest.raises(ValueError, match="critics must be float32 rows of 2 x 3 members"):
        CriticEpoch(critic.parameters, critic.mlp.widths, 2, 3, 23, 1, 4, 1.0, BETAS)
