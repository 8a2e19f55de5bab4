"""Which implementation runs: the C++ module `pwm_fast._native`, or plain torch and numpy. Decided here, once.

`PWM_FAST_BACKEND=native|torch` forces one; a forced backend that cannot run raises with the reason.
"""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

BACKENDS = ("native", "torch")
VARIABLE = "PWM_FAST_BACKEND"


def _load_native() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("pwm_fast._native"), None
    except ImportError as error:
        build_log = Path(__file__).with_name("_native_unavailable.txt")
        if build_log.exists():
            return None, f"it was not built: {build_log.read_text(encoding='utf-8').strip()}"
        return None, f"it cannot be imported: {error}"


native, native_reason = _load_native()


def resolve(name: str | None = None) -> str:
    """The backend to use, "native" or "torch": `name` if given, else $PWM_FAST_BACKEND, else the fastest that runs.

    Raises ValueError for an unknown name, RuntimeError when "native" is asked for and `pwm_fast._native` is missing.
    """
    asked_by = "backend" if name else VARIABLE
    name = name or os.environ.get(VARIABLE) or None
    if name is None:
        return "native" if native is not None else "torch"
    if name not in BACKENDS:
        raise ValueError(f"{asked_by} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "native" and native is None:
        raise RuntimeError(
            f"{asked_by}='native', but the native module cannot be used: {native_reason}. "
            "Install a C++17 compiler and reinstall pwm_fast, or choose 'torch'."
        )
    return name


def describe() -> str:
    """One line for the start of a command: which backend runs and why."""
    chosen = resolve()
    if chosen == "native":
        return "backend: native (C++)"
    if native is None:
        return f"backend: torch (native module missing: {native_reason})"
    return f"backend: torch (forced by {VARIABLE})"
