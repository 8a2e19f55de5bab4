"""layernorm_mish, mish_layernorm and layernorm_simnorm against their definitions, in torch and in native code."""

from types import ModuleType

import pytest
import torch
from closeness import relative_error
from torch import Tensor
from torch.nn import functional as F

from pwm_fast.kernels import layernorm_mish, layernorm_simnorm, mish_layernorm

FORWARD_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
BACKWARD_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
# (groups, rows, columns): primes, single rows, less than a vector, vectors and a tail, several chunks of work.
SHAPES = [(1, 1, 7), (3, 3, 7), (1, 65, 101), (3, 3, 1023), (1, 3, 4096), (3, 65, 200), (3, 1, 16), (2, 300, 33)]
SIMNORM_SHAPES = [(1, 1, 8), (3, 3, 24), (1, 65, 104), (3, 3, 1032), (1, 3, 4096), (2, 300, 16)]
CASES = [
    *((layernorm_mish, shape) for shape in SHAPES),
    *((mish_layernorm, shape) for shape in SHAPES),
    *((layernorm_simnorm, shape) for shape in SIMNORM_SHAPES),
]
KERNELS = [layernorm_mish, mish_layernorm, layernorm_simnorm]


def name(value: object) -> str:
    return value.__name__.rsplit(".", 1)[-1] if isinstance(value, ModuleType) else str(value).replace(", ", "x")


def definition(kernel: ModuleType, *inputs: Tensor) -> Tensor:
    return getattr(kernel, name(kernel))(*inputs)


def draw(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [G, R, N], w and b [G, N], dy [G, R, N]."""
    generator = torch.Generator().manual_seed(sum(shape))
    groups, _, columns = shape
    x, w, b, dy = (
        torch.randn(s, generator=generator, dtype=dtype) for s in (shape, (groups, columns), (groups, columns), shape)
    )
    return 3 * x + 1, w, b, dy


def exact(kernel: ModuleType, x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx, dw, db of the definition in float64."""
    x, w, b = (t.double().requires_grad_() for t in (x, w, b))
    y = definition(kernel, x, w, b)
    return y.detach(), *torch.autograd.grad(y, (x, w, b), dy.double())


def backward(kernel: ModuleType, dy: Tensor, y: Tensor, *rest: Tensor, **options: object) -> tuple[Tensor, ...]:
    return (
        kernel.backward(dy, y, *rest, **options)
        if kernel is layernorm_simnorm
        else kernel.backward(dy, *rest, **options)
    )


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_definition_is_the_composition_of_torch_functions(kernel: ModuleType) -> None:
    x, w, b, _ = draw((2, 5, 24), torch.float64)

    def norm(rows: Tensor) -> Tensor:
        return torch.stack([F.layer_norm(rows[g], (24,), w[g], b[g]) for g in range(2)])

    expected = {
        layernorm_mish: lambda: F.mish(norm(x)),
        mish_layernorm: lambda: norm(F.mish(x)),
        layernorm_simnorm: lambda: torch.softmax(norm(x).view(2, 5, 3, 8), -1).view(2, 5, 24),
    }[kernel]()
    assert relative_error(definition(kernel, x, w, b), expected) < 1e-14


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [True, False], ids=["all gradients", "input gradient"])
def test_torch_matches_definition(kernel: ModuleType, dtype: torch.dtype, weights: bool) -> None:
    x, w, b, dy = draw((3, 7, 40), dtype)
    y, *gradients = exact(kernel, x, w, b, dy)
    result, mean, rstd = kernel.forward(x, w, b, backend="torch")
    assert relative_error(result, y) < FORWARD_TOLERANCE[dtype]
    found = backward(kernel, dy, result, x, mean, rstd, w, b, need_weight_grad=weights, backend="torch")
    for value, reference in zip(found, gradients if weights else gradients[:1], strict=False):
        assert relative_error(value, reference) < BACKWARD_TOLERANCE[dtype]
    assert weights or found[1:] == (None, None)


@pytest.mark.parametrize(("kernel", "shape"), CASES, ids=name)
def test_native_matches_definition(kernel: ModuleType, shape: tuple[int, int, int], isa: str) -> None:
    x, w, b, dy = draw(shape)
    y, *gradients = exact(kernel, x, w, b, dy)
    result, mean, rstd = kernel.forward(x, w, b, backend="native")
    assert relative_error(result, y) < FORWARD_TOLERANCE[torch.float32]
    for value, reference in zip(
        backward(kernel, dy, result, x, mean, rstd, w, b, backend="native"), gradients, strict=True
    ):
        assert relative_error(value, reference) < BACKWARD_TOLERANCE[torch.float32]


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_gradcheck(kernel: ModuleType) -> None:
    x, w, b, _ = draw((2, 3, 16), torch.float64)
    assert torch.autograd.gradcheck(kernel.apply, [t.requires_grad_() for t in (x, w, b)])


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_results_do_not_depend_on_threads(kernel: ModuleType, isa: str) -> None:
    x, w, b, dy = draw((2, 257, 512))
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        y, mean, rstd = kernel.forward(x, w, b, backend="native")
        runs.append((y, *backward(kernel, dy, y, x, mean, rstd, w, b, backend="native")))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_a_group_equals_that_group_alone(kernel: ModuleType) -> None:
    x, w, b, dy = draw((3, 20, 40))
    y, mean, rstd = kernel.forward(x, w, b)
    gradients = backward(kernel, dy, y, x, mean, rstd, w, b)
    one = [t[1:2].contiguous() for t in (x, w, b, dy)]
    y1, mean1, rstd1 = kernel.forward(*one[:3])
    assert torch.equal(y1[0], y[1])
    for alone, together in zip(backward(kernel, one[3], y1, one[0], mean1, rstd1, *one[1:3]), gradients, strict=True):
        assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize("kernel", [layernorm_mish, mish_layernorm], ids=name)
def test_extreme_inputs_stay_finite(kernel: ModuleType, isa: str) -> None:
    x = torch.tensor([[[-1e30, -200.0, -90.0, -1e-30, 0.0, 1e-30, 30.0, 100.0, 1e30]]])
    w, b = torch.full((1, 9), 50.0), torch.zeros(1, 9)
    x = x.clamp(-1e4, 1e4) if kernel is mish_layernorm else x[..., 1:-1].contiguous()
    w, b = w[:, : x.shape[-1]].contiguous(), b[:, : x.shape[-1]].contiguous()
    y = exact(kernel, x, w, b, torch.ones_like(x))[0]
    result, mean, rstd = kernel.forward(x, w, b, backend="native")
    assert relative_error(result, y) < 1e-6
    dx = kernel.backward(torch.ones_like(x), x, mean, rstd, w, b, backend="native")[0]
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_nan_stays_in_its_row(kernel: ModuleType, isa: str) -> None:
    x, w, b, _ = draw((1, 3, 24))
    x[0, 1, 5] = float("nan")
    y, _, _ = kernel.forward(x, w, b, backend="native")
    assert y[0, 1].isnan().all()
    assert y[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_out_receives_the_result(kernel: ModuleType, backend: str, isa: str) -> None:
    x, w, b, dy = draw((2, 3, 16))
    expected = kernel.forward(x, w, b, backend=backend)
    out = tuple(torch.full_like(t, float("nan")) for t in expected)
    for given, returned, value in zip(out, kernel.forward(x, w, b, backend=backend, out=out), expected, strict=True):
        assert returned is given
        assert torch.equal(given, value)
    dx, _, _ = backward(kernel, dy, expected[0], x, *expected[1:], w, b, backend=backend)
    in_place = dy.clone()
    backward(kernel, in_place, expected[0], x, *expected[1:], w, b, backend=backend, out=in_place)
    assert torch.equal(in_place, dx)


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_views_give_what_their_copies_give(kernel: ModuleType) -> None:
    x, w, b, dy = draw((2, 6, 16))
    x, dy = x.transpose(0, 1).contiguous().transpose(0, 1), dy[..., :1].expand(-1, -1, 16)
    y, mean, rstd = kernel.forward(x, w, b)
    assert torch.equal(y, kernel.forward(x.clone(memory_format=torch.contiguous_format), w, b)[0])
    dx = backward(kernel, dy, y, x, mean, rstd, w, b)[0]
    assert torch.equal(dx, backward(kernel, dy.contiguous(), y, x.contiguous(), mean, rstd, w, b)[0])


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_wrong_shapes_are_named(kernel: ModuleType) -> None:
    x, w, b, _ = draw((2, 6, 16))
    with pytest.raises(ValueError, match=r"x must be grouped rows \[G, R, N\], got shape \(6, 16\)"):
        kernel.forward(x[0], w, b)
    with pytest.raises(ValueError, match=r"weight and bias must be \(2, 16\).*got \(1, 16\)"):
        kernel.forward(x, w[:1], b)
    y, mean, rstd = kernel.forward(x, w, b)
    with pytest.raises(ValueError, match=r"must have x's shape \(2, 6, 16\), got \(2, 5, 16\)"):
        backward(kernel, x[:, :5], y, x, mean, rstd, w, b)
    with pytest.raises(ValueError, match=r"mean and rstd must be \(2, 6\).*got \(2, 5\)"):
        backward(kernel, x, y, x, mean[:, :5], rstd, w, b)
    with pytest.raises(ValueError, match=r"out must be contiguous torch.float32 \(2, 6, 16\), got .* \(2, 6, 8\)"):
        backward(kernel, x, y, x, mean, rstd, w, b, out=torch.empty(2, 6, 8))


def test_simnorm_of_other_groups_runs_in_torch() -> None:
    x, w, b, dy = draw((1, 4, 20))
    y, mean, rstd = layernorm_simnorm.forward(x, w, b, group=5)
    assert torch.allclose(y.view(1, 4, 4, 5).sum(-1), torch.ones(1, 4, 4))
    dx = layernorm_simnorm.backward(dy, y, x, mean, rstd, w, b, group=5)[0]
    leaf = x.double().requires_grad_()
    layernorm_simnorm.layernorm_simnorm(leaf, w.double(), b.double(), 5).backward(dy.double())
    assert leaf.grad is not None
    assert relative_error(dx, leaf.grad) < 5e-6
    with pytest.raises(ValueError, match="multiple of the simnorm group 8, got 20"):
        layernorm_simnorm.forward(x, w, b)
