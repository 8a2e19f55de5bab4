"""Which implementation runs: the C++ module `pwm_fast._native`, Triton kernels, or plain torch and numpy.

Left alone, float32 on the CPU goes native and CUDA tensors go to Triton; torch takes the rest, and all where the other
two are missing. `PWM_FAST_BACKEND=native|triton|torch` forces one; a forced backend that cannot run raises with the
reason.
"""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

BACKENDS = ("native", "triton", "torch")
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


def triton_reason() -> str | None:
    """Why Triton kernels cannot run at all, or None. Asked late: the answer imports torch."""
    return import_module("pwm_fast.kernels.triton_support").unavailable


def resolve(name: str | None = None, device: str = "cpu") -> str:
    """The backend for `device` ("cpu", "cuda"): `name` if given, else $PWM_FAST_BACKEND, else the fastest that runs.

    Raises ValueError for an unknown name, RuntimeError when "native" is asked for and `pwm_fast._native` is missing,
    or "triton" and Triton is. Whether a forced backend takes the tensors at hand shows at the call.
    """
    asked_by = "backend" if name else VARIABLE
    name = name or os.environ.get(VARIABLE) or None
    if name is None:
        if device.startswith("cuda"):
            return "torch" if triton_reason() else "triton"
        return "native" if native is not None else "torch"
    if name not in BACKENDS:
        raise ValueError(f"{asked_by} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "native" and native is None:
        raise RuntimeError(
            f"{asked_by}='native', but the native module cannot be used: {native_reason}. "
            "Install a C++17 compiler and reinstall pwm_fast, or choose 'torch'."
        )
    if name == "triton" and (reason := triton_reason()):
        raise RuntimeError(f"{asked_by}='triton', but {reason}. Install it (pip install triton), or choose 'torch'.")
    return name


def cpu_precisions() -> tuple[str, ...]:
    """What `--precision` may be on this CPU besides what a GPU is needed for: "tf32" is AMX's."""
    return ("fp32", "tf32", "bf16") if native is not None and native.isa() == "amx" else ("fp32", "bf16")


def describe(device: str = "cpu") -> str:
    """One line for the start of a command: which backend runs on `device` ("cpu", "cuda:1") and why."""
    chosen = resolve(device=device)
    if chosen == "native":
        on_gpu = device.startswith("cuda")
        if on_gpu:
            return "backend: torch (native kernels are for the CPU)"
        assert native is not None
        return f"backend: native (C++, {native.isa()})"
    if chosen == "triton":
        return f"backend: triton {import_module('triton').__version__}"
    if os.environ.get(VARIABLE):
        return f"backend: torch (forced by {VARIABLE})"
    if device.startswith("cuda"):
        return f"backend: torch ({triton_reason()})"
    return f"backend: torch (native module missing: {native_reason})"
