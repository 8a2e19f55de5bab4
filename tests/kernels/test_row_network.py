"""All layers on rows in one native call: against float64, and bit by bit against the same kernels layer by layer."""

import copy
import pickle

import numpy as np
import pytest
import torch
from closeness import relative_error

from pwm_fast import backend
from pwm_fast.kernels import layernorm_mish, layernorm_simnorm, linear, mish_layernorm
from pwm_fast.kernels.row_network import RowLayer, RowNetwork

pytestmark = pytest.mark.usefixtures("isa")

KERNELS = {
    "layernorm_mish": layernorm_mish.forward,
    "layernorm_simnorm": layernorm_simnorm.forward,
    "mish_layernorm": mish_layernorm.forward,
}
ORDER = ("layernorm_mish", "layernorm_mish", "layernorm_simnorm", "mish_layernorm", "mish_layernorm", "none")
WIDTHS = [(7, 24, 17, 16, 13, 9, 3), (39, 101, 130, 64, 70, 50, 6), (1, 1, 3, 8, 2, 5, 1)]


def make(widths: tuple[int, ...], wide: int = 0) -> RowNetwork:
    """A policy's layers, `wide` numbers between rows of weights; gains near 1: nothing is badly conditioned."""
    generator, layers = torch.Generator().manual_seed(0), []
    for kernel, inputs, outputs in zip(ORDER, widths, widths[1:]):
        weight = torch.randn(outputs, inputs + wide, generator=generator).div_(inputs**0.5)[:, :inputs]
        bias, gain, shift = (0.3 * torch.randn(outputs, generator=generator) for _ in range(3))
        layers.append(RowLayer(kernel, weight, bias, *(() if kernel == "none" else (gain + 1, shift))))
    return RowNetwork(layers)


def by_layers(network: RowNetwork, x: torch.Tensor, first: int = 0) -> torch.Tensor:
    """The definition in the type of x: float64 runs in torch, float32 on the native kernels one by one."""
    x = x[None]
    for layer in network.layers[first:]:
        weight, bias, *norm = (None if t is None else t.to(x.dtype)[None] for t in layer[1:])
        assert weight is not None
        x = linear.forward(x, weight, bias)
        if layer.kernel != "none":
            x = KERNELS[layer.kernel](x, *norm)[0]
    return x[0]


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 257, 700])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_against_the_layers(widths: tuple[int, ...], rows: int) -> None:
    network, x = make(widths), torch.randn(rows, widths[0], generator=torch.Generator().manual_seed(1))
    found = network.forward(x)
    assert relative_error(found, by_layers(network, x.double())) < (2e-5 if widths[0] == 1 else 5e-6)
    assert torch.equal(found, by_layers(network, x))


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_from_any_layer_on(first: int) -> None:
    network = make(WIDTHS[0])
    x = torch.randn(5, WIDTHS[0][first])
    assert torch.equal(network.forward(x, first), by_layers(network, x, first))


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    network, x = make(WIDTHS[1]), torch.randn(16, WIDTHS[1][0])
    together = network.forward(x)
    for row in range(16):
        assert torch.equal(network.forward(x[row : row + 1])[0], together[row])


def test_rows_apart_from_each_other() -> None:
    network, whole = make(WIDTHS[0], wide=5), torch.full((9, 20), float("nan"))
    whole[:, 2:9] = torch.randn(9, 7)
    assert network.layers[0].weight.stride() == (12, 1)
    for x in (whole[:, 2:9], whole[:, 2:9].T.contiguous().T):
        assert torch.equal(network.forward(x), by_layers(network, x.contiguous()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_arrays_of_any_shape_and_numbers(dtype: type) -> None:
    network, x = make(WIDTHS[0]), np.random.default_rng(0).normal(size=(2, 3, 14)).astype(dtype)
    for array in (x[..., ::2], x[..., :7], x[0, 0, 7:]):
        rows = torch.from_numpy(np.ascontiguousarray(array)).reshape(-1, 7).float()
        found = network.forward_array(array)
        assert found.dtype == np.float32 and found.shape == (*array.shape[:-1], 3)
        assert torch.equal(torch.from_numpy(found).view(-1, 3), network.forward(rows))
    assert network.forward_array(x[:0, :, :7]).shape == (0, 3, 3)


def test_threads_do_not_change_a_bit() -> None:
    network, x, before = make((39, 1792, 1792, 768, 400, 200, 6)), torch.randn(3, 39), torch.get_num_threads()
    try:
        results = [(torch.set_num_threads(threads), network.forward(x))[1] for threads in (1, 2, 5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found, results[0]) for found in results[1:])


def test_weights_are_read_where_they_lie_and_copies_read_their_own() -> None:
    network, x = make(WIDTHS[0]), torch.randn(4, 7)
    before, others = network.forward(x), [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    network.layers[0].weight.mul_(2)
    after = network.forward(x)
    assert torch.equal(after, by_layers(network, x)) and not torch.equal(after, before)
    assert all(torch.equal(other.forward(x), before) for other in others)


def test_what_does_not_fit_is_named() -> None:
    network = make(WIDTHS[0])
    with pytest.raises(ValueError, match=r"x must be float32 \[R, 7\] on the cpu, got torch.float32 \(2, 8\)"):
        network.forward(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"x must be float32 \[R, 7\] on the cpu, got torch.float64"):
        network.forward(torch.zeros(2, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="arrays must have rows of 7, got shape"):
        network.forward_array(np.zeros((2, 8)))
    first, second, *_ = network.layers
    for layers, message in (
        ([], "a network needs at least one layer, got none"),
        ([first, first], r"weight of layer 1 must have shape \(24, 24\), got \(24, 7\)"),
        ([first._replace(bias=second.bias)], r"bias of layer 0 must have shape \(24,\), got \(17,\)"),
        ([first._replace(gain=None)], r"gain of layer 0 must have shape \(24,\), got none"),
        (
            [first._replace(shift=first.shift.double())],
            "shift of layer 0 must be float32 on the cpu with rows in sequence",
        ),
        (
            [first._replace(weight=first.weight.T.contiguous().T)],
            "weight of layer 0 must be float32 on the cpu with rows",
        ),
        ([second._replace(kernel="layernorm_simnorm")], "simnorm needs a multiple of 8 columns, got 17 in layer 0"),
        ([first._replace(kernel="softmax")], "unknown row kernel 'softmax'"),
    ):
        with pytest.raises(ValueError, match=message):
            RowNetwork(layers)


def test_a_missing_native_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make(WIDTHS[0]).layers
    monkeypatch.setattr(backend, "native", None)
    monkeypatch.setattr(backend, "native_reason", "no compiler")
    with pytest.raises(RuntimeError, match="needs the native module: no compiler"):
        RowNetwork(layers)
