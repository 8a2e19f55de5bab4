"""The registered operators: their declarations are true, and steps can be traced with CUDA tensors on any machine."""

import pytest
import torch
from closeness import TRITON_DEVICE, needs_triton
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode

from pwm_fast import backend
from pwm_fast.kernels import clip_adam, layernorm_mish, layernorm_simnorm, mish_layernorm, td_lambda, two_hot

pytestmark = needs_triton
GRID = (-1.0, 1.0)


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).to(TRITON_DEVICE)


def row_arguments(shifted: bool, *options: float) -> tuple[object, ...]:
    """dy and x, their statistics, weights (and biases if `shifted`), then what is written: dx, dw, db."""
    rows = [draw(2, 3, 8) for _ in range(2)]
    weights = [draw(2, 8) for _ in range(2 if shifted else 1)]
    return *rows, draw(2, 3), draw(2, 3), *weights, draw(2, 3, 8), draw(2, 8), draw(2, 8), *options


def forward_arguments(*options: float) -> tuple[object, ...]:
    return draw(2, 3, 8), draw(2, 8), draw(2, 8), draw(2, 3, 8), draw(2, 3), draw(2, 3), *options


def adam_arguments() -> tuple[object, ...]:
    steps, active = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    tensors = (*(draw(2, 9) for _ in range(4)), draw(2), steps.to(TRITON_DEVICE), active.to(TRITON_DEVICE), draw(2))
    return *tensors, 1.0, 0.7, 0.95, 1e-8


CALLS = {
    "layernorm_mish_forward": lambda: forward_arguments(1e-5),
    "layernorm_mish_backward": lambda: row_arguments(True),
    "mish_layernorm_forward": lambda: forward_arguments(1e-5),
    "mish_layernorm_backward": lambda: row_arguments(False),
    "layernorm_simnorm_forward": lambda: forward_arguments(8, 1e-5),
    "layernorm_simnorm_backward": lambda: row_arguments(True, 8),
    "two_hot_expectation_forward": lambda: (draw(3, 11), draw(3), *GRID, True),
    "two_hot_expectation_backward": lambda: (draw(3), draw(3, 11), draw(3, 11), *GRID, True),
    "two_hot_cross_entropy_forward": lambda: (draw(3, 11), draw(3), draw(3), *GRID),
    "two_hot_cross_entropy_backward": lambda: (draw(3), draw(3, 11), draw(3), draw(3, 11), *GRID),
    "two_hot_encode": lambda: (draw(3), draw(3, 11), *GRID),
    "td_lambda_returns": lambda: (draw(4, 5), draw(4, 5), draw(4, 5), draw(4, 5), 0.9, 0.95),
    "clip_adam_step": adam_arguments,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_declaration_is_true(name: str) -> None:
    library.opcheck(getattr(torch.ops.pwm_fast, name).default, CALLS[name]())


def test_gradients_may_be_left_out() -> None:
    *inputs, _, _ = row_arguments(True)
    library.opcheck(layernorm_mish.layernorm_mish_backward, (*inputs, None, None))


def test_every_op_can_be_traced_with_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and devices come out as on a GPU, and nothing looks at a value. (The explicit functions: torch's autograd
    asks a CUDA device for its stream, and ends the process where there is none.)"""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    seen = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Names():
        x, w = torch.empty(2, 3, 16, device="cuda"), torch.empty(2, 16, device="cuda")
        for kernel in (layernorm_mish, mish_layernorm):
            y, mean, rstd = kernel.forward(x, w, w)
            dx, dw, _ = kernel.backward(y, x, mean, rstd, w, w, out=y)
            assert (dx is y, dw.shape, dw.device.type) == (True, w.shape, "cuda")
        y, mean, rstd = layernorm_simnorm.forward(x, w, w)
        layernorm_simnorm.backward(y, y, x, mean, rstd, w, w, False)
        value = two_hot.expectation_forward(x, *GRID, log_scale=True)
        assert value.shape == (2, 3)
        two_hot.expectation_backward(value, x, *GRID)
        loss = two_hot.cross_entropy_forward(x, value, *GRID)
        two_hot.cross_entropy_backward(loss, x, value, *GRID)
        two_hot.encode_forward(value, 5, *GRID)
        td_lambda.returns(value, value, None, 0.9, 0.95)
        lr, steps = torch.empty(2, device="cuda"), torch.empty(2, dtype=torch.int64, device="cuda")
        norm = clip_adam.step(w, w, w, w, lr, steps, 1.0)
        assert (norm.shape, norm.device.type) == ((2,), "cuda")
    called = {name.split(".")[1] for name in seen if name.startswith("pwm_fast.")}
    assert called == set(CALLS)
