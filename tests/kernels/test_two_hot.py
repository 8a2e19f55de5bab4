"""Two-hot encoding, its expectation and its cross-entropy."""

import pytest
import torch
from closeness import relative_error

from pwm_fast.kernels import two_hot

GRID = (-10.0, 10.0)


def draw(bins: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """logits [13, 5, bins], targets [13, 5] (some beyond the grid), output gradients [13, 5]."""
    generator = torch.Generator().manual_seed(bins)
    logits = 3 * torch.randn(13, 5, bins, generator=generator, dtype=torch.float64)
    return logits.to(dtype), *(6 * torch.randn(13, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in "xg")


def test_encoding_has_two_weights_and_the_scalar_as_its_mean() -> None:
    x = torch.tensor([-10.0, -9.93, -0.1, 0.0, 0.05, 9.9, 10.0], dtype=torch.float64)
    rows = two_hot.encode(x, 101, *GRID)
    assert rows.shape == (7, 101)
    assert ((rows > 1e-12).sum(-1) <= 2).all()
    assert torch.allclose(rows @ torch.linspace(*GRID, 101, dtype=torch.float64), x, atol=1e-12)
    assert torch.allclose(rows.sum(-1), torch.ones(7, dtype=torch.float64), atol=1e-12)


def test_encoding_clamps_to_the_grid() -> None:
    rows = two_hot.encode(torch.tensor([-50.0, 50.0]), 11, -1.0, 1.0)
    assert torch.equal(rows.argmax(-1), torch.tensor([0, 10]))
    assert rows.max() == 1.0


def test_symlog_and_symexp_are_inverse() -> None:
    x = torch.linspace(-1e4, 1e4, 101, dtype=torch.float64)
    assert torch.allclose(two_hot.symexp(two_hot.symlog(x)), x)
    assert two_hot.symlog(torch.tensor(1.0)) == pytest.approx(0.6931472)


@pytest.mark.parametrize("bins", [2, 7, 101])
def test_gradients_of_both_heads(bins: int) -> None:
    logits, x, _ = draw(bins)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: two_hot.expectation(rows, *GRID), logits)
    assert torch.autograd.gradcheck(lambda rows: two_hot.expectation(rows, -2.0, 2.0, log_scale=True), logits)
    assert torch.autograd.gradcheck(lambda rows: two_hot.cross_entropy(rows, x, *GRID), logits)


@pytest.mark.parametrize("bins", [2, 7, 101, 1023])
def test_native_matches_definition(bins: int, isa: str) -> None:
    logits, x, gradient = draw(bins, torch.float32)
    leaf = logits.double().requires_grad_()
    value = two_hot.two_hot_expectation(leaf, *GRID)
    (dvalue,) = torch.autograd.grad(value, leaf, gradient.double())
    loss = two_hot.two_hot_cross_entropy(leaf, x.double(), *GRID)
    (dloss,) = torch.autograd.grad(loss, leaf, gradient.double())
    assert relative_error(two_hot.expectation_forward(logits, *GRID, backend="native"), value.detach()) < 1e-6
    assert relative_error(two_hot.expectation_backward(gradient, logits, *GRID, backend="native"), dvalue) < 5e-6
    # A target's place among b bins is rounded to b / 2^24, which is all that the weights of a two-hot row can be.
    tolerance = max(1e-6, bins / 2**24)
    assert relative_error(two_hot.cross_entropy_forward(logits, x, *GRID, backend="native"), loss.detach()) < tolerance
    found = two_hot.cross_entropy_backward(gradient, logits, x, *GRID, backend="native")
    assert relative_error(found, dloss) < max(5e-6, tolerance)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_log_scale_is_symexp_of_the_expectation(backend: str, isa: str) -> None:
    logits, _, gradient = draw(11, torch.float32)
    leaf = logits.double().requires_grad_()
    value = two_hot.symexp(two_hot.two_hot_expectation(leaf, *GRID))
    (dvalue,) = torch.autograd.grad(value, leaf, gradient.double())
    options = {"backend": backend, "log_scale": True}
    # Rounding of the expectation, up to 10 here, is an error of as many parts after the exponential.
    assert relative_error(two_hot.expectation_forward(logits, *GRID, **options), value.detach()) < 1e-5
    assert relative_error(two_hot.expectation_backward(gradient, logits, *GRID, **options), dvalue) < 5e-5


def test_logits_far_apart_do_not_overflow(isa: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]])
    assert torch.allclose(
        two_hot.expectation_forward(logits, -1.0, 1.0, backend="native"), torch.tensor([-1.0, 0.0]), atol=1e-6
    )


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_nan_target_shows_in_its_own_loss_only(backend: str, isa: str) -> None:
    logits, x = torch.zeros(3, 11), torch.tensor([0.5, float("nan"), -0.5])
    loss = two_hot.cross_entropy_forward(logits, x, -1.0, 1.0, backend=backend)
    assert loss.isnan().tolist() == [False, True, False]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_bins >= 2 and vmin < vmax, got 1 bins"):
        two_hot.encode(torch.zeros(3), 1, *GRID)
    with pytest.raises(ValueError, match="num_bins >= 2 and vmin < vmax, got 1 bins"):
        two_hot.expectation(torch.zeros(3, 1), *GRID)
    with pytest.raises(ValueError, match=r"need scalars of shape \(4,\), got \(5,\)"):
        two_hot.cross_entropy(torch.zeros(4, 11), torch.zeros(5), *GRID)
    with pytest.raises(ValueError, match=r"need scalars of shape \(4,\), got \(4, 1\)"):
        two_hot.expectation_backward(torch.zeros(4, 1), torch.zeros(4, 11), *GRID)
