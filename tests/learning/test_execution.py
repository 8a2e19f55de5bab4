"""Switches of execution: what each rung adds, what is refused, and that forcing kernels ends with the step."""

from __future__ import annotations

import os
from dataclasses import asdict
from itertools import pairwise

import pytest

from pwm_fast import backend
from pwm_fast.learning.execution import LADDER, ExecutionConfig


def test_each_rung_of_the_ladder_adds_one_ingredient() -> None:
    rungs = [asdict(how) for how in LADDER.values()]
    for below, above in pairwise(rungs):
        changed = {name for name in below if below[name] != above[name]}
        assert len(changed) == 1 and above[changed.pop()] is True
    assert set(rungs[-1].values()) == {True, "fp32"}


@pytest.mark.parametrize("before", [None, "torch"])
def test_plain_kernels_are_forced_inside_only(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv(backend.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(backend.VARIABLE, before)
    with pytest.raises(ZeroDivisionError), ExecutionConfig(fused_kernels=False, overlap=False).kernels():
        assert backend.resolve() == "torch"
        raise ZeroDivisionError
    assert os.environ.get(backend.VARIABLE) == before


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, got 'fp8'"):
        ExecutionConfig(precision="fp8")
    with pytest.raises(ValueError, match="fused_kernels must be on with persistent"):
        ExecutionConfig(persistent=True, fused_kernels=False)
    with pytest.raises(RuntimeError, match=r"naive\.py"):
        ExecutionConfig(frozen_batched=False).check()
