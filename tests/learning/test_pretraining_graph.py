"""World-model steps over static memory: the plain ones' numbers, exact resume, nothing asked of the host; bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_requests import NoHostRequests, fake_cuda, move_module
from torch.nn.functional import cosine_similarity

from pwm_fast import backend
from pwm_fast.kernels.triton_support import unavailable
from pwm_fast.learning.pretraining import Pretraining, PretrainingConfig, Windows
from pwm_fast.learning.pretraining_graph import PretrainingGraph
from pwm_fast.models.world_model import LATENTS, WorldModel, WorldModelConfig

LEAST_BF16_COSINE = 0.9999  # measured: 1 - 7e-6 and 1 - 6e-6 on the two kinds of model


def model(latent: str = "simnorm", tasks: int = 0) -> WorldModel:
    torch.manual_seed(0)
    widths = (4, 2, 16, 32, 32, 2) if latent == "simnorm" else (4, 2, 4, 32, 0, 0)
    options = {"num_tasks": tasks, "task_dim": 3} if tasks else {}
    m = WorldModel(WorldModelConfig(*widths, latent=latent, termination_dim=8, **options))
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.3)
    return m


def batch(step: int, tasks: int = 0, horizon: int = 4, rows: int = 64) -> Windows:
    g = torch.Generator().manual_seed(step)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    task = torch.randint(tasks, (rows,), generator=g) if tasks else None
    return Windows(draw(horizon + 1, rows, 4), draw(horizon, rows, 2), draw(horizon, rows),
                   (draw(horizon, rows) > 1).float(), task, torch.ones(horizon, rows))  # fmt: skip


def learner(latent: str = "simnorm", tasks: int = 0, **options) -> Pretraining:
    config = PretrainingConfig(steps=20, batch_size=64, horizon=4, **options)
    return Pretraining(model(latent, tasks), config, lambda step: batch(step, tasks))


@pytest.mark.parametrize("tasks", [0, 3])
@pytest.mark.parametrize("latent", LATENTS)
def test_steps_are_the_plain_ones(latent: str, tasks: int) -> None:
    """To the rounding of the learning rate, which is a float32 tensor on the device."""
    one, other = learner(latent, tasks), learner(latent, tasks)
    rows = PretrainingGraph(one, ring=4).run(14)
    for step in range(14):
        for name, value in other.step().items():
            assert rows[name][step].item() == pytest.approx(value, rel=2e-4), (name, step)
    for a, b in zip(one.parameters, other.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert one.step_count == other.step_count == 14


def test_resume_is_bitwise_the_uninterrupted_run() -> None:
    whole, first, second = learner(), learner(), learner()
    expected = PretrainingGraph(whole).run(9)["total"]
    PretrainingGraph(first).run(4)
    graph = PretrainingGraph(second)
    graph.run(2)  # what it did before must leave no trace
    places = [p.data_ptr() for p in second.parameters]
    moments = [adam.m.data_ptr() for adam, _ in second._adams]
    second.load_state_dict(first.state_dict())
    assert torch.equal(graph.run(5)["total"], expected[4:])
    for a, b in zip(second.parameters, whole.parameters, strict=True):
        assert torch.equal(a, b)
    assert [p.data_ptr() for p in second.parameters] == places
    assert [adam.m.data_ptr() for adam, _ in second._adams] == moments


def test_a_state_of_the_start_starts_again() -> None:
    one, fresh = learner(), learner()
    start = {**one.state_dict(), "model": {k: v.clone() for k, v in one.model.state_dict().items()}}
    graph = PretrainingGraph(one)
    graph.run(3)
    one.load_state_dict(start)
    assert torch.equal(graph.run(3)["total"], PretrainingGraph(fresh).run(3)["total"])


def test_plain_steps_may_follow() -> None:
    one, other = learner(), learner()
    PretrainingGraph(one).run(3)
    PretrainingGraph(other).run(3)
    assert one.step() == other.step()


@pytest.mark.parametrize("latent", LATENTS)
def test_nothing_is_asked_of_the_host(latent: str) -> None:
    graph = PretrainingGraph(learner(latent))
    graph.run(1)
    with NoHostRequests():
        graph.advance(2)


def test_a_broken_gradient_changes_nothing_and_is_named() -> None:
    one = learner()
    whole = one.batch

    def broken(step: int) -> Windows:
        w = whole(step)
        if step == 3:
            w.obs[0, 0, 0] = torch.nan
        return w

    one.batch = broken
    graph = PretrainingGraph(one)
    graph.run(3)
    before = [p.clone() for p in one.parameters]
    with pytest.raises(FloatingPointError, match="is nan at step 3: check the data"):
        graph.run(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, before))


@pytest.mark.parametrize("latent", LATENTS)
def test_gradients_in_bf16_point_where_float32_does(latent: str) -> None:
    gradients = []
    for precision in ("fp32", "bf16"):
        one = learner(latent, grad_clip=1e9, precision=precision)
        one.gradients(batch(0))
        assert {p.grad.dtype for p in one.parameters} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters]))
    cosine = cosine_similarity(*gradients, dim=0).item()
    assert LEAST_BF16_COSINE < cosine < 1 - 1e-7  # it did round


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="ring must be >= 1, got 0"):
        PretrainingGraph(learner(), ring=0)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        PretrainingGraph(learner()).run(0)
    with pytest.raises(ValueError, match="precision must be one of"):
        PretrainingConfig(precision="fp8")
    one = learner()
    one.batch = lambda step: batch(step, rows=64 + step)
    with pytest.raises(ValueError, match="all batches must have one shape; obs changed"):
        PretrainingGraph(one).run(2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("tasks", [0, 3])
@pytest.mark.parametrize("latent", LATENTS)
def test_the_whole_step_runs_on_a_device_that_has_no_data(
    latent: str, tasks: int, kernels: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake CUDA tensors: reading one back, mixing devices and copying between them each raise."""
    if kernels == "triton" and unavailable is not None:
        pytest.skip(unavailable)
    monkeypatch.setenv(backend.VARIABLE, "torch")
    m = model(latent, tasks)
    with fake_cuda(batch(0, tasks)) as (there,):
        one = Pretraining(move_module(m), PretrainingConfig(precision=precision), lambda step: there)
        graph = PretrainingGraph(one)
        monkeypatch.setenv(backend.VARIABLE, kernels)
        graph._windows = there
        for _ in range(2):  # the second finds the first one's memory
            graph._step()
        assert graph._rows is not None and graph._rows.device.type == "cuda"
        assert {p.grad.device.type for p in one.parameters} == {"cuda"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures and replays a CUDA graph: needs a GPU")
@pytest.mark.parametrize("tasks", [0, 3])
@pytest.mark.parametrize("latent", LATENTS)
def test_replays_on_cuda_do_not_wait_and_equal_plain_steps(latent: str, tasks: int) -> None:
    config = PretrainingConfig(steps=20, batch_size=64, horizon=4)
    one, other = (Pretraining(model(latent, tasks).cuda(), config, lambda step: batch(step, tasks)) for _ in range(2))
    graph = PretrainingGraph(one)
    graph.run(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph.advance(6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(7):
        other.step()
    for a, b in zip(one.parameters, other.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("where", ["gradients", "update"])
def test_the_trace_finds_a_request_to_the_host(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "torch")
    m = model()
    with fake_cuda(batch(0)) as (there,):
        one = Pretraining(move_module(m), PretrainingConfig(), lambda step: there)
        graph = PretrainingGraph(one)
        graph._windows = there
        whole = getattr(one, where)

        def asking(*arguments: Any) -> Any:
            out = whole(*arguments)
            one.parameters[0].grad.view(-1)[0].item()
            return out

        setattr(one, where, asking)
        with pytest.raises(AssertionError, match="_local_scalar_dense makes the host wait"):
            graph._step()
