"""The native matrix product at every edge of its blocks, against float64."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from closeness import relative_error

from pwm_fast import backend
from pwm_fast.kernels import gemm

pytestmark = pytest.mark.usefixtures("isa")  # every instruction set that this machine can run

# AMX: tiles of 16 rows and columns and 32 along k, two by two; blocks of 256 rows or more, of 21 tiles along k or more.
# AVX-512: tiles of 14 rows, panels of 32 columns in two vectors, blocks of 640 and 1024 along k, 1.5 MB between small
# and large. AVX2 and portable: tiles of 6 rows, panels of 16 and 8 columns, blocks of 264 along k and 258 along rows.
SHAPES = [
    (1, 1, 1),
    (14, 32, 16),
    (15, 33, 17),
    (13, 47, 31),
    (64, 101, 130),
    (3, 300, 1),
    (256, 1, 200),
    (40, 65, 1300),
    (6, 16, 264),
    (7, 23, 265),
    (259, 9, 8),
    (1, 97, 53),
]
LARGE = [(300, 700, 650), (5, 1025, 700), (530, 35, 800)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def untouched(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def row_major(x: torch.Tensor) -> torch.Tensor:
    return x


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT


def strided(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_full((x.shape[0], 2 * x.shape[1], 3 * x.shape[2] + 5), float("nan"))
    view = wide[:, ::2, 2 : 2 + 3 * x.shape[2] : 3]
    view.copy_(x)
    return view


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("layout_b", [row_major, transposed, strided], ids=lambda f: f"b-{f.__name__}")
@pytest.mark.parametrize("layout_a", [row_major, transposed, strided], ids=lambda f: f"a-{f.__name__}")
def test_product_bias_and_row_sums(shape: tuple[int, int, int], layout_a, layout_b) -> None:
    m, n, k = shape
    a, b, bias = random(2, m, k), random(2, k, n, seed=1), random(2, n, seed=2)
    expected = a.double() @ b.double() + bias.double()[:, None]
    sums = untouched(2, m)
    out = gemm.multiply(backend.native, layout_a(a), layout_b(b), untouched(2, m, n), bias, sums)
    assert relative_error(out, expected) < 1e-6
    assert relative_error(sums, a.double().sum(2)) < 1e-6
    without = gemm.multiply(backend.native, layout_a(a), layout_b(b), untouched(2, m, n))
    assert relative_error(without, a.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_packed_weights(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    weight, bias = random(1, outputs, inputs), random(outputs, seed=1)
    for one in (weight, transposed(weight), strided(weight)):
        packed = gemm.pack(one[0], backend="native")
        assert packed is not None
        for x in (random(rows, inputs, seed=2), strided(random(1, rows, inputs, seed=2))[0]):
            expected = x.double() @ weight[0].double().T
            assert relative_error(packed.product(x), expected) < 1e-6
            assert relative_error(packed.product(x, bias), expected + bias.double()) < 1e-6


def test_weights_packed_for_other_panels_are_refused() -> None:
    isa, packed = backend.native.isa(), gemm.pack(random(20, 30), backend="native")
    assert packed is not None
    panel, others = backend.native.gemm_panel_row(), backend.native.available_isas()
    try:
        while backend.native.gemm_panel_row() == panel:  # AVX-512 with and without BF16 have the same
            if not others:
                pytest.skip("needs a processor that runs two of the products' instruction sets")
            backend.native.set_isa(others.pop())
        with pytest.raises(ValueError, match=r"B was packed in panels of .* pack it again"):
            packed.product(random(5, 30))
    finally:
        backend.native.set_isa(isa)


def test_the_variable_forces_an_instruction_set(isa: str) -> None:
    program = "from pwm_fast import backend; print(backend.native.isa(), backend.native.has_gemm())"
    run = partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True)
    assert run(env=os.environ | {"PWM_FAST_ISA": isa}).stdout.split() == [isa, "True"]
    failed = run(env=os.environ | {"PWM_FAST_ISA": "avx1024"})
    assert "PWM_FAST_ISA: instruction set 'avx1024' cannot run here; available: " in failed.stderr


def test_members_shared_by_neighbouring_groups() -> None:
    a, b = random(2, 20, 30), random(6, 30, 40, seed=1)
    out = gemm.multiply(backend.native, a, b, untouched(6, 20, 40))
    assert relative_error(out, a.double().repeat_interleave(3, 0) @ b.double()) < 1e-6
    out = gemm.multiply(backend.native, b.mT, a.mT, untouched(6, 40, 20))
    assert relative_error(out, b.double().mT @ a.double().mT.repeat_interleave(3, 0)) < 1e-6


def test_what_lies_beside_the_output_is_left_alone() -> None:
    wide = torch.full((2, 17, 50), 7.0)
    gemm.multiply(backend.native, random(2, 17, 9), random(2, 9, 33), wide[:, :, 5:38])
    assert (wide[:, :, :5] == 7).all() and (wide[:, :, 38:] == 7).all()


def test_output_of_any_layout() -> None:
    a, b = random(2, 17, 9), random(2, 9, 33)
    expected = gemm.multiply(backend.native, a, b, untouched(2, 17, 33))
    out = untouched(2, 33, 17).mT
    assert torch.equal(gemm.multiply(backend.native, a, b, out), expected) and torch.equal(out, expected)


def test_threads_do_not_change_a_bit() -> None:
    a, b, before = random(3, 256, 400), random(3, 400, 300), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sums = untouched(3, 256)
            results.append((gemm.multiply(backend.native, a, b, untouched(3, 256, 300), None, sums), sums))
    finally:
        torch.set_num_threads(before)
    for out, sums in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(sums, results[0][1])


def test_a_row_that_is_not_finite_stays_alone() -> None:
    a, b = random(1, 30, 20), random(1, 20, 40)
    expected = gemm.multiply(backend.native, a, b, untouched(1, 30, 40))
    a[0, 7, 3] = torch.inf
    out = gemm.multiply(backend.native, a, b, untouched(1, 30, 40))
    others = torch.arange(30) != 7
    assert torch.equal(out[:, others], expected[:, others]) and not out[0, 7].isfinite().any()


@pytest.mark.parametrize("spread", [0, 3], ids=["alike", "of any size"])
def test_products_are_as_exact_as_multiply_adds(spread: int) -> None:
    """Measured: 2.1e-7 (AMX) and 2.7e-7 (all others) of the norm, up to 5.8e-7 and 4.7e-7 of the terms' sizes."""
    a, b = random(1, 64, 700), random(1, 700, 96, seed=1)
    a = a * 10 ** (spread * random(1, 64, 700, seed=2))
    b = b * 10 ** (spread * random(1, 700, 96, seed=3))
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    out = gemm.multiply(backend.native, a, b, untouched(1, 64, 96))
    assert relative_error(out, exact) < 3.5e-7
    assert ((out.double() - exact).abs() / terms).max() < 1e-6


def test_other_types_are_left_to_torch() -> None:
    assert gemm.pack(random(3, 4).double()) is None
    assert gemm.pack(random(3, 4), backend="torch") is None
    with pytest.raises(TypeError, match="float32 on cpu"):
        gemm.pack(random(3, 4).double(), backend="native")


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"cannot multiply \(1, 2, 3\) by \(1, 4, 5\)"):
        gemm.multiply(backend.native, random(1, 2, 3), random(1, 4, 5), untouched(1, 2, 5))
    with pytest.raises(ValueError, match=r"vectors must be \(1, 5\)"):
        gemm.multiply(backend.native, random(1, 2, 3), random(1, 3, 5), untouched(1, 2, 5), random(1, 4))
    packed = gemm.pack(random(4, 3), backend="native")
    assert packed is not None
    with pytest.raises(ValueError, match=r"x must be float32 \[R, 3\]"):
        packed.product(random(2, 4))
