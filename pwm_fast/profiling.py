"""NVTX ranges: named spans in Nsight's timeline (docs/profiling.md). Without a GPU they do nothing.

    with span("imagination"): ...

    @span("critic update")
    def update(...): ...

PWM_FAST_NVTX=1 turns them on without a GPU (with the `nvtx` package), 0 off with one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
VARIABLE = "PWM_FAST_NVTX"
DOMAIN = "pwm_fast"


class _TorchRanges:
    """torch's ranges under the nvtx package's names; they have no domains."""

    def __init__(self) -> None:
        self._ranges = import_module("torch").cuda.nvtx

    def push_range(self, name: str, domain: str) -> None:
        self._ranges.range_push(f"{domain}: {name}")

    def pop_range(self, domain: str) -> None:
        self._ranges.range_pop()


@functools.cache
def _nvtx() -> ModuleType | _TorchRanges | None:
    """The nvtx package, or torch's ranges, where they are of use, else None; decided once, at the first range."""
    wanted = os.environ.get(VARIABLE)
    if wanted == "0":
        return None
    on_gpu = import_module("torch").cuda.is_available()
    try:
        return import_module("nvtx") if wanted or on_gpu else None
    except ImportError:
        return _TorchRanges() if on_gpu else None


def enabled() -> bool:
    """Whether ranges are recorded."""
    return _nvtx() is not None


class span:
    """A named range, as a context manager or a decorator; it may be nested and reused."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> span:
        nvtx = _nvtx()
        if nvtx is not None:
            nvtx.push_range(self.name, domain=DOMAIN)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        nvtx = _nvtx()
        if nvtx is not None:
            nvtx.pop_range(domain=DOMAIN)

    def __call__(self, function: Function) -> Function:
        @functools.wraps(function)
        def ranged(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return ranged  # type: ignore[return-value]
