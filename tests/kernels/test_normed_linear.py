"""Fused layers in Triton's interpreter against chains of their plain-torch definitions in float64."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from itertools import pairwise

import pytest
from closeness import relative_error
from torch import Tensor

from pwm_fast.kernels import normed_linear, triton_support
from pwm_fast.kernels.normed_linear import Norm, RowGradient, SavedRows, Statistics

pytestmark = pytest.mark.skipif(
    triton_support.unavailable is not None or not (triton_support.interpreting or torch.cuda.is_available()),
    reason="needs Triton with a GPU or its interpreter",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 rounds operands and stored rows, each at 2^-9 of their size, twice in a chain of two layers.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
CHAINS = [("layernorm_mish", "layernorm_simnorm"), ("mish_layernorm", "mish_layernorm")]
# (members G, groups of shared inputs g, rows, widths): one row, primes, more than one tile, several members.
SHAPES = [(1, 1, 1, (7, 24, 16)), (3, 1, 33, (19, 104, 40)), (6, 2, 17, (33, 40, 24)), (2, 2, 65, (5, 72, 136))]


class Chain:
    """Two layers: x -> pre-norm -> norm -> pre-norm, on float64 masters of what `dtype` can hold."""

    def __init__(self, shape: tuple[int, int, int, tuple[int, ...]], kinds: tuple[str, str], dtype: torch.dtype):
        members, shared, rows, widths = shape
        generator = torch.Generator().manual_seed(rows)

        def draw(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            value = torch.randn(size, generator=generator, dtype=torch.float64) * scale + shift
            return value.to(dtype).double().to(DEVICE)

        self.dtype, self.kinds = dtype, kinds
        self.x = draw(shared, rows, widths[0])
        self.weights = [draw(members, n, k, scale=k**-0.5) for k, n in pairwise(widths)]
        self.biases = [draw(members, n, shift=2.0) for n in widths[1:]]
        self.norms = [Norm(kind, draw(members, n, shift=1.0), draw(members, n)) for kind, n in zip(kinds, widths[1:])]
        self.dy = draw(members, rows, widths[-1])

    def exact(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both pre-norm rows, the gradient at the first layer's output and at the input (per member)."""
        x = self.x.repeat_interleave(len(self.weights[0]) // len(self.x), 0).requires_grad_()
        first = normed_linear.normed_linear(x, self.weights[0], self.biases[0])
        activated = normed_linear.activate(first, self.norms[0])
        second = normed_linear.normed_linear(activated, self.weights[1], self.biases[1])
        y = normed_linear.activate(second, self.norms[1])
        gradients = torch.autograd.grad(y, (activated, x), self.dy)
        return first.detach(), second.detach(), *gradients

    def norm(self, i: int) -> Norm:
        return Norm(self.kinds[i], *(t.to(self.dtype) for t in self.norms[i][1:]))

    def forward(self, programs: int = 4) -> tuple[SavedRows, SavedRows]:
        weights, biases = ([t.to(self.dtype) for t in tensors] for tensors in (self.weights, self.biases))
        first, stats = normed_linear.forward(
            self.x.to(self.dtype), weights[0], biases[0], next_kind=self.kinds[0], programs=programs
        )
        assert stats is not None
        second, last = normed_linear.forward(
            first, weights[1], biases[1], self.norm(0), stats, self.kinds[1], programs=programs
        )
        assert last is not None
        return SavedRows(first, stats, self.norm(0)), SavedRows(second, last, self.norm(1))


@pytest.mark.parametrize("kinds", CHAINS, ids="-".join)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((s, torch.float64) for s in SHAPES), *((SHAPES[1], d) for d in (torch.float32, torch.bfloat16))],
    ids=str,
)
def test_two_layers_match_the_definition(
    shape: tuple[int, int, int, tuple[int, ...]], kinds: tuple[str, str], dtype: torch.dtype
) -> None:
    chain = Chain(shape, kinds, dtype)
    first, second, d_activated, dx = chain.exact()
    saved = chain.forward()
    tolerance = TOLERANCE[dtype]
    assert relative_error(saved[0].pre, first) < tolerance
    assert relative_error(saved[1].pre, second) < tolerance
    weights = [w.to(dtype) for w in chain.weights]
    start = normed_linear.row_gradient(chain.dy.to(dtype), saved[1])
    plain = normed_linear.input_gradient(start, weights[1], saved[1], None, programs=4)
    assert relative_error(plain.d, d_activated) < tolerance
    hidden = normed_linear.input_gradient(start, weights[1], saved[1], saved[0], programs=4)
    assert relative_error(normed_linear.input_gradient(hidden, weights[0], saved[0], None).d, dx) < tolerance


@pytest.mark.parametrize("kind", ["layernorm_mish", "mish_layernorm"])
def test_statistics_keep_their_digits_where_rows_are_far_from_zero(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(1, 20, n, generator=generator).to(DEVICE) for n in (16, 16))
    weight = torch.randn(1, 200, 16, generator=generator).to(DEVICE) * 0.1
    bias = torch.full((1, 200), 1000.0, device=DEVICE)  # a variance of 0.16 beside a squared mean of 1e6
    y, stats = normed_linear.forward(x, weight, bias, next_kind=kind, programs=8)
    assert stats is not None
    assert stats.tiles.shape[-1] > 1
    mean, rstd = stats.merged(200)
    rows = y.double()  # the statistics are of the unrounded sums, within half a unit of the 24th digit of these
    exact = 1 / torch.sqrt(rows.var(-1, correction=0) + 1e-5)
    assert relative_error(mean, rows.mean(-1)) < 1e-7
    assert relative_error(rstd, exact) < 1e-4


def test_shared_inputs_equal_repeated_ones_bitwise() -> None:
    chain = Chain((6, 2, 17, (33, 40, 24)), CHAINS[0], torch.float32)
    once = chain.forward()[0].pre
    chain.x = chain.x.repeat_interleave(3, 0)
    assert torch.equal(once, chain.forward()[0].pre)


def test_a_member_equals_that_member_alone_bitwise_on_equal_tiles() -> None:
    chain = Chain((3, 3, 33, (19, 40, 24)), CHAINS[1], torch.float32)
    together = chain.forward(programs=1)[1].pre[1:2]
    chain.x, chain.weights, chain.biases = chain.x[1:2], [w[1:2] for w in chain.weights], [b[1:2] for b in chain.biases]
    chain.norms = [Norm(n.kind, n.gain[1:2], n.shift[1:2]) for n in chain.norms]
    assert torch.equal(together, chain.forward(programs=1)[1].pre)


def test_nan_stays_in_its_row() -> None:
    chain = Chain((1, 1, 5, (19, 40, 24)), CHAINS[0], torch.float32)
    chain.x[0, 2, 3] = float("nan")
    y = chain.forward()[1].pre[0]
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


def test_bf16_products_of_float32_rows_round_their_operands_only() -> None:
    chain = Chain((1, 1, 33, (64, 48, 16)), CHAINS[0], torch.float32)
    x, w, b = chain.x.float(), chain.weights[0].float(), chain.biases[0].float()
    y, _ = normed_linear.forward(x, w, b, precision="bf16")
    assert relative_error(y, normed_linear.normed_linear(x.double(), w.double(), b.double())) > 1e-4
    x, w = x.bfloat16().float(), w.bfloat16().float()
    y, _ = normed_linear.forward(x, w, b, precision="bf16")
    assert relative_error(y, normed_linear.normed_linear(x.double(), w.double(), b.double())) < 2e-6


@pytest.mark.parametrize("programs", [1, 8, 132])
def test_tiles_use_all_programs_before_they_grow(programs: int) -> None:
    bm, bn = normed_linear.tile_shape(64, 1792, 1, programs)
    tiles = -(-64 // bm) * -(-1792 // bn)
    assert {1: (64, 64), 8: (64, 64), 132: (32, 32)}[programs] == (bm, bn)
    assert tiles >= min(programs, 112)


def test_wrong_arguments_are_named() -> None:
    chain = Chain((6, 2, 17, (33, 40, 24)), CHAINS[0], torch.float32)
    x, w, b = chain.x.float(), chain.weights[0].float(), chain.biases[0].float()
    with pytest.raises(ValueError, match=r"x must be \[G or a divisor of G, R, 33\].*got \(2, 17, 32\)"):
        normed_linear.forward(x[..., :32], w, b)
    with pytest.raises(ValueError, match=r"bias must be \(6, 40\), got \(6, 39\)"):
        normed_linear.forward(x, w, b[:, :39])
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, got 'fp8'"):
        normed_linear.forward(x, w, b, precision="fp8")
    with pytest.raises(ValueError, match="norm and statistics come together"):
        normed_linear.forward(x, w, b, chain.norm(0))
    with pytest.raises(ValueError, match="d must have a group for each of the 6 weights, got 2"):
        normed_linear.input_gradient(RowGradient(torch.zeros(2, 17, 40, device=DEVICE)), w, None, None)
    sums = Statistics(torch.zeros(2, 6, 17, 1, device=DEVICE), 40)
    with pytest.raises(ValueError, match="belong to a gradient at normalised rows"):
        normed_linear.input_gradient(RowGradient(torch.zeros(6, 17, 40, device=DEVICE), sums), w, None, None)
