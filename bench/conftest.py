"""What all benchmarks share."""

from collections.abc import Iterator

import pytest

from pwm_fast.data.collect import one_torch_thread


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Times of one torch thread, in CPU seconds, mean the same on every machine and under any load."""
    with one_torch_thread():
        yield
