"""Float32 products where TF32 is allowed: on AMX 16 bits of each factor's mantissa count, elsewhere all."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from closeness import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_native_critic_epoch import Case
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels import gemm
from pwm_fast.models.matmul import fast_matmul

pytestmark = pytest.mark.usefixtures("isa")
one_isa = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def allowed(tf32: bool = True) -> Iterator[None]:
    before = backend.native.allow_tf32(tf32)
    try:
        yield
    finally:
        assert backend.native.allow_tf32(before) is tf32


def products(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """x W^T + bias by packed weights, and by weights that each product brings into order."""
    packed = gemm.pack(weight, backend="native")
    assert packed is not None
    out = torch.full((1, x.shape[0], weight.shape[0]), torch.nan)
    return [packed.product(x, bias), gemm.multiply(backend.native, x[None], weight.T[None], out, bias[None])[0]]


edges = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 101])


@one_isa
@given(rows=edges | st.integers(1, 300), outputs=edges | st.integers(1, 80), inputs=edges | st.integers(1, 900))
def test_any_shape(isa: str, rows: int, outputs: int, inputs: int) -> None:
    x, weight, bias = random(rows, inputs), random(outputs, inputs, seed=1), random(outputs, seed=2)
    exact = products(x, weight, bias)
    with allowed():
        rounded = products(x, weight, bias)
    terms = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    for one, other in zip(rounded, exact):
        if isa != "amx":
            assert torch.equal(one, other)
        error = (one.double() - other.double()).abs() / terms
        assert error.max() < 2.0**-15  # 2^-17 of each factor, and their middles' product, 2^-16


def test_half_of_the_tiles_are_left_out_on_amx(isa: str) -> None:
    x, weight, none = random(256, 512), random(400, 512, seed=1), torch.zeros(400)
    exact = x.double() @ weight.double().T
    with allowed():
        errors = [relative_error(y, exact) for y in products(x, weight, none)]
    low, high = (1e-6, 1e-5) if isa == "amx" else (0.0, 1e-6)
    assert all(low < error < high for error in errors)


@pytest.mark.parametrize("rows", [64, 256])
def test_bf16_weights_stay_bf16(rows: int) -> None:
    x, weight = random(rows, 96), random(48, 96, seed=1)
    packed = gemm.pack(weight, backend="native", bf16=True)
    assert packed is not None
    expected = packed.product(x)
    with allowed():
        assert torch.equal(packed.product(x), expected)


def test_it_is_allowed_inside_a_block_only() -> None:
    for tf32 in (True, False):
        with allowed(not tf32):
            with fast_matmul(torch.float32, CPU, tf32=tf32):
                assert backend.native.allow_tf32(tf32) is tf32
            with pytest.raises(ZeroDivisionError), fast_matmul(torch.float32, CPU, tf32=tf32):
                raise ZeroDivisionError
    with allowed(), fast_matmul(torch.float64, CPU, tf32=False):  # nothing of ours
        assert backend.native.allow_tf32(True) is True


def test_critics_learn_in_it(isa: str) -> None:
    case = Case(units=(130, 70), rows=256, latent=90)
    expected, (exact, _, precise) = case.exact(), case.run()
    with allowed():
        critic, state, result = case.run()
    assert torch.equal(critic.parameters.flat, exact.parameters.flat) is (isa != "amx")
    assert relative_error(result.loss, expected[2].loss) < 1e-5 and relative_error(result.norm, precise.norm) < 1e-4
    assert relative_error(state["m"], expected[1]["m"]) < 1e-3


def test_threads_do_not_change_a_bit() -> None:
    case = Case(1, 3, (130, 70), 256, 90, 1, 2)
    with allowed():
        runs = [case.run(threads=threads) for threads in (1, 2, 5)]
    for critic, *_ in runs[1:]:
        assert torch.equal(critic.parameters.flat, runs[0][0].parameters.flat)
