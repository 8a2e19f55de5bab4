"""Steps over static memory are `Extraction.step`'s bit for bit, resume exactly, and ask nothing of the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_requests import NoHostRequests, fake_cuda
from small import ACTION_DIM, OBS_DIM, extraction, start_obs, world_model

from pwm_fast import backend
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, WindowSampler
from pwm_fast.kernels.triton_support import unavailable
from pwm_fast.learning.captured import StepGraph
from pwm_fast.learning.execution import LADDER, ExecutionConfig
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.step_inputs import StagedStates, StagedTrajectories, StartTable, start_rows
from pwm_fast.state_files import load_state, save_state

SERIAL, OVERLAP = ExecutionConfig(overlap=False), ExecutionConfig(overlap=True)
ORDERS = pytest.mark.parametrize("execution", [SERIAL, OVERLAP], ids=["serial", "overlap"])


def make(dtype: torch.dtype = torch.float32, **options: Any) -> Extraction:
    model = world_model(dtype=dtype, termination_dim=11, latent=options.pop("latent", "simnorm"))
    return extraction(model, policies=2, **options)


def table_rows(count: int = 40) -> torch.Tensor:
    return torch.randn(count, OBS_DIM, generator=torch.Generator().manual_seed(3))


def tensors(state: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            out |= tensors(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            out[prefix + key] = value
    return out


def assert_same(a: Extraction, b: Extraction) -> None:
    expected = tensors(b.state_dict())
    for name, value in tensors(a.state_dict()).items():
        assert torch.equal(value, expected[name]), name


def windows(ext: Extraction, step: int) -> dict[str, torch.Tensor]:
    c, g = ext.config, torch.Generator().manual_seed(step)
    rows = (c.horizon, ext.policies_count, c.batch_size)
    valid = torch.ones(rows, dtype=torch.bool)
    valid[3:, :, 1] = False
    return {
        "obs": torch.randn(c.horizon + 1, *rows[1:], OBS_DIM, generator=g),
        "action": torch.rand(*rows, ACTION_DIM, generator=g) - 0.5,
        "reward": torch.randn(rows, generator=g),
        "terminated": (torch.rand(rows, generator=g) < 0.1).float(),
        "valid": valid,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "fixed-blocks": {"shuffle": False},
    "terminations-not-detached": {"terminations": True, "detach_actor_input": False},
    "observation-latents": {"latent": "observation", "terminations": True},
    "log-std-at-its-limit": {"min_log_std": -0.9},
    "horizon-1": {"horizon": 1},
}


@ORDERS
@pytest.mark.parametrize("name", VARIANTS)
def test_staged_steps_are_the_extractions_own(name: str, execution: ExecutionConfig) -> None:
    ext, plain = make(**VARIANTS[name]), make(**VARIANTS[name])
    graph = StepGraph(ext, StagedStates(ext), execution, ring=4)
    rows = graph.run(6, lambda i: start_obs(ext, i))  # longer than the ring
    for step in range(6):
        expected = plain.step(start_obs(plain, step))
        assert list(rows) == list(expected)
        for key, value in expected.items():
            assert torch.equal(rows[key][step], value), (key, step)
    assert_same(ext, plain)


@ORDERS
def test_the_second_streams_work_and_the_critics_do_not_meet(execution: ExecutionConfig) -> None:
    """In whichever order the two halves of an overlapped step run, the numbers are the same."""
    ext, plain = make(), make()
    graph = StepGraph(ext, StartTable(ext, table_rows()), execution)
    ahead, late, wrapped = graph._imagine_ahead, [], ext.learn_critics

    def critics(rows: Any) -> dict[str, torch.Tensor]:
        metrics = wrapped(rows)
        while late:
            ahead(late.pop())
        return metrics

    ext.learn_critics = critics  # type: ignore[method-assign]
    graph.advance(2)
    graph._imagine_ahead = late.append  # type: ignore[method-assign,assignment]
    if execution.overlap:
        ahead(ext.iteration)
        for _ in range(3):
            graph._step()
    else:
        graph.advance(3)
    other = StepGraph(plain, StartTable(plain, table_rows()), SERIAL)
    other.run(5)
    assert_same(ext, plain)


@pytest.mark.parametrize(("choice", "tensors"), [("torch", 31), ("", 11)])  # step by step, and in native calls
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["paper", "terminations-not-detached", "observation-latents"])
def test_every_rollout_lies_where_the_last_one_lay(
    name: str, precision: str, choice: str, tensors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured step reads the rollout that the replay before it left."""
    monkeypatch.setenv(backend.VARIABLE, choice)
    plain = make(**VARIANTS[name])
    model = world_model(dtype=torch.float32, termination_dim=11, latent=VARIANTS[name].get("latent", "simnorm"))
    ext = Extraction(model, plain.config, plain.task_ids, plain.seeds, precision=precision)
    graph = StepGraph(ext, StartTable(ext, table_rows()), ExecutionConfig(precision=precision))
    graph.advance(1)
    before = places(graph._pending)
    graph.advance(2)
    assert len(before) >= tensors and places(graph._pending) == before


def places(x: Any) -> list[int]:
    """Addresses of all tensors in nested tuples and lists."""
    if isinstance(x, torch.Tensor):
        return [x.data_ptr()]
    return [place for part in x for place in places(part)] if isinstance(x, (list, tuple)) else []


def test_steps_along_trajectories_are_the_extractions_own() -> None:
    options = {"latent": "observation", "terminations": True}
    ext, plain = make(**options), make(**options)
    rows = StepGraph(ext, StagedTrajectories(ext)).run(3, lambda i: windows(ext, i))
    for step in range(3):
        expected = plain.step_along(**windows(plain, step))
        assert all(torch.equal(rows[key][step], value) for key, value in expected.items())
    assert_same(ext, plain)


def test_a_table_gives_the_samplers_start_states(tmp_path: Path) -> None:
    """Episodes of several lengths; the same rows as the sampler that reads the files, bit for bit."""
    random = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "store", OBS_DIM, ACTION_DIM, task_names=["point"]) as writer:
        for length in (5, 1, 17, 8):
            writer.add(
                random.normal(size=(length + 1, OBS_DIM)),
                random.uniform(-1, 1, (length, ACTION_DIM)),
                np.zeros(length),
                terminated=False,
            )
    store = EpisodeStore.open(tmp_path / "store")
    ext = make()
    table = StartTable(ext, start_rows(store))
    samplers = [WindowSampler(store, 1, seed=s) for s in ext.seeds]
    for step in (0, 7, 2**33 + 1):
        expected = np.stack([s.start_states(step, ext.config.batch_size) for s in samplers])
        assert np.array_equal(table.states(torch.tensor(step)).numpy(), expected)


def test_policies_draw_from_their_own_rows() -> None:
    ext = make()
    rows = torch.arange(40.0)[:, None].expand(-1, OBS_DIM)
    drawn = StartTable(ext, rows, first=[0, 30], count=[30, 10])
    seen = torch.cat([drawn.states(torch.tensor(s))[..., 0] for s in range(40)], 1)
    assert seen[0].unique().tolist() == list(range(30)) and seen[1].unique().tolist() == list(range(30, 40))


@ORDERS
def test_resume_through_a_file_is_bitwise_the_uninterrupted_run(execution: ExecutionConfig, tmp_path: Path) -> None:
    whole, first, second = make(), make(), make()
    StepGraph(whole, StartTable(whole, table_rows()), execution).run(7)
    StepGraph(first, StartTable(first, table_rows()), execution).run(3)
    save_state(tmp_path / "state.safetensors", first.state_dict())
    graph = StepGraph(second, StartTable(second, table_rows()), execution)
    graph.run(5)  # what it did before must leave no trace
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    graph.run(4)
    assert_same(second, whole)


@ORDERS
def test_what_changes_between_calls_is_seen(execution: ExecutionConfig) -> None:
    """World model, schedule and an actor that is put back, all in place."""
    ext, plain = make(), make()
    graph = StepGraph(ext, StagedStates(ext), execution)
    addresses = [layer.weight.data_ptr() for layer in ext.imagination.dynamics.layers]
    graph.run(2, lambda i: start_obs(ext, i))
    kept = ext.actor_adam.snapshot(0)
    graph.run(1, lambda i: start_obs(ext, 2))
    for step in range(3):
        if step == 2:
            kept_plain = plain.actor_adam.snapshot(0)
        plain.step(start_obs(plain, step))
    for one, snapshot in ((ext, kept), (plain, kept_plain)):
        one.set_world_model(world_model(1, dtype=torch.float32, termination_dim=11))
        one.set_total_steps(9)
        one.actor_adam.restore(0, snapshot)
    graph.run(2, lambda i: start_obs(ext, 3 + i))
    for step in (3, 4):
        plain.step(start_obs(plain, step))
    assert_same(ext, plain)
    assert [layer.weight.data_ptr() for layer in ext.imagination.dynamics.layers] == addresses


@ORDERS
@pytest.mark.parametrize("kernels", [None, "torch"], ids=["any-kernels", "torch-kernels"])
def test_nothing_is_asked_of_the_host(
    execution: ExecutionConfig, kernels: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels:
        monkeypatch.setenv(backend.VARIABLE, kernels)
    for ext, inputs, feed in all_inputs(execution, make):
        graph = StepGraph(ext, inputs, execution)
        graph.run(1, feed)
        fed = None if feed is None else [feed(0), feed(1)]
        with NoHostRequests():
            graph.advance(2, None if fed is None else fed.__getitem__)


def all_inputs(execution: ExecutionConfig, make: Callable[..., Extraction]) -> list[tuple[Extraction, Any, Any]]:
    """Every kind of input that goes with an execution."""
    options = {"latent": "observation", "terminations": True}
    table, staged, real = make(), make(), make(**options)
    out: list[tuple[Extraction, Any, Any]] = [
        (table, StartTable(table, table_rows()), None),
        (staged, StagedStates(staged), lambda i: start_obs(staged, i)),
    ]
    if not execution.overlap:
        out.append((real, StagedTrajectories(real), lambda i: windows(real, i)))
    return out


@pytest.mark.parametrize("name", ["_local_scalar_dense", "nonzero", "equal"])
def test_the_guard_sees_what_waits_for_the_device(name: str) -> None:
    x = torch.arange(3)
    request = {"_local_scalar_dense": lambda: x[0].item(), "nonzero": lambda: x[x > 1], "equal": lambda: x.equal(x)}
    with NoHostRequests(), pytest.raises(AssertionError, match=name):
        request[name]()


@ORDERS
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("name", ["paper", "fixed-blocks", "terminations-not-detached", "observation-latents"])
def test_the_whole_step_runs_on_a_device_that_has_no_data(
    name: str, kernels: str, execution: ExecutionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake CUDA tensors: reading one back, mixing devices and copying between them each raise."""
    if kernels == "triton" and unavailable is not None:
        pytest.skip(unavailable)
    monkeypatch.setenv(backend.VARIABLE, "torch")
    ext = make(**{"horizon": 2, "critic_epochs": 1, **VARIANTS[name]})
    with fake_cuda(ext, StartTable(ext, table_rows())) as (fake, table):
        fake._device = torch.device("cuda", 0)
        monkeypatch.setenv(backend.VARIABLE, kernels)
        graph = StepGraph(fake, table, ExecutionConfig(graph=False, overlap=execution.overlap))
        graph._cuda = False  # streams need a real device
        if graph.execution.overlap:
            graph._imagine_ahead(fake.iteration)
        graph._step()
        assert graph._rows is not None and graph._rows.device.type == "cuda"
        assert fake.actor.parameters.grad.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures and replays a CUDA graph: needs a GPU")
@ORDERS
def test_replays_on_cuda_do_not_wait_and_equal_single_steps(execution: ExecutionConfig) -> None:
    def on_cuda(**options: Any) -> Extraction:
        model = world_model(dtype=torch.float32, termination_dim=11, latent=options.pop("latent", "simnorm"))
        return extraction(model.to("cuda"), policies=2, **options)

    for ext, inputs, feed in all_inputs(execution, on_cuda):
        other = on_cuda(**({} if not isinstance(inputs, StagedTrajectories) else {"latent": "observation"}),
                        terminations=ext.config.terminations)  # fmt: skip
        graph = StepGraph(ext, inputs, execution)
        graph.run(1, feed)
        fed = None if feed is None else [{k: v.cuda() for k, v in x.items()} if isinstance(x, dict) else x.cuda()
                                         for x in (feed(1), feed(2))]  # fmt: skip
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.advance(2, None if fed is None else fed.__getitem__)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for step in range(3):
            if isinstance(inputs, StagedTrajectories):
                other.step_along(**windows(other, step))
            else:
                other.step(inputs.states(other.iteration) if feed is None else start_obs(other, step))
        assert_same(ext, other)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda e: StepGraph(e, StagedStates(e), ring=0), "ring must be >= 1, got 0"),
        (lambda e: StepGraph(e, StagedTrajectories(e), OVERLAP), "overlap needs start states"),
        (lambda e: StepGraph(e, StagedStates(e)).run(0), "steps must be >= 1, got 0"),
        (lambda e: StepGraph(e, StagedStates(e)).run(1), "staged inputs need `feed`"),
        (lambda e: StepGraph(e, StartTable(e, table_rows()), ring=2).advance(3), "steps must be 1 to 2"),
        (lambda e: StartTable(e, table_rows()[:, 1:]), r"must be \[N, 7\], got \(40, 6\)"),
        (lambda e: StartTable(e, table_rows(), first=[0, 41]), "must lie within 40 rows"),
        (lambda e: StartTable(e, table_rows().fill_(torch.nan)), "NaN or infinity in row 0"),
        (lambda e: StagedStates(e).stage(torch.zeros(1, 2, 3)), r"shape \(2, 6, 7\), got \(1, 2, 3\)"),
        (lambda e: StagedTrajectories(e).stage({}), "windows lack action"),
    ],
)
def test_impossible_requests_are_refused(build: Callable[[Extraction], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(make())


def test_what_cannot_run_is_refused_with_the_reason() -> None:
    ext = make()
    with pytest.raises(RuntimeError, match=r"naive\.py"):
        StepGraph(ext, StagedStates(ext), LADDER["eager torch"])
    with pytest.raises(RuntimeError, match="no metrics before the first step"):
        StepGraph(ext, StagedStates(ext)).metrics()
