"""How far a result is from its definition: a ratio of root mean squares, no absolute tolerance."""

import pytest
import torch
from torch import Tensor

from pwm_fast.kernels.triton_support import unavailable

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter (tests/conftest.py)
needs_triton = pytest.mark.skipif(unavailable is not None, reason=str(unavailable))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """RMS of the difference over RMS of `exact`, in float64 (the plain RMS where `exact` is zero)."""
    assert value.shape == exact.shape
    difference, size = (value.double() - exact.double()).norm(), exact.double().norm()
    return float(difference / size if size > 0 else difference)
