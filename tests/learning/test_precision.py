"""Low precision is admitted by the actor gradient's cosine with float64, and refused where that is low."""

from __future__ import annotations

import pytest
import torch
from small import OBS_DIM, SMALL, world_model

from pwm_fast import backend
from pwm_fast.kernels.gemm import gemm_for
from pwm_fast.learning.captured import StepGraph
from pwm_fast.learning.configuration import PRESETS, ExtractionConfig
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.precision import LEAST_COSINE, PrecisionError, check_precision, gradient_cosines
from pwm_fast.learning.step_inputs import StartTable
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

CONFIG = ExtractionConfig(**{**SMALL, "horizon": 16})


def starts(policies: int = 2, batch: int = 32) -> torch.Tensor:
    return torch.randn(policies, batch, OBS_DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("latent", ["simnorm", "observation"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_gradients_of_ordinary_models_pass(latent: str, precision: str) -> None:
    model = world_model(dtype=torch.float32, latent=latent, tasks=0, termination_dim=11)
    if latent == "observation":
        model._dynamics[-1].weight.data.mul_(0.1)  # a step changes a state by little, as in the simulated tasks
    cosines = gradient_cosines(model, CONFIG, starts(), precision)
    assert cosines.shape == (2,) and (cosines > LEAST_COSINE[precision]).all()
    if precision == "bf16":  # it did round
        assert (cosines < 1 - 1e-8).all()


def test_a_model_that_amplifies_rounding_is_refused() -> None:
    model = world_model(dtype=torch.float32, latent="observation", tasks=0)
    model._dynamics[-1].weight.data.mul_(100.0)
    model._dynamics[0].ln.weight.data.mul_(100.0)
    model._dynamics[0].weight.data.mul_(100.0)
    assert check_precision(model, CONFIG, starts(), "fp32") > LEAST_COSINE["fp32"]
    with pytest.raises(PrecisionError, match=r"bf16: the actor gradient's cosine with float64 is .* use a higher"):
        check_precision(model, CONFIG, starts(), "bf16")


@pytest.mark.parametrize("size", ["1M", pytest.param("5M", marks=pytest.mark.slow)])
def test_the_published_sizes_pass_in_bf16(size: str) -> None:
    """Sizes and horizon of MT80, random weights; 1 - cosine is 7e-6 (1M) and 7e-5 (5M) on native products."""
    torch.manual_seed(0)
    model = WorldModel(WorldModelConfig.of_size(size, 39, 6, num_tasks=80, task_dim=96))
    torch.nn.init.normal_(model._reward[-1].weight, std=0.1)  # it starts at zero, and with it all gradients
    obs = torch.randn(1, 64, 39, generator=torch.Generator().manual_seed(1))
    assert check_precision(model, PRESETS["published-code"], obs, "bf16", torch.tensor([3])) < 1 - 1e-7


@pytest.mark.parametrize("name", ["native", "torch"])
def test_what_stays_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native products round while they read; torch's networks are kept in bfloat16."""
    if name == "native" and backend.native is None:
        pytest.skip(f"no native module: {backend.native_reason}")
    monkeypatch.setenv(backend.VARIABLE, name)
    model = world_model(dtype=torch.float32, tasks=0)
    networks = torch.bfloat16 if gemm_for(None, model.obs_mean) is None else torch.float32
    ext = Extraction(model, CONFIG, seeds=[0, 1], precision="bf16")
    rollout = ext.imagination.rollout(ext.actor, starts(batch=6), ext.action_noise(ext.iteration))
    assert {s.weight.dtype for s in ext.imagination.dynamics.layers} == {networks}
    assert rollout.reward_layers[0].pre.dtype is networks
    kept = (rollout.latents, rollout.reward, ext.actor.parameters.flat, ext.critic.parameters.flat, ext.actor_adam.m)
    assert {x.dtype for x in kept} == {torch.float32}
    assert {s.weight.dtype for s in ext.policies()[0]._encoder_layers} == {torch.float32}


def test_steps_in_bf16_over_static_memory_are_the_extractions_own() -> None:
    model = world_model(dtype=torch.float32, tasks=0)
    ext, plain = (Extraction(model, CONFIG, seeds=[0, 1], precision="bf16") for _ in range(2))
    rows = torch.randn(40, OBS_DIM, generator=torch.Generator().manual_seed(1))
    table = StartTable(plain, rows)
    StepGraph(ext, StartTable(ext, rows), ExecutionConfig(precision="bf16")).run(3)
    for _ in range(3):
        plain.step(table.states(plain.iteration))
    assert torch.equal(ext.actor.parameters.flat, plain.actor.parameters.flat)
    with pytest.raises(ValueError, match="made with precision bf16, the execution asks for fp32"):
        StepGraph(ext, table, ExecutionConfig())
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, got 'fp16'"):
        Extraction(model, CONFIG, precision="fp16")
