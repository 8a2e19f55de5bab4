"""two_hot, td_lambda and clip_adam in Triton against their definitions in float64."""

import pytest
import torch
from closeness import TRITON_DEVICE, needs_triton, relative_error
from torch import Tensor

from pwm_fast.kernels import clip_adam, td_lambda, two_hot

pytestmark = needs_triton
GRID = (-10.0, 10.0)
BETAS = (0.7, 0.95)
# One result in bfloat16 is off by up to 2^-7 of itself: the interpreter cuts off what a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def draw(bins: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """logits [3, n, bins], targets [3, n] (some beyond the grid), output gradients [3, n]; n less for many bins."""
    generator, shape = torch.Generator().manual_seed(bins), (3, 1 if bins > 1000 else 5)
    logits, x, d = 3 * torch.randn(*shape, bins, generator=generator), *torch.randn(2, *shape, generator=generator)
    return tuple(t.to(TRITON_DEVICE, dtype) for t in (logits, 6 * x, d))


@pytest.mark.parametrize("bins", [2, 7, 101, 1023])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_both_heads_match_their_definitions(bins: int, dtype: torch.dtype) -> None:
    logits, x, d = draw(bins, dtype)
    leaf = logits.double().requires_grad_()
    for log_scale in (False, True):
        value = two_hot.two_hot_expectation(leaf, *GRID, log_scale)
        (gradient,) = torch.autograd.grad(value, leaf, d.double())
        options = {"backend": "triton", "log_scale": log_scale}
        assert relative_error(two_hot.expectation_forward(logits, *GRID, **options), value.detach()) < TOLERANCE[dtype]
        assert relative_error(two_hot.expectation_backward(d, logits, *GRID, **options), gradient) < TOLERANCE[dtype]
    loss = two_hot.two_hot_cross_entropy(leaf, x.double(), *GRID)
    (gradient,) = torch.autograd.grad(loss, leaf, d.double())
    # A target's place among b bins is rounded to b / 2^24, which is all that the weights of a two-hot row can be.
    tolerance = max(TOLERANCE[dtype], bins / 2**24)
    found = two_hot.cross_entropy_forward(logits, x, *GRID, backend="triton")
    assert relative_error(found, loss.detach()) < tolerance
    found = two_hot.cross_entropy_backward(d, logits, x, *GRID, backend="triton")
    assert relative_error(found, gradient) < tolerance
    found = two_hot.encode_forward(x, bins, *GRID, backend="triton")
    assert relative_error(found, two_hot.encode(x.double(), bins, *GRID)) < tolerance


def test_small_expectations_keep_their_digits_through_symexp() -> None:
    sizes = torch.logspace(-6, 0, 25, dtype=torch.float64)
    logits = torch.stack([torch.log1p(-sizes / 2), torch.log1p(sizes / 2)], -1)
    exact = two_hot.two_hot_expectation(logits.float().double(), -1.0, 1.0, log_scale=True)
    found = two_hot.expectation_forward(
        logits.float().to(TRITON_DEVICE), -1.0, 1.0, backend="triton", log_scale=True
    ).cpu()
    # What the softmax of two bins loses to cancellation is absolute; beyond it the error is relative.
    assert ((found - exact).abs() < 2e-7 + 1e-6 * exact.abs()).all()


def test_logits_far_apart_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]], device=TRITON_DEVICE)
    value = two_hot.expectation_forward(logits, -1.0, 1.0, backend="triton").cpu()
    assert torch.allclose(value, torch.tensor([-1.0, 0.0]), atol=1e-6)
    loss = two_hot.cross_entropy_forward(logits, torch.tensor([-1.0, 0.0]).to(logits), -1.0, 1.0, backend="triton")
    assert torch.allclose(loss.cpu(), torch.tensor([0.0, 3.0]).log1p().clamp(max=1.0986123), atol=1e-6)


def test_a_nan_target_shows_in_its_own_row_only() -> None:
    x = torch.tensor([0.5, float("nan"), float("-inf")], device=TRITON_DEVICE)
    loss = two_hot.cross_entropy_forward(torch.zeros(3, 11, device=TRITON_DEVICE), x, -1.0, 1.0, backend="triton")
    assert loss.isnan().tolist() == [False, True, False]
    rows = two_hot.encode_forward(x, 11, -1.0, 1.0, backend="triton").cpu()
    assert torch.equal(rows.isnan(), two_hot.encode(x, 11, -1.0, 1.0).isnan().cpu())


@pytest.mark.parametrize("horizon", [1, 3, 16])
@pytest.mark.parametrize("ends", [True, False], ids=["with ends", "without ends"])
def test_returns_match_their_definition(horizon: int, ends: bool) -> None:
    generator = torch.Generator().manual_seed(horizon)
    reward, value, chance = (t.to(TRITON_DEVICE) for t in torch.rand(3, horizon, 5, 13, generator=generator))
    continues = (chance > 0.2) if ends else None
    exact = td_lambda.td_lambda(reward.double(), value.double(), continues if ends else None, 0.9, 0.95)
    assert relative_error(td_lambda.returns(reward, value, continues, 0.9, 0.95, backend="triton"), exact) < 1e-6
    low = (reward.bfloat16(), value.bfloat16())
    exact = td_lambda.td_lambda(low[0].double(), low[1].double(), continues if ends else None, 0.9, 0.95)
    assert relative_error(td_lambda.returns(*low, continues, 0.9, 0.95, backend="triton"), exact) < 5e-3


class State:
    """Parameters, moments, learning rates and step counts of 3 policies."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32, device: str = TRITON_DEVICE):
        start = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
        self.start = start.to(device, dtype)
        self.param, self.m, self.v = self.start.clone(), torch.zeros_like(self.start), torch.zeros_like(self.start)
        self.lr = torch.tensor([0.01, 0.02, 0.03]).to(device, dtype)
        self.step = torch.zeros(3, dtype=torch.int64, device=device)

    def update(self, grad: Tensor, **options: object) -> Tensor:
        return clip_adam.step(self.param, grad, self.m, self.v, self.lr, self.step, 1.0, BETAS, **options)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.param, self.m, self.v, self.step


def gradient(size: int, seed: int = 0) -> Tensor:
    """[3, size] with norms near 0.1, 1 and 10: below, at and above the limit of 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(3, size, generator=generator) * torch.tensor([[0.1], [1], [10]]) / size**0.5).to(TRITON_DEVICE)


@pytest.mark.parametrize("size", [1, 7, 101, 5001])
def test_clip_adam_matches_its_definition(size: int) -> None:
    state, exact = State(size), State(size, torch.float64)
    exact.lr = state.lr.double()
    for seed in range(3):
        grad = gradient(size, seed)
        norm, exact_norm = state.update(grad, backend="triton"), exact.update(grad.double())
        assert relative_error(norm, exact_norm) < 1e-6
    assert state.step.tolist() == [3, 3, 3]
    assert relative_error(state.m, exact.m) < 1e-6
    assert relative_error(state.v, exact.v) < 1e-6
    # The parameters' own rounding, about 1e-7 of their size three times, over changes of a hundredth of it.
    assert relative_error(state.param - state.start, exact.param - exact.start) < 2e-5


def test_clip_adam_twice_is_the_same_and_policies_are_alone() -> None:
    runs = []
    for _ in range(2):
        state = State(5001)
        runs.append((state.update(gradient(5001), backend="triton"), *state.tensors()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    start = State(5001)
    one = [t[1:2].clone() for t in (start.param, gradient(5001), start.m, start.v, start.lr, start.step)]
    norm = clip_adam.step(*one, 1.0, BETAS, backend="triton")
    assert torch.equal(norm, runs[0][0][1:2])
    assert torch.equal(one[0], runs[0][1][1:2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_gradients_and_inactive_policies_keep_everything(bad: float) -> None:
    state, grad = State(101), gradient(101)
    before = [t.clone() for t in state.tensors()]
    grad[1, 40] = bad
    norm = state.update(grad, active=torch.tensor([False, True, True], device=TRITON_DEVICE), backend="triton")
    assert norm.isfinite().tolist() == [True, False, True]
    assert state.step.tolist() == [0, 0, 1]
    for now, then in zip(state.tensors(), before, strict=True):
        assert torch.equal(now[:2], then[:2])
        assert not torch.equal(now[2], then[2])


def test_a_late_step_is_corrected_by_its_count() -> None:
    """At step 2000 the corrections are nearly 1, at the first nearly 1 - beta: both from the count on the device."""
    state, exact = State(7), State(7, torch.float64)
    exact.lr = state.lr.double()
    for s in (state, exact):
        s.step.copy_(torch.tensor([0, 5, 1999]))
        clip_adam.step(
            s.param, gradient(7).to(s.param.dtype), s.m, s.v, s.lr, s.step, float("inf"), (0.9, 0.999),
            backend="triton" if s is state else None,
        )  # fmt: skip
    assert state.step.tolist() == [1, 6, 2000]
    assert relative_error(state.param - state.start, exact.param - exact.start) < 2e-5


def test_what_triton_cannot_update_is_named() -> None:
    state = State(6)
    state.m = torch.zeros(6, 3, device=TRITON_DEVICE).t()
    with pytest.raises(ValueError, match="needs contiguous tensors to update, got m with gaps"):
        state.update(gradient(6), backend="triton")
