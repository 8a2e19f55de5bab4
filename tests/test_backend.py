"""The backend is chosen once, can be forced, and says why when it cannot."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pwm_fast import backend


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(backend, "native", None)
    monkeypatch.setattr(backend, "native_reason", "it was not built: no compiler")


def test_the_native_module_is_the_first_choice(monkeypatch):
    monkeypatch.setattr(backend, "native", SimpleNamespace(isa=lambda: "avx2"))
    assert backend.resolve() == "native"
    assert backend.describe() == "backend: native (C++, avx2)"


def test_tf32_is_for_processors_with_amx(monkeypatch, without_native):
    assert backend.cpu_precisions() == ("fp32", "bf16")
    monkeypatch.setattr(backend, "native", SimpleNamespace(isa=lambda: "avx512"))
    assert backend.cpu_precisions() == ("fp32", "bf16")
    monkeypatch.setattr(backend, "native", SimpleNamespace(isa=lambda: "amx"))
    assert backend.cpu_precisions() == ("fp32", "tf32", "bf16")


def test_without_it_torch_runs_and_the_reason_is_told(without_native):
    assert backend.resolve() == "torch"
    assert backend.describe() == "backend: torch (native module missing: it was not built: no compiler)"


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_forcing_native_without_it_raises(without_native, monkeypatch, by):
    if by == "variable":
        monkeypatch.setenv(backend.VARIABLE, "native")
    with pytest.raises(RuntimeError, match="it was not built: no compiler"):
        backend.resolve("native" if by == "argument" else None)


def test_an_argument_goes_before_the_variable(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "fortran")
    assert backend.resolve("torch") == "torch"
    with pytest.raises(ValueError, match="PWM_FAST_BACKEND must be one of native, triton, torch, got 'fortran'"):
        backend.resolve()
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert backend.resolve() == "torch"
    assert "torch" in backend.describe()


def test_cuda_goes_to_triton_where_it_can_run(monkeypatch):
    monkeypatch.setattr(backend, "triton_reason", lambda: None)
    assert backend.resolve(device="cuda:1") == "triton"
    monkeypatch.setattr(backend, "triton_reason", lambda: "triton cannot be imported: no module")
    assert backend.resolve(device="cuda") == "torch"
    assert backend.describe("cuda") == "backend: torch (triton cannot be imported: no module)"


def test_forcing_triton_without_it_raises(monkeypatch):
    monkeypatch.setattr(backend, "triton_reason", lambda: "triton cannot be imported: no module")
    with pytest.raises(RuntimeError, match=r"backend='triton', but triton cannot be imported.*pip install triton"):
        backend.resolve("triton")
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="PWM_FAST_BACKEND='triton', but triton cannot be imported"):
        backend.describe()


def test_native_is_for_the_cpu(monkeypatch):
    monkeypatch.setattr(backend, "native", object())
    monkeypatch.setenv(backend.VARIABLE, "native")
    assert backend.describe("cuda") == "backend: torch (native kernels are for the CPU)"


def test_the_package_imports_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from pwm_fast import backend\n"
        "from pwm_fast.kernels import clip_adam, layernorm_mish, layernorm_simnorm, td_lambda, two_hot\n"
        "import torch\n"
        "x, w = torch.randn(1, 3, 8), torch.ones(1, 8)\n"
        "print(layernorm_mish.forward(x, w, w)[0].shape, backend.resolve(device='cuda'))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert output.stdout.split("\n")[0] == "torch.Size([1, 3, 8]) torch"


def test_importing_the_package_does_not_wait_for_torch():
    program = "import sys, pwm_fast, pwm_fast.backend; print('torch' in sys.modules, 'WorldModel' in dir(pwm_fast))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert output.stdout.split() == ["False", "True"]


def test_an_unknown_name_is_an_attribute_error():
    import pwm_fast

    with pytest.raises(AttributeError, match="no attribute 'WorldModle'"):
        _ = pwm_fast.WorldModle
