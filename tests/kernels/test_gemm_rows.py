"""Products of few rows with W [out, in] where it lies, against float64, with every instruction set of this machine."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pwm_fast import backend
from pwm_fast.kernels import gemm

pytestmark = pytest.mark.usefixtures("isa")

FEW = 16  # csrc/gemm_rows.hpp: kFewRows
LENGTHS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 33, 64, 67, 101, 257])


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias for x [g, m, k], W [G, n, k], bias [G, n]."""
    out = torch.full((weight.shape[0], x.shape[1], weight.shape[1]), float("nan"))
    return gemm.multiply(backend.native, x, weight.mT, out, bias)


def error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """Largest error, relative to the sum of the terms' sizes, so that terms may cancel."""
    wide, wide_weight = x.double(), weight.double().mT
    exact, size = wide @ wide_weight, wide.abs() @ wide_weight.abs()
    if bias is not None:
        exact, size = exact + bias.double()[:, None], size + bias.double().abs()[:, None]
    return float(((found - exact).abs() / size).max())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, FEW + 2), outputs=LENGTHS, inputs=LENGTHS, seed=st.integers(0, 1000))
@example(rows=1, outputs=1793, inputs=1787, seed=0)
@example(rows=4, outputs=1792, inputs=39, seed=0)
def test_against_float64(rows: int, outputs: int, inputs: int, seed: int) -> None:
    x, weight, bias = draw(seed, 1, rows, inputs), draw(seed + 1, 1, outputs, inputs), draw(seed + 2, 1, outputs)
    assert error(product(x, weight, bias), x, weight, bias) < 5e-7
    assert error(product(x, weight), x, weight) < 5e-7


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outputs=LENGTHS, inputs=LENGTHS, seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_those_beside_it(outputs: int, inputs: int, seed: int) -> None:
    x, weight, bias = draw(seed, 1, FEW, inputs), draw(seed + 1, 1, outputs, inputs), draw(seed + 2, 1, outputs)
    together = product(x, weight, bias)
    for first, rows in ((0, 1), (15, 1), (3, 2), (1, 5), (4, 12)):
        part = slice(first, first + rows)
        assert torch.equal(product(x[:, part], weight, bias), together[:, part])


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_threads_do_not_change_a_bit(rows: int) -> None:
    x, weight, bias, before = draw(0, 1, rows, 1301), draw(1, 1, 6301, 1301), draw(2, 1, 6301), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):  # 8 million multiplications a row, more than kWorkPerThread of csrc/gemm.cpp
            torch.set_num_threads(threads)
            results.append(product(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert error(results[0], x, weight, bias) < 5e-7
    assert all(torch.equal(found, results[0]) for found in results[1:])


def test_rows_anywhere_and_members_shared() -> None:
    """Rows apart from each other in all three arrays, two members of x for three of W each; nothing else is read."""
    x, weight = (torch.full(shape, float("nan")) for shape in ((2, 10, 50), (6, 40, 60)))
    x[:, ::2, 3:40], weight[:, 1::3, 5:42] = draw(0, 2, 5, 37), draw(1, 6, 13, 37)
    out = torch.full((6, 5, 30), 7.0)
    rows, weights = x[:, ::2, 3:40], weight[:, 1::3, 5:42]
    found = gemm.multiply(backend.native, rows, weights.mT, out[:, :, 4:17])
    assert error(found, rows.repeat_interleave(3, 0), weights) < 5e-7
    assert (out[:, :, :4] == 7).all() and (out[:, :, 17:] == 7).all()


def test_a_row_that_is_not_finite_stays_alone() -> None:
    x, weight = draw(0, 1, 7, 21), draw(1, 1, 10, 21)
    expected = product(x, weight)
    x[0, 4, 20] = torch.inf
    found, others = product(x, weight), torch.arange(7) != 4
    assert torch.equal(found[:, others], expected[:, others]) and not found[0, 4].isfinite().any()


@pytest.mark.parametrize("size", [(3, 5), (1100, 600)], ids=["small", "megabytes"])
def test_huge_copies_are_copies(size: tuple[int, int]) -> None:
    weight = draw(0, *size)
    copy = gemm.huge_copy(weight)
    assert torch.equal(copy, weight) and copy.is_contiguous() and copy.data_ptr() != weight.data_ptr()
    if size[0] > 3:
        assert copy.data_ptr() % (4 * gemm.HUGE_PAGE) == 0
    assert torch.equal(gemm.huge_copy(weight[:, 1:]), weight[:, 1:])
