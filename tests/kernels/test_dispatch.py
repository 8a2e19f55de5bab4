"""Which backend runs, and that the native one survives forks, threads and odd requests."""

import os
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pwm_fast import backend
from pwm_fast.kernels import layernorm_mish, triton_support
from pwm_fast.kernels.dispatch import backend_for, native_for

ROWS = (torch.randn(1, 400, 512), torch.ones(1, 512), torch.zeros(1, 512))


def test_forced_torch_never_calls_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert native_for(None, *ROWS) is None


def test_forced_native_without_the_module_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "native", None)
    monkeypatch.setattr(backend, "native_reason", "it was not built: no compiler")
    with pytest.raises(RuntimeError, match="no compiler"):
        layernorm_mish.forward(*ROWS, backend="native")
    layernorm_mish.forward(*ROWS)


def test_native_refuses_what_it_cannot_take(isa: str) -> None:
    wide = [t.double() for t in ROWS]
    assert native_for(None, *wide) is None
    with pytest.raises(TypeError, match=r"float32 on cpu, got torch.float64"):
        layernorm_mish.forward(*wide, backend="native")


def test_triton_is_for_cuda_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(triton_support, "unavailable", None)
    monkeypatch.setattr(triton_support, "interpreting", False)
    with FakeTensorMode():
        on_cuda = torch.empty(2, device="cuda")
        assert backend_for(None, on_cuda) == backend_for("triton", on_cuda) == "triton"
        assert backend_for(None, on_cuda.double()) == "torch"
        assert backend_for("torch", on_cuda) == "torch"
        with pytest.raises(TypeError, match=r"take float32 and bfloat16, got torch.float64; choose backend 'torch'"):
            backend_for("triton", on_cuda.double())
        monkeypatch.setenv(backend.VARIABLE, "triton")
        assert backend_for(None, on_cuda.double()) == "torch"
    with pytest.raises(TypeError, match=r"need CUDA tensors \(or TRITON_INTERPRET=1\), got one on cpu"):
        backend_for(None, *ROWS)


def test_unknown_instruction_set_is_named(isa: str) -> None:
    assert backend.native is not None
    with pytest.raises(ValueError, match=r"'avx1024' cannot run here; available: .*portable"):
        backend.native.set_isa("avx1024")
    assert backend.native.isa() == isa


def test_python_threads_may_share_the_kernels(isa: str) -> None:
    expected, _, _ = layernorm_mish.forward(*ROWS, backend="native")
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    wrong = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(layernorm_mish.forward(*ROWS, backend="native")[0], expected):
                wrong.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(torch_threads)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_its_own_threads(isa: str) -> None:
    assert backend.native is not None
    x, w, b = ROWS
    y, mean, rstd = (torch.empty_like(x), torch.empty(1, 400), torch.empty(1, 400))
    # Straight to the kernel: torch itself is not to be used in a forked child.
    arguments = [t.data_ptr() for t in (x, w, b, y, mean, rstd)] + [1, 400, 512, 1e-5, 3]
    backend.native.layernorm_mish_forward(*arguments)
    child = os.fork()
    if child == 0:
        for _ in range(20):
            backend.native.layernorm_mish_forward(*arguments)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
