"""The critics' epochs in one native call against the float64 definition, with every instruction set of this machine."""

import copy
import pickle

import pytest
import torch
from closeness import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels.critic_epoch import EpochResult, critic_epoch
from pwm_fast.kernels.native_critic_epoch import NativeCriticEpoch
from pwm_fast.models.critic import Critic
from pwm_fast.models.population_mlp import EPS

pytestmark = pytest.mark.skipif(backend.native is None, reason=f"no native module: {backend.native_reason}")
BETAS, ADAM_EPS = (0.7, 0.95), 1e-8


class Case:
    """Critics with parameters, states and targets that float32 can hold; every run starts from the same ones."""

    def __init__(
        self, policies: int = 1, critics: int = 3, units: tuple[int, ...] = (19, 13), rows: int = 23, latent: int = 16,
        epochs: int = 2, parts: int = 2, max_norm: float = 1.0, shuffled: bool = True,
    ):  # fmt: skip
        self.policies, self.critics, self.units, self.rows, self.latent = policies, critics, units, rows, latent
        self.epochs, self.parts, self.max_norm = epochs, parts, max_norm
        generator = torch.Generator().manual_seed(rows)
        self.x = torch.randn(policies, rows + 3, latent, generator=generator)[:, :rows]
        self.targets = 3 * torch.randn(policies, rows, generator=generator)
        orders = [torch.randperm(rows, generator=generator) for _ in range(policies * epochs)]
        self.order = torch.stack(orders if shuffled else [orders[0]] * len(orders)).view(policies, epochs, rows)
        self.critic = Critic(list(range(policies)), latent, critics, units)
        for name, view in self.critic.parameters.views.items():
            scale = 0.3 if "ln" in name or "bias" in name else 0.05
            view += scale * torch.randn(view.shape, generator=generator)
        self.start = self.critic.parameters.flat

    def state(self, dtype: torch.dtype, **changes: Tensor) -> tuple[Critic, dict[str, Tensor]]:
        critic = copy.deepcopy(self.critic)
        critic.parameters.flat, critic.parameters.grad = self.start.to(dtype).clone(), self.start.new_empty(0)
        critic.parameters.views = {
            name: critic.parameters.flat.as_strided(view.shape, view.stride(), view.storage_offset())
            for name, view in self.critic.parameters.views.items()
        }
        moments = torch.zeros(self.policies, critic.parameters.flat.numel() // self.policies, dtype=dtype)
        state = {
            "x": self.x.to(dtype),
            "targets": self.targets.to(dtype),
            "order": self.order,
            "m": moments,
            "v": moments.clone(),
            "lr": torch.linspace(0.001, 0.002, self.policies, dtype=dtype),
            "step": torch.arange(self.policies) * 7,
            "active": torch.ones(self.policies, dtype=torch.bool),
        }
        return critic, state | changes

    def exact(
        self, dtype: torch.dtype = torch.float64, **changes: Tensor
    ) -> tuple[Critic, dict[str, Tensor], EpochResult]:
        critic, state = self.state(dtype, **changes)
        options = {"minibatches": self.parts, "max_norm": self.max_norm, "betas": BETAS, "eps": ADAM_EPS}
        return critic, state, critic_epoch(critic.parameters, critic.mlp.depth, **state, **options)

    def plan(self) -> NativeCriticEpoch:
        p = self.critic.parameters
        offsets = {name: view.storage_offset() for name, view in p.views.items()}
        return NativeCriticEpoch(
            self.critic.mlp.widths, offsets, p.size, self.policies, self.critics, self.rows, self.epochs,
            self.parts, self.max_norm, BETAS, ADAM_EPS, EPS,
        )  # fmt: skip

    def run(
        self, plan: NativeCriticEpoch | None = None, threads: int = 1, **changes: Tensor
    ) -> tuple[Critic, dict[str, Tensor], EpochResult]:
        critic, state = self.state(torch.float32, **changes)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return critic, state, EpochResult(*(plan or self.plan()).run(critic.parameters.flat, **state))
        finally:
            torch.set_num_threads(before)


def assert_agrees(case: Case) -> None:
    """Within the usual rounding of the float64 definition; LayerNorm of few units, which may divide by almost nothing,
    magnifies rounding without bound: there within 8 times the error of the same definition in float32."""
    (exact, wide, expected), (rounded, narrow, usual), (critic, state, result) = (
        case.exact(), case.exact(torch.float32), case.run()
    )  # fmt: skip
    # Adam divides by the gradient's own size, so the smallest gradients' rounding shows in full in the changes.
    changes = [c.parameters.flat - case.start for c in (critic, rounded, exact)]
    compared = {
        "change": (*changes, 1e-4),
        "m": (state["m"], narrow["m"], wide["m"], 1e-5),
        "v": (state["v"], narrow["v"], wide["v"], 1e-5),
        "loss": (result.loss, usual.loss, expected.loss, 1e-6),
        "norm": (result.norm, usual.norm, expected.norm, 1e-5),
    }
    for name, (found, plain, true, least) in compared.items():
        assert relative_error(found, true) < max(least, 8 * relative_error(plain, true)), name
    assert torch.equal(state["step"], wide["step"]) and torch.equal(result.active, expected.active)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(), id="one policy, orders that change"),
        pytest.param(Case(shuffled=False, epochs=3), id="one order"),
        pytest.param(Case(2, 1, (33,), 11, 7, 1, 3, 100.0), id="one hidden layer"),
        pytest.param(Case(3, 2, (17, 40, 9), 9, 5, parts=1, max_norm=float("inf")), id="three hidden layers"),
        pytest.param(Case(1, 2, (72, 70), 530, 300, 1, 2), id="more than one block"),
    ],
)
def test_agrees_with_the_definition(case: Case) -> None:
    assert_agrees(case)


sizes = st.sampled_from([1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 37])
# Of one or two units LayerNorm leaves a sign: their gradients are rounding errors, which Adam makes as large as any.
widths = st.lists(sizes.filter(lambda n: n > 2), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(
    policies=st.integers(1, 3), critics=st.integers(1, 3), units=widths, rows=sizes, latent=sizes,
    epochs=st.integers(1, 2), parts=st.integers(1, 4), shuffled=st.booleans(),
)  # fmt: skip
def test_any_shape(
    policies: int, critics: int, units: list[int], rows: int, latent: int, epochs: int, parts: int, shuffled: bool
) -> None:
    assert_agrees(Case(policies, critics, tuple(units), rows, latent, epochs, min(parts, rows), shuffled=shuffled))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    "policies, critics", [(1, 1), (1, 3), (12, 2)], ids=["products-split", "critics-split", "policies-split"]
)
def test_threads_do_not_change_a_bit(policies: int, critics: int) -> None:
    case = Case(policies, critics, (130, 70), 256, 90, 1, 2)
    runs = [case.run(threads=threads) for threads in (1, 2, 5)]
    for critic, state, result in runs[1:]:
        assert torch.equal(critic.parameters.flat, runs[0][0].parameters.flat)
        assert torch.equal(state["v"], runs[0][1]["v"]) and all(map(torch.equal, result, runs[0][2]))


def test_a_policy_does_not_depend_on_its_neighbours() -> None:
    many = Case(3)
    critic, state, result = many.run()
    alone = Case(1)
    alone.start = many.start[3:6]
    one, kept, single = alone.run(
        x=many.x[1:2], targets=many.targets[1:2], order=many.order[1:2], lr=state["lr"][1:2],
        step=torch.tensor([7]),
    )  # fmt: skip
    assert torch.equal(one.parameters.flat, critic.parameters.flat[3:6]) and torch.equal(kept["m"][0], state["m"][1])
    assert torch.equal(single.loss[0], result.loss[1]) and torch.equal(single.norm[0], result.norm[1])


def test_who_is_inactive_or_not_finite_stays_as_it_was() -> None:
    case = Case(3)
    targets = case.targets.clone()
    targets[2, 5] = torch.nan
    critic, state, result = case.run(targets=targets, active=torch.tensor([True, False, True]))
    expected, _, _ = case.run()
    assert torch.equal(critic.parameters.flat[:3], expected.parameters.flat[:3])
    assert torch.equal(critic.parameters.flat[3:6], case.start[3:6]) and state["step"].tolist() == [4, 7, 14 + 1]
    assert result.active.tolist() == [True, False, False]


def test_the_memory_of_one_instruction_set_does_not_show_in_another() -> None:
    case, native = Case(units=(19, 21)), backend.native
    before, plan = native.isa(), case.plan()
    try:
        for name in [*native.available_isas(), before]:
            native.set_isa(name)
            again, fresh = case.run(plan), case.run()
            assert torch.equal(again[0].parameters.flat, fresh[0].parameters.flat), name
            assert torch.equal(again[2].norm, fresh[2].norm), name
    finally:
        native.set_isa(before)


def test_plans_can_be_copied() -> None:
    case = Case()
    copied = pickle.loads(pickle.dumps(case.plan()))
    assert torch.equal(case.run(copied)[0].parameters.flat, case.run()[0].parameters.flat)


def test_what_does_not_fit_is_named() -> None:
    case = Case()
    with pytest.raises(ValueError, match=r"targets must be contiguous \(1, 23\), got \(1, 22\)"):
        case.run(targets=case.targets[:, 1:])
    with pytest.raises(TypeError, match=r"order must be torch.int64 on the cpu, got torch.int32"):
        case.run(order=case.order.int())
    with pytest.raises(ValueError, match=r"order must name rows 0 to 22, got 1 to 23"):
        case.run(order=case.order + 1)
    with pytest.raises(ValueError, match=r"minibatches must be between 1 and the 23 rows, got 24"):
        Case(parts=24).plan()
