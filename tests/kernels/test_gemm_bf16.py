"""Products of factors rounded to bfloat16 against the float64 product of the same rounded factors."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels import gemm

pytestmark = pytest.mark.usefixtures("isa")  # every instruction set that this machine can run
# Tests of one instruction set at a time share the fixture, which is the same for all examples.
one_isa = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack(weight: Tensor) -> gemm.PackedWeight:
    packed = gemm.pack(weight, backend="native", bf16=True)
    assert packed is not None
    return packed


def error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Against what the terms could add up to, so that sums which cancel count no more than others.

    Factors that are cut off or not rounded at all are 1e-5 and more off, 2^-9 over the root of the terms' number.
    """
    x, weight, bias = x.bfloat16().double(), weight.bfloat16().double(), bias.double()
    return float((y.double() - (x @ weight.T + bias)).norm() / (x.abs() @ weight.abs().T + bias.abs()).norm())


# The edges of tiles, panels and blocks: see test_gemm.py.
rows = st.sampled_from([1, 2, 5, 6, 7, 13, 14, 15, 29, 64, 259])
columns = st.sampled_from([1, 3, 7, 8, 9, 16, 17, 31, 32, 33, 47, 101])
depths = st.sampled_from([1, 2, 3, 15, 16, 17, 101, 263, 264, 265, 266, 529, 640, 797, 1025])


@one_isa
@given(rows=rows | st.integers(1, 80), outputs=columns | st.integers(1, 80), inputs=depths | st.integers(1, 600))
def test_any_shape(rows: int, outputs: int, inputs: int) -> None:
    x, weight, bias = random(rows, inputs), random(outputs, inputs, seed=1), random(outputs, seed=2)
    packed, y = pack(weight), torch.full((rows, outputs), torch.nan)
    assert packed.product(x, bias, out=y) is y
    assert error(y, x, weight, bias) < 1e-6
    assert error(packed.product(x), x, weight, torch.zeros(outputs)) < 1e-6


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(64, 1500, 700), (300, 700, 651)])
def test_weights_beyond_a_cache(rows: int, outputs: int, inputs: int) -> None:
    x, weight, bias = random(rows, inputs), random(outputs, inputs, seed=1), random(outputs, seed=2)
    assert error(pack(weight).product(x, bias), x, weight, bias) < 1e-6


def test_factors_of_any_layout() -> None:
    x, weight, none = random(37, 60)[:, ::2], random(29, 30, seed=1), torch.zeros(29)
    transposed = pack(weight.T.contiguous().T).product(x)
    assert error(transposed, x, weight, none) < 1e-6
    assert torch.equal(transposed, pack(weight).product(x.contiguous()))
    assert error(pack(weight.T).product(random(37, 29)), random(37, 29), weight.T, torch.zeros(30)) < 1e-6


def test_rounding_is_torchs() -> None:
    """To nearest, to even between two; the largest floats become infinite and NaN stays NaN."""
    halves = torch.tensor([1 + i * 2.0**-8 for i in range(8)])
    near = torch.cat([halves, halves.nextafter(torch.tensor(2.0)), halves.nextafter(torch.tensor(0.0))])
    special = torch.tensor([0.0, 3.4e38, torch.finfo(torch.float32).max, 1e-37, torch.inf, torch.nan])
    values = torch.cat([near, special, random(500) * 10.0 ** random(500, seed=1)])
    values = torch.cat([values, -values])[:, None]
    one, expected = torch.ones(1, 1), values.bfloat16().float()
    torch.testing.assert_close(pack(one).product(values), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(pack(values).product(one).T, expected, rtol=0, atol=0, equal_nan=True)


def test_numbers_below_the_normal_ones_may_count_as_zero_where_the_processor_has_bf16(isa: str) -> None:
    tiny = torch.tensor([[1e-38, 3e-39, 2e-40, -1e-38]]).T
    y = pack(torch.ones(1, 1)).product(tiny)
    assert torch.equal(y, tiny.bfloat16().float()) or (isa in ("avx512bf16", "amx") and not y.any())


def test_packed_weights_take_half_the_memory(isa: str) -> None:
    """Of a float's, or in AMX's tiles, where a float is three bfloat16, a third."""
    for inputs, halved in ((64, 32), (65, 33)):
        whole = gemm.pack(random(48, inputs), backend="native")
        assert whole is not None
        part = inputs / 3 if isa == "amx" else halved
        assert pack(random(48, inputs))._panels.numel() * inputs == whole._panels.numel() * part


def test_threads_do_not_change_a_bit() -> None:
    packed, x, bias, before = (
        pack(random(300, 401)),
        random(256, 401, seed=1),
        random(300, seed=2),
        torch.get_num_threads(),
    )
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(packed.product(x, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("inputs", [20, 21])
def test_a_row_that_is_not_finite_stays_alone(inputs: int) -> None:
    packed, x = pack(random(40, inputs)), random(30, inputs, seed=1)
    expected = packed.product(x)
    x[7, -1] = torch.inf
    y, others = packed.product(x), torch.arange(30) != 7
    assert torch.equal(y[others], expected[others]) and not y[7].isfinite().any()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"x must be float32 \[R, 3\] on the cpu, got torch.bfloat16 \(2, 3\)"):
        pack(random(4, 3)).product(random(2, 3).bfloat16())
    assert gemm.pack(random(4, 3), backend="torch", bf16=True) is None
    assert backend.native is not None
    with pytest.raises(TypeError, match="float32 on cpu"):
        gemm.pack(random(4, 3).bfloat16(), backend="native", bf16=True)
