"""Flat rows and their named views."""

from __future__ import annotations

import pytest
import torch

from pwm_fast.models.parameters import ALIGNMENT, FlatParameters


def test_views_alias_the_rows_and_do_not_overlap() -> None:
    parameters = FlatParameters(3, {"a": (2, 5), "b": (7,), "c": ()})
    for i, name in enumerate(parameters.views):
        parameters[name].fill_(i + 1.0)
        parameters.grads[name].fill_(-i - 1.0)
    counts = [(parameters.flat == i + 1.0).sum().item() for i in range(3)]
    assert counts == [30, 21, 3]
    assert torch.equal(parameters.flat, -parameters.grad)
    assert parameters.size % ALIGNMENT == 0
    assert parameters["b"].data_ptr() % (4 * ALIGNMENT) == 0


def test_tensors_and_load_are_inverse() -> None:
    parameters = FlatParameters(2, {"a": (2, 3), "b": (4,)})
    parameters.flat.normal_()
    other = FlatParameters(2, parameters.shapes)
    other.load(1, parameters.tensors(0))
    assert torch.equal(other["a"][1], parameters["a"][0]) and torch.equal(other["b"][1], parameters["b"][0])
    assert not other["a"][0].any()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("a"), "missing parameters: a"),
        (lambda t: t.update(z=torch.zeros(1)), "unknown parameters: z"),
        (lambda t: t.update(a=torch.zeros(3, 2)), r"a must have shape \(2, 3\), got \(3, 2\)"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_wrong_tensors_are_refused(change, message: str) -> None:
    parameters = FlatParameters(1, {"a": (2, 3), "b": (4,)})
    tensors = parameters.tensors(0)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        parameters.load(0, tensors)


def test_an_empty_population_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 member, got 0"):
        FlatParameters(0, {"a": (1,)})
