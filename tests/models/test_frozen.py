"""Frozen networks: forward and input gradient against autograd, with and without packed weights, and in bfloat16."""

from __future__ import annotations

import pytest
import torch
from small import ACTION_DIM, relative, world_model

from pwm_fast import backend
from pwm_fast.kernels.gemm import gemm_for
from pwm_fast.models import matmul
from pwm_fast.models.frozen import FrozenNetwork


@pytest.mark.parametrize("network", ["dynamics", "reward"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 3e-5)], ids=["f64", "f32-packed"])
def test_forward_and_input_gradient(network: str, dtype: torch.dtype, tolerance: float) -> None:
    """float32 on the CPU runs on packed weights where the machine has them; the definition is float64."""
    exact, tasks = world_model(), torch.tensor([0, 2])
    z = torch.rand(2, 6, 16, dtype=torch.float64, requires_grad=True)
    a = torch.rand(2, 6, ACTION_DIM, dtype=torch.float64, requires_grad=True)
    function = exact.next if network == "dynamics" else exact.reward_logits
    expected = function(z, a, tasks[:, None])
    dy = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (expected * dy).sum().backward()

    frozen = world_model(dtype=dtype).frozen(tasks)
    layers = frozen.dynamics if network == "dynamics" else frozen.reward
    net = FrozenNetwork(layers, packed=True)
    y, saved = net.forward(torch.cat([z, a], -1).detach().to(dtype))
    assert relative(y.double(), expected.detach()) < tolerance
    dx = net.input_gradient(dy.to(dtype), saved)
    assert relative(dx.double(), torch.cat([z.grad, a.grad], -1)) < tolerance


@pytest.mark.parametrize("name", ["native", "torch"])
def test_bf16_rounds_and_stays_near(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native products round their factors and all else stays float32; with torch the whole network is bfloat16."""
    if name == "native" and backend.native is None:
        pytest.skip(f"no native module: {backend.native_reason}")
    monkeypatch.setenv(backend.VARIABLE, name)
    generator, tasks = torch.Generator().manual_seed(0), torch.tensor([0, 2])
    x, dy = (torch.randn(2, 6, width, generator=generator) for width in (16 + ACTION_DIM, 16))
    layers = world_model(dtype=torch.float32).frozen(tasks).dynamics
    exact, net = FrozenNetwork(world_model().frozen(tasks).dynamics), FrozenNetwork(layers, 8, True, torch.bfloat16)
    expected, kept = exact.forward(x.double())
    y, saved = net.forward(x)
    for found, true in (
        (y, expected),
        (net.input_gradient(dy, saved), exact.input_gradient(dy.double(), kept)),
    ):
        assert found.dtype is torch.float32 and 1e-4 < relative(found.double(), true) < 2e-2
    assert saved[0].pre.dtype is (torch.bfloat16 if gemm_for(None, x) is None else torch.float32)

    net.load(world_model(1, torch.float32).frozen(tasks).dynamics)
    fresh = FrozenNetwork(world_model(1, torch.float32).frozen(tasks).dynamics, 8, True, torch.bfloat16)
    assert torch.equal(net.forward(x)[0], fresh.forward(x)[0])


def test_fast_matmul_puts_the_switch_back_and_stays_float32() -> None:
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    a, b = torch.randn(64, 96), torch.randn(96, 32)
    with matmul.fast_matmul(torch.float32, torch.device("cpu")):
        product = a @ b
    assert settings.fp32_precision == before
    assert relative(product.double(), a.double() @ b.double()) < 1e-5
