"""Grouped linear layers against einsum, and the oneDNN switch."""

import pytest
import torch
from closeness import relative_error

from pwm_fast.kernels import linear


def draw(groups: int, shared: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """x [shared, 9, 7], weight [groups, 5, 7], bias [groups, 5], dy [groups, 9, 5]."""
    generator = torch.Generator().manual_seed(groups)
    shapes = ((shared, 9, 7), (groups, 5, 7), (groups, 5), (groups, 9, 5))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


@pytest.mark.parametrize(("groups", "shared"), [(1, 1), (3, 3), (3, 1), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("in_place", [True, False], ids=["out", "new"])
def test_forward_and_gradients(groups: int, shared: int, dtype: torch.dtype, in_place: bool) -> None:
    x, weight, bias, dy = (t.requires_grad_() for t in draw(groups, shared))
    spread = x.repeat_interleave(groups // shared, 0)
    y = torch.einsum("gri,goi->gro", spread, weight) + bias[:, None]
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)
    x, weight, bias, dy = (t.detach().to(dtype) for t in (x, weight, bias, dy))

    def out(like: torch.Tensor) -> torch.Tensor | None:
        return torch.full_like(like, float("nan"), dtype=dtype) if in_place else None

    tolerance = 1e-6 if dtype is torch.float32 else 1e-14
    assert relative_error(linear.forward(x, weight, bias, out=out(y)), y.detach()) < tolerance
    assert relative_error(linear.forward(x, weight), (y - bias[:, None].double()).detach()) < tolerance
    assert relative_error(linear.input_grad(dy, weight, out=out(dx), groups=shared), dx) < tolerance
    assert relative_error(linear.weight_grad(dy, x, out=out(dw)), dw) < tolerance
    beside = torch.full_like(db, float("nan"), dtype=dtype)
    assert relative_error(linear.weight_grad(dy, x, bias_out=beside), dw) < tolerance
    assert relative_error(beside, db) < tolerance


def test_out_is_what_comes_back() -> None:
    x, weight, bias, _ = draw(1, 1)
    y = torch.empty(1, 9, 5, dtype=torch.float64)
    assert linear.forward(x, weight, bias, out=y).data_ptr() == y.data_ptr()
    assert relative_error(y, linear.forward(x, weight, bias)) == 0


def test_wrong_shapes_are_named() -> None:
    x, weight, bias, dy = draw(3, 3)
    with pytest.raises(ValueError, match=r"x must be \[G or a divisor of G, R, 7\].*got \(2, 9, 7\)"):
        linear.forward(x[:2], weight, bias)
    with pytest.raises(ValueError, match="groups must divide the 3 weights, got 2"):
        linear.input_grad(dy, weight, groups=2)
    with pytest.raises(ValueError, match="must share rows"):
        linear.weight_grad(dy[:, :4], x)


def test_fast_matmul_is_exact_and_undone() -> None:
    before = linear.matmul_error()
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(setting, "fp32_precision", None)
    with linear.fast_matmul() as fast:
        assert linear.matmul_error() < linear.GATE
        assert fast.reason
    assert getattr(setting, "fp32_precision", None) == precision
    assert linear.matmul_error() == before


def test_products_that_round_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "matmul_error", lambda: 3e-3)
    fast = linear.fast_matmul()
    assert not fast.active
    assert "3.0e-03" in fast.reason or "no oneDNN" in fast.reason
    monkeypatch.undo()
    assert linear.matmul_error() < linear.GATE
