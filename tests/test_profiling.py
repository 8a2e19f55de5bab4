"""Ranges reach nvtx where it is wanted, and cost nothing where it is not."""

import sys
from types import SimpleNamespace

import pytest

from pwm_fast import profiling


@pytest.fixture
def calls(monkeypatch):
    """What a stand-in for the nvtx package is told."""
    seen = []
    fake = SimpleNamespace(
        push_range=lambda name, domain: seen.append(("push", name, domain)),
        pop_range=lambda domain: seen.append(("pop", domain)),
    )
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    profiling._nvtx.cache_clear()
    yield seen
    profiling._nvtx.cache_clear()


def test_ranges_nest_and_close_on_errors(calls, monkeypatch):
    monkeypatch.setenv("PWM_FAST_NVTX", "1")

    @profiling.span("inner")
    def fail(x: int) -> int:
        """Doc."""
        raise ValueError(x)

    assert profiling.enabled() and fail.__doc__ == "Doc."
    with pytest.raises(ValueError), profiling.span("outer"):
        fail(3)
    names = [("push", "outer"), ("push", "inner"), ("pop", "pwm_fast"), ("pop", "pwm_fast")]
    assert [call[:2] for call in calls] == names


def test_ranges_do_nothing_when_switched_off(calls, monkeypatch):
    monkeypatch.setenv("PWM_FAST_NVTX", "0")
    with profiling.span("x"):
        assert profiling.span("y")(lambda a: a + 1)(1) == 2
    assert not profiling.enabled() and calls == []


def test_ranges_do_nothing_without_the_package(calls, monkeypatch):
    monkeypatch.delenv("PWM_FAST_NVTX", raising=False)
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with profiling.span("x"):
        pass
    assert not profiling.enabled()
