"""How far a result is from its definition: a ratio of root mean squares, no absolute tolerance."""

from torch import Tensor


def relative_error(value: Tensor, exact: Tensor) -> float:
    """RMS of the difference over RMS of `exact`, in float64 (the plain RMS where `exact` is zero)."""
    assert value.shape == exact.shape
    difference, size = (value.double() - exact.double()).norm(), exact.double().norm()
    return float(difference / size if size > 0 else difference)
