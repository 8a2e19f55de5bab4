"""The row kernels in Triton against their definitions in float64, on odd sizes."""

from types import ModuleType

import pytest
import torch
from closeness import TRITON_DEVICE, needs_triton, relative_error
from torch import Tensor

from pwm_fast.kernels import layernorm_mish, layernorm_simnorm, mish_layernorm
from pwm_fast.kernels.row_tiles import STRIPS, RowTile, strip_of

pytestmark = needs_triton
# Results are rounded to the dtype, all arithmetic is float32. The interpreter cuts bfloat16 off, 3.3e-3 on average.
FORWARD_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
BACKWARD_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
SHAPES = [(1, 1, 1), (3, 3, 7), (1, 65, 101), (2, 1, 1023)]  # tiles are slow in the interpreter
SIMNORM_SHAPES = [(1, 1, 8), (3, 3, 24), (1, 65, 104), (2, 1, 1016)]
KERNELS = [layernorm_mish, mish_layernorm, layernorm_simnorm]
CASES = [(k, shape) for k in KERNELS for shape in (SIMNORM_SHAPES if k is layernorm_simnorm else SHAPES)]


def name(value: object) -> str:
    return value.__name__.rsplit(".", 1)[-1] if isinstance(value, ModuleType) else str(value).replace(", ", "x")


def draw(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x [G, R, N], w and b [G, N], dy [G, R, N]."""
    generator = torch.Generator().manual_seed(sum(shape))
    parameters = (shape[0], shape[2])
    x, w, b, dy = (torch.randn(s, generator=generator) for s in (shape, parameters, parameters, shape))
    return tuple(t.to(TRITON_DEVICE, dtype) for t in (3 * x + 1, w, b, dy))


def exact(kernel: ModuleType, x: Tensor, w: Tensor, b: Tensor, dy: Tensor, *group: int) -> tuple[Tensor, ...]:
    """y, dx, dw, db of the definition in float64."""
    x, w, b = (t.double().requires_grad_() for t in (x, w, b))
    y = getattr(kernel, name(kernel))(x, w, b, *group)
    return y.detach(), *torch.autograd.grad(y, (x, w, b), dy.double())


def backward(kernel: ModuleType, dy: Tensor, y: Tensor, *rest: Tensor, **options: object) -> tuple[Tensor, ...]:
    inputs = (dy, y, *rest) if kernel is layernorm_simnorm else (dy, *rest)
    return kernel.backward(*inputs, backend="triton", **options)


@pytest.mark.parametrize(("kernel", "shape"), CASES, ids=name)
@pytest.mark.parametrize("dtype", FORWARD_TOLERANCE, ids=str)
def test_triton_matches_definition(kernel: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w, b, dy = draw(shape, dtype)
    y, *gradients = exact(kernel, x, w, b, dy)
    result, mean, rstd = kernel.forward(x, w, b, backend="triton")
    assert (result.dtype, mean.dtype, rstd.dtype) == (dtype, torch.float32, torch.float32)
    assert relative_error(result, y) < FORWARD_TOLERANCE[dtype]
    found = backward(kernel, dy, result, x, mean, rstd, w, b)
    if shape[2] == 1:  # one column is its own mean: nothing of x or w comes through, in float64 to the last bit
        assert not gradients[0].any()
        assert not found[0].any()
        found, gradients = found[2:], gradients[2:]
    for value, reference in zip(found, gradients, strict=True):
        assert value.dtype is dtype
        assert relative_error(value, reference) < BACKWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_the_input_gradient_alone_is_the_same(kernel: ModuleType) -> None:
    x, w, b, dy = draw((2, 3, 40))
    y, mean, rstd = kernel.forward(x, w, b, backend="triton")
    dx, _, _ = backward(kernel, dy, y, x, mean, rstd, w, b)
    alone = backward(kernel, dy, y, x, mean, rstd, w, b, need_weight_grad=False)
    assert relative_error(alone[0], dx) < 1e-7
    assert alone[1:] == (None, None)


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_twice_is_the_same_and_a_group_is_that_group_alone(kernel: ModuleType) -> None:
    x, w, b, dy = draw((2, 40, 24))
    runs = []
    for part in (slice(None), slice(None), slice(1, 2)):
        inputs = [t[part].contiguous() for t in (x, w, b, dy)]
        y, mean, rstd = kernel.forward(*inputs[:3], backend="triton")
        runs.append((y, *backward(kernel, inputs[3], y, inputs[0], mean, rstd, *inputs[1:3])))
    for first, second, alone in zip(*runs, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[1], alone[0])


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_out_receives_the_result_and_dx_may_be_dy(kernel: ModuleType) -> None:
    x, w, b, dy = draw((2, 3, 16))
    expected = kernel.forward(x, w, b, backend="triton")
    out = tuple(torch.full_like(t, float("nan")) for t in expected)
    for given, returned, value in zip(out, kernel.forward(x, w, b, backend="triton", out=out), expected, strict=True):
        assert returned is given
        assert torch.equal(given, value)
    dx = backward(kernel, dy, expected[0], x, *expected[1:], w, b)[0]
    in_place = dy.clone()
    backward(kernel, in_place, expected[0], x, *expected[1:], w, b, out=in_place)
    assert torch.equal(in_place, dx)


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_huge_inputs_stay_finite(kernel: ModuleType) -> None:
    """Rows of extremes, and constant rows far from zero, whose padding would be infinite if it were not masked."""
    row = torch.tensor([-1e18, -200.0, -90.0, -1e-30, 0.0, 1e-30, 30.0, 100.0, 1e18, *[1.0] * 15])
    x = torch.stack([row, torch.full_like(row, 1e37), row.clamp(-1e4, 1e4)])[None].to(TRITON_DEVICE)
    w, b = (torch.full((1, 24), value, device=TRITON_DEVICE) for value in (50.0, -3.0))
    y, mean, rstd = kernel.forward(x, w, b, backend="triton")
    assert torch.isfinite(y).all()
    reference = exact(kernel, x, w, b, torch.ones_like(x))[0]
    assert relative_error(y[:, 2], reference[:, 2]) < 1e-6
    for gradient in backward(kernel, torch.ones_like(x), y, x, mean, rstd, w, b):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_nan_stays_in_its_row(kernel: ModuleType) -> None:
    x, w, b, _ = draw((1, 3, 24))
    x[0, 1, 5] = float("nan")
    y, _, _ = kernel.forward(x, w, b, backend="triton")
    assert y[0, 1].isnan().all()
    assert y[0, [0, 2]].isfinite().all()


def test_views_and_mixed_dtypes() -> None:
    x, w, b, dy = draw((2, 6, 16))
    scattered, spread = x.transpose(0, 1).contiguous().transpose(0, 1).bfloat16(), dy[..., :1].expand(-1, -1, 16)
    y, mean, rstd = layernorm_mish.forward(scattered, w, b, backend="triton")
    reference = exact(layernorm_mish, x.bfloat16(), w, b, spread)
    assert relative_error(y, reference[0]) < FORWARD_TOLERANCE[torch.bfloat16]
    found = layernorm_mish.backward(spread, scattered, mean, rstd, w, b, backend="triton")
    for value, exactly in zip(found, reference[1:], strict=True):
        assert value.dtype is torch.float32
        assert relative_error(value, exactly) < BACKWARD_TOLERANCE[torch.float32]


def test_no_rows_give_no_gradient() -> None:
    x, w, b, dy = draw((2, 0, 16))
    y, mean, rstd = mish_layernorm.forward(x, w, b, backend="triton")
    dx, dw, db = mish_layernorm.backward(dy, x, mean, rstd, w, b, backend="triton")
    assert y.shape == dx.shape == x.shape
    assert not dw.any() and not db.any()


@pytest.mark.parametrize("group", [2, 4, 16])
def test_simnorm_of_other_groups(group: int) -> None:
    x, w, b, dy = draw((1, 2, 48))
    y, *gradients = exact(layernorm_simnorm, x, w, b, dy, group)
    result, mean, rstd = layernorm_simnorm.forward(x, w, b, group, backend="triton")
    assert relative_error(result, y) < 1e-6
    found = layernorm_simnorm.backward(dy, result, x, mean, rstd, w, b, group=group, backend="triton")
    for value, reference in zip(found, gradients, strict=True):
        assert relative_error(value, reference) < 5e-6


def test_simnorm_groups_that_do_not_fit_are_named() -> None:
    x, w, b, _ = draw((1, 2, 20))
    with pytest.raises(ValueError, match="groups of a power of two that divide the row, got 5, 20"):
        layernorm_simnorm.forward(x, w, b, group=5, backend="triton")


@pytest.mark.parametrize("columns", [1, 7, 101, 512, 1792, 4096])
@pytest.mark.parametrize("rows", [0, 1, 65, 1024, 70_000])
def test_tiles_cover_the_rows(columns: int, rows: int) -> None:
    tile = RowTile.of(columns)
    assert tile.width >= columns > tile.width // 2
    assert tile.rows * tile.width <= 32 * tile.warps * 16
    strip = strip_of(rows, tile.rows)
    assert strip % tile.rows == 0
    assert -(-rows // strip) <= STRIPS
