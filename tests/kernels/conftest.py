"""Every instruction set that this machine can run, one after the other; `closeness.py` is shared by the tests here."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pwm_fast import backend

sys.path.insert(0, str(Path(__file__).parent))

ISAS = backend.native.available_isas() if backend.native is not None else []
MISSING = pytest.param("", marks=pytest.mark.skip(reason=f"no native module: {backend.native_reason}"))


@pytest.fixture(params=ISAS or [MISSING])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one instruction set of the native kernels for the length of a test."""
    assert backend.native is not None
    before = backend.native.isa()
    backend.native.set_isa(request.param)
    yield request.param
    backend.native.set_isa(before)
