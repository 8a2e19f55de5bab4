"""The rollout in one native call each way against its float64 definition, with every instruction set there is."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from closeness import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dynamics_rollout import Case
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels.dynamics_rollout import dynamics_rollout
from pwm_fast.kernels.gemm import pack
from pwm_fast.kernels.native_dynamics_rollout import NativeDynamicsRollout, PackedLayer
from pwm_fast.models.policy import Actor
from pwm_fast.models.population_mlp import EPS
from pwm_fast.models.world_model import FrozenLayer

pytestmark = pytest.mark.skipif(backend.native is None, reason=f"no native module: {backend.native_reason}")
CASES = {
    "one policy": Case(1, 3, 5, 24, 3),
    "two policies, shared biases": Case(2, 2, 17, 16, 5, shared_bias=True),
    "three policies": Case(3, 2, 7, 72, 2, units=(33,), hidden=(104,)),
    "residual": Case(2, 3, 9, 11, 3, residual=True),
    "residual, one state": Case(1, 2, 1, 11, 1, residual=True, shared_bias=True),
    "more than one block": Case(2, 2, 140, 304, 2, units=(280, 30), hidden=(540,)),
}


def in_type(case: Case, dtype: torch.dtype) -> tuple[Actor, list[FrozenLayer]]:
    """The case's actors and dynamics on the CPU."""
    policies, _, _, latent, action = case.shape
    actor = Actor(list(range(policies)), latent, action, case.actor.mlp.widths[1:-1], dtype)
    actor.parameters.flat.copy_(case.actor.parameters.flat)
    layers = [
        FrozenLayer(*(t.to("cpu", dtype) if isinstance(t, Tensor) else t for t in vars(layer).values()))
        for layer in case.dynamics
    ]
    return actor, layers


def definition(case: Case, dtype: torch.dtype, detach: bool) -> dict[str, Tensor]:
    actor, layers = in_type(case, dtype)
    z, noise, d_inputs, d_last = (t.to("cpu", dtype) for t in (case.z, case.noise, case.d_inputs, case.d_last))
    nudge = torch.zeros_like(noise, requires_grad=True)
    inputs, last = dynamics_rollout(
        z, noise, actor.parameters.views, actor.mlp.depth, layers, case.residual, detach, nudge
    )
    (d_action,) = torch.autograd.grad((inputs, last), nudge, (d_inputs, d_last))
    return {"inputs": inputs.detach(), "last": last.detach(), "d_action": d_action}


class Native:
    """The kernel on a case's networks, in float32."""

    def __init__(self, case: Case):
        self.case, (self.actor, layers) = case, in_type(case, torch.float32)
        policies, horizon, batch, latent, action = case.shape
        p, widths = self.actor.parameters, [latent + action, *(len(layer.weight) for layer in layers)]
        offsets = {name: view.storage_offset() for name, view in p.views.items()}
        self.plan = NativeDynamicsRollout(
            self.actor.mlp.widths, offsets, p.size, widths, policies, horizon, batch, case.residual, EPS
        )
        self.arguments = {name: getattr(case, name).to("cpu", torch.float32) for name in ("z", "noise")}
        self.gradients = {name: getattr(case, name).to("cpu", torch.float32) for name in ("d_inputs", "d_last")}
        self.layers = []
        for layer in layers:
            weight, transpose = pack(layer.weight, "native"), pack(layer.weight.T, "native")
            assert weight is not None and transpose is not None
            self.layers.append(PackedLayer(weight, transpose, layer.bias, layer.ln_weight, layer.ln_bias))

    def run(self, detach: bool = True, threads: int = 1, **changes: Any) -> dict[str, Tensor]:
        before, flat = torch.get_num_threads(), self.actor.parameters.flat
        forward, backward = (
            {k: changes.get(k, v) for k, v in part.items()} for part in (self.arguments, self.gradients)
        )
        torch.set_num_threads(threads)
        try:
            inputs, latents = self.plan.forward(flat, self.layers, **forward)
            d_action = self.plan.backward(flat, self.layers, **backward, detach=detach, mask=changes.get("mask"))
        finally:
            torch.set_num_threads(before)
        results = {"inputs": inputs[:-1], "last": latents[:, -1], "d_action": d_action}
        return {name: value.clone() for name, value in results.items()}


def assert_agrees(case: Case, detach: bool) -> None:
    """Within 1e-6 of float64; LayerNorm of few units, which may divide by almost nothing, magnifies rounding without
    bound: there within 8 times the error of the same definition in float32."""
    exact, usual, native = (
        definition(case, torch.float64, detach),
        definition(case, torch.float32, detach),
        Native(case),
    )
    found = native.run(detach)
    for name, value in exact.items():
        assert relative_error(found[name], value) < max(1e-6, 8 * relative_error(usual[name], value)), name
    plan, latent = native.plan, case.shape[3]
    assert torch.equal(plan.latents.transpose(0, 1), plan.inputs[..., :latent])
    assert torch.equal(plan.actions.transpose(0, 1), plan.inputs[:-1, ..., latent:])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "not detached"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name: str, detach: bool) -> None:
    assert_agrees(CASES[name], detach)


sizes = st.sampled_from([1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 37])
# LayerNorm of two units leaves signs, of three it can divide by next to nothing and amplify any rounding.
widths = st.lists(sizes.filter(lambda n: n > 3), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(
    policies=st.integers(1, 3), horizon=st.integers(1, 3), batch=sizes, latent=sizes, action=sizes,
    residual=st.booleans(), shared_bias=st.booleans(), units=widths, hidden=widths, detach=st.booleans(),
)  # fmt: skip
def test_any_shape(units: list[int], hidden: list[int], detach: bool, latent: int, **shape: Any) -> None:
    latent = latent if shape["residual"] else 8 * latent
    assert_agrees(Case(**shape, latent=latent, units=tuple(units), hidden=tuple(hidden)), detach)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("policies", "batch", "hidden"),
    [
        pytest.param(1, 90, (130,), id="rows-split"),
        pytest.param(10, 17, (130,), id="policies-split"),
        pytest.param(3, 40, (130,), id="both"),
        pytest.param(1, 15, (1100, 700), id="products-split"),
    ],
)
def test_threads_do_not_change_a_bit(policies: int, batch: int, hidden: tuple[int, ...]) -> None:
    native = Native(Case(policies, 2, batch, 72, 3, units=(70, 30), hidden=hidden))
    runs = [native.run(False, threads) for threads in (1, 2, 5)]
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("residual", [False, True], ids=["simnorm", "residual"])
def test_a_policy_does_not_depend_on_its_neighbours(residual: bool) -> None:
    case = Case(3, 2, 9, 16, 3, residual, shared_bias=True)
    many, alone = Native(case).run(False), Native(Case(1, 2, 9, 16, 3, residual, shared_bias=True))
    alone.layers = Native(case).layers
    alone.actor.parameters.flat.copy_(case.actor.parameters.flat[1:2])
    change = {"z": case.z[1:2].float(), "noise": case.noise[1:2].float()}
    change |= {"d_inputs": case.d_inputs[:, 1:2].float(), "d_last": case.d_last[1:2].float()}
    one = alone.run(False, **change)
    assert torch.equal(one["inputs"][:, 0], many["inputs"][:, 1]) and torch.equal(one["last"][0], many["last"][1])
    assert torch.equal(one["d_action"][0], many["d_action"][1])


def test_nan_stays_in_its_policy() -> None:
    native = Native(CASES["two policies, shared biases"])
    clean = native.run(False)
    native.actor.parameters["1.weight"][0, 0, 0] = torch.nan
    broken = native.run(False)
    assert broken["inputs"][1, 0].isnan().any()
    assert torch.equal(broken["inputs"][:, 1], clean["inputs"][:, 1])
    assert torch.equal(broken["d_action"][1], clean["d_action"][1])


def test_a_masked_action_hands_nothing_on() -> None:
    case = Case(2, 3, 5, 16, 3)
    native, mask = Native(case), torch.tensor([[[1.0, 1, 0]], [[1, 0, 0]]])
    found = native.run(False, mask=mask)["d_action"]
    native.actor.parameters[f"{native.actor.mlp.depth - 1}.weight"].mul_(mask.mT)
    native.plan.backward(native.actor.parameters.flat, native.layers, **native.gradients, detach=False)
    assert relative_error(found, native.plan.d_action) < 1e-6
    assert relative_error(native.run(False)["d_action"], Native(case).run(False)["d_action"]) > 1e-2


def test_what_the_actors_keep_is_that_of_their_own_forward_pass() -> None:
    case = CASES["two policies, shared biases"]
    native = Native(case)
    native.run()
    policies, horizon, batch, latent, action = case.shape
    z = native.plan.latents[:, :-1].reshape(policies, horizon * batch, latent)
    expected = native.actor.forward(z, native.arguments["noise"].reshape(policies, -1, action))
    kept, outputs = expected.activations, [*(h.x for h in expected.activations.hidden[1:]), expected.activations.last]
    for row, y, hidden, output in zip(native.plan.actor_rows, native.plan.actor_outputs, kept.hidden, outputs):
        for found, value in ((row.pre, hidden.pre), (y, output), (row.mean, hidden.mean), (row.rstd, hidden.rstd)):
            assert relative_error(found, value) < 1e-6
    assert relative_error(native.plan.actions.flatten(1, 2), expected.action) < 1e-6


def test_the_memory_of_one_instruction_set_does_not_show_in_another() -> None:
    case, native = Case(2, 2, 17, 16, 5, units=(19, 21), hidden=(45,)), backend.native
    before, plan = native.isa(), Native(case).plan
    try:
        for name in [*native.available_isas(), before]:
            native.set_isa(name)
            again, fresh = Native(case), Native(case).run(False)
            again.plan = plan
            found = again.run(False)
            assert all(torch.equal(found[key], fresh[key]) for key in fresh), name
    finally:
        native.set_isa(before)


def test_plans_can_be_copied() -> None:
    native = Native(CASES["residual"])
    expected = native.run()
    native.plan = pickle.loads(pickle.dumps(native.plan))
    found = native.run()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_packed_for_another_instruction_set_are_refused() -> None:
    native, before = Native(CASES["one policy"]), backend.native.isa()
    try:
        for name in backend.native.available_isas():
            backend.native.set_isa(name)
            if backend.native.gemm_panel_row() != native.layers[0].weight._panel_row:
                with pytest.raises(ValueError, match="pack them again after set_isa"):
                    native.run()
    finally:
        backend.native.set_isa(before)


def test_what_does_not_fit_is_named() -> None:
    native = Native(CASES["one policy"])
    with pytest.raises(RuntimeError, match="a rollout's backward pass needs its forward pass first"):
        native.plan.backward(native.actor.parameters.flat, native.layers, **native.gradients)
    with pytest.raises(ValueError, match=r"z must be contiguous \(1, 5, 24\), got \(1, 4, 24\)"):
        native.run(z=native.arguments["z"][:, :4])
    with pytest.raises(TypeError, match=r"d_last must be float32 on the cpu, got torch\.float64"):
        native.run(d_last=native.gradients["d_last"].double())
    with pytest.raises(ValueError, match="the dynamics must have 3 layers, got 2"):
        native.plan.forward(native.actor.parameters.flat, native.layers[1:], **native.arguments)
    with pytest.raises(ValueError, match=r"a layer must be 40 x 27 with a norm, got shapes \[\(24, 40\)"):
        native.plan.forward(native.actor.parameters.flat, native.layers[1:] + native.layers[:1], **native.arguments)
    with pytest.raises(ValueError, match="dynamics must lead from 27 columns over a hidden layer at least to 24"):
        NativeDynamicsRollout((24, 9, 3), {"log_std": 0}, 999, (26, 40, 24), 1, 3, 5, False, EPS)
