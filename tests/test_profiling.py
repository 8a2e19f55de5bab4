"""Ranges reach nvtx where it is wanted, and cost nothing where it is not."""

import sys
from types import SimpleNamespace

import pytest
import torch

from pwm_fast import profiling
from pwm_fast.learning.captured import StepGraph
from pwm_fast.learning.configuration import ExtractionConfig
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.step_inputs import StartTable
from pwm_fast.models.world_model import WorldModel, WorldModelConfig


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


def test_ranges_do_nothing_without_the_package_and_a_gpu(calls, monkeypatch):
    monkeypatch.delenv("PWM_FAST_NVTX", raising=False)
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with profiling.span("x"):
        pass
    assert not profiling.enabled()


def test_torch_makes_the_ranges_where_the_package_is_missing(calls, monkeypatch):
    monkeypatch.delenv("PWM_FAST_NVTX", raising=False)
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ranges = SimpleNamespace(range_push=lambda name: calls.append(name), range_pop=lambda: calls.append("pop"))
    monkeypatch.setattr(torch.cuda, "nvtx", ranges)
    with profiling.span("critic"):
        pass
    assert calls == ["pwm_fast: critic", "pop"]


def test_a_gradient_step_is_divided_into_its_parts(calls, monkeypatch):
    monkeypatch.setenv("PWM_FAST_NVTX", "1")
    model = WorldModel(WorldModelConfig(4, 2, 8, 8, 8, 2))
    config = ExtractionConfig(horizon=2, batch_size=4, actor_units=(8,), critic_units=(8,), critic_epochs=1)
    extraction = Extraction(model, config)
    graph = StepGraph(extraction, StartTable(extraction, torch.randn(9, 4)), ExecutionConfig(overlap=False))
    graph.run(1)
    pushed = [call[1] for call in calls if call[0] == "push"]
    assert pushed == ["data", "rollout", "reward", "backward", "actor update", "targets", "critic"]
    assert len(calls) == 2 * len(pushed)
