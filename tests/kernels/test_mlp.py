"""All layers in one native call against the definition in float64, with every instruction set of this machine."""

import copy

import pytest
import torch
from closeness import relative_error

from pwm_fast import backend
from pwm_fast.kernels.mlp import NativeMLP
from pwm_fast.models.population_mlp import PopulationMLP

pytestmark = pytest.mark.usefixtures("isa")


def random_networks(members: int, widths: tuple[int, ...], dtype: torch.dtype) -> PopulationMLP:
    """The same numbers for every dtype; gains near 1, so that nothing is badly conditioned."""
    networks = PopulationMLP(members, widths, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, view in networks.parameters.views.items():
        start = torch.randn(view.shape, generator=generator) / view.shape[-1] ** 0.5
        view.copy_(start + 1 if name.endswith("ln.weight") else start)
    return networks


@pytest.mark.parametrize("widths", [(5, 9, 7, 2), (33, 40, 1), (70, 101, 50, 30, 3)], ids=str)
@pytest.mark.parametrize(("members", "shared", "rows"), [(1, 1, 1), (3, 1, 67), (6, 2, 13)])
def test_forward_and_gradients(widths: tuple[int, ...], members: int, shared: int, rows: int) -> None:
    x, dy = torch.randn(shared, rows, widths[0]), torch.randn(members, rows, widths[-1])
    exact, fast = (random_networks(members, widths, dtype) for dtype in (torch.float64, torch.float32))
    expected, kept = exact.forward(x.double())
    exact.backward(dy.double(), kept)
    wide = torch.full((shared, rows, widths[0] + 3), float("nan"))  # rows that do not follow one another
    wide[:, :, : widths[0]] = x
    for inputs in (x, wide[:, :, : widths[0]]):
        fast.parameters.grad.fill_(float("nan"))
        y, kept = fast.forward(inputs)
        fast.backward(dy, kept)
        assert relative_error(y, expected) < 3e-6
        for name, gradient in fast.parameters.grads.items():
            assert relative_error(gradient, exact.parameters.grads[name]) < 2e-5, name


@pytest.mark.parametrize("members", [2, 12], ids=["rows-split", "networks-split"])
def test_threads_do_not_change_a_bit(members: int) -> None:
    x, dy, before = torch.randn(2, 256, 130), torch.randn(members, 256, 1), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            networks = random_networks(members, (130, 200, 100, 1), torch.float32)
            y, kept = networks.forward(x)
            networks.backward(dy, kept)
            results.append((y, networks.parameters.grad))
    finally:
        torch.set_num_threads(before)
    for y, gradient in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(gradient, results[0][1])


def test_a_network_does_not_depend_on_its_neighbours() -> None:
    many = random_networks(3, (20, 30, 10, 2), torch.float32)
    alone = PopulationMLP(1, (20, 30, 10, 2))
    alone.parameters.flat.copy_(many.parameters.flat[1:2])
    x, dy = torch.randn(3, 40, 20), torch.randn(3, 40, 2)
    y, kept = many.forward(x)
    many.backward(dy, kept)
    single, kept = alone.forward(x[1:2])
    alone.backward(dy[1:2], kept)
    assert torch.equal(single[0], y[1]) and torch.equal(alone.parameters.grad[0], many.parameters.grad[1])


def test_copies_work_on() -> None:
    networks = random_networks(1, (5, 9, 2), torch.float32)
    x = torch.randn(1, 4, 5)
    expected, _ = networks.forward(x)
    assert torch.equal(copy.deepcopy(networks).forward(x)[0], expected)


def test_wrong_inputs_are_named_by_the_layers() -> None:
    networks = random_networks(3, (5, 9, 2), torch.float32)
    with pytest.raises(ValueError, match=r"x must be .*got \(2, 4, 5\)"):
        networks.forward(torch.randn(2, 4, 5))
    with pytest.raises(ValueError, match=r"x must be .*got \(3, 4, 6\)"):
        networks.forward(torch.randn(3, 4, 6))


def test_missing_places_are_refused() -> None:
    assert backend.native is not None
    kernel = NativeMLP((5, 9, 2), {}, 1, 100, 1e-5)
    with pytest.raises(ValueError, match="one place per kept array"):
        kernel.forward(torch.zeros(1, 100), torch.zeros(1, 4, 5), [], torch.zeros(1, 4, 2))
