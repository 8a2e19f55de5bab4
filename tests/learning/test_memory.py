"""The memory model against the tensors that an extraction and its graph really keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import OBS_DIM, extraction, relative, world_model

from pwm_fast.learning.captured import StepGraph
from pwm_fast.learning.configuration import ExtractionConfig
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.memory import PopulationMemory, population_memory, split
from pwm_fast.learning.population import Population, of_policies
from pwm_fast.learning.step_inputs import StartTable
from pwm_fast.models.world_model import WorldModelConfig

ROWS, RING = 40, 10


def kept_bytes(*roots: Any) -> int:
    """Of all storages that can be reached from some objects of this package."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    todo = list(roots)
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, (list, tuple)):
            todo += x
        elif type(x).__module__.startswith("pwm_fast") and hasattr(x, "__dict__"):
            todo += vars(x).values()
    return sum(storages.values())


@pytest.mark.parametrize("overlap", [False, True], ids=["serial", "overlap"])
@pytest.mark.parametrize("latent", ["simnorm", "observation"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 70, "horizon": 8}, {"batch_size": 64, "shuffle": False}], ids=lambda o: str(len(o))
)
def test_the_model_counts_what_is_kept(options: dict, latent: str, overlap: bool, monkeypatch: Any) -> None:
    monkeypatch.setenv("PWM_FAST_BACKEND", "torch")  # packed weights are the CPU kernels' own
    taken = []
    for policies in (1, 3):
        model = world_model(dtype=torch.float32, termination_dim=11, latent=latent, tasks=0)
        ext = extraction(model, policies, terminations=True, **options)
        execution = ExecutionConfig(overlap=overlap)
        graph = StepGraph(ext, StartTable(ext, torch.randn(ROWS, OBS_DIM)), execution, ring=RING)
        graph.run(2)
        taken.append(kept_bytes(graph))
    kept = (taken[1] - taken[0]) / 2
    expected = population_memory(model.config, ext.config, start_states=ROWS, overlap=overlap, ring=RING, on_cpu=True)
    assert expected.kept == pytest.approx(kept, rel=1e-3)
    assert expected.shared == pytest.approx(taken[0] - kept, rel=0.05)


def test_how_many_policies_fit() -> None:
    memory = PopulationMemory(shared=1000, kept=80, passing=20)
    assert memory.fits(2000) == 8 and memory.total(8) == 1800 and memory.fits(500) == 0
    assert memory.describe(2000) == "memory: 1 kB shared, 100 B per policy; 8 policies fit into 2 kB"


def test_eighty_tasks_at_48M_fit_into_a_gpu() -> None:
    """The size that the paper's multi-task setting needs, on 140 GB."""
    world = WorldModelConfig.of_size("48M", 39, 6, num_tasks=80, task_dim=96)
    memory = population_memory(world, ExtractionConfig(), start_states=10**6, overlap=True, ring=256)
    assert memory.fits(140 * 10**9) > 80 and memory.shared > 4 * 35e6


def test_waves_are_even_and_complete() -> None:
    assert [list(w) for w in split(7, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [len(w) for w in split(80, 80)] == [80]
    with pytest.raises(ValueError, match="not even one policy fits"):
        split(3, 0)


@pytest.mark.parametrize("latent", ["simnorm", "observation"])
def test_waves_give_the_policies_of_one_batch(latent: str) -> None:
    model = world_model(latent=latent)
    obs = torch.randn(ROWS, OBS_DIM, generator=torch.Generator().manual_seed(0))
    options = {"seeds": [4, 5, 6], "steps": 4, "config": extraction(model).config, "task_ids": [0, 1, 2]}
    together, waves = (Population(model, obs, **options, fits=n).run() for n in (3, 2))
    for one, other in zip(together, waves, strict=True):
        assert one.policy.description == other.policy.description and one.steps == other.steps == 4
        for name, value in one.policy.tensors().items():
            assert relative(other.policy.tensors()[name], value) < 1e-12, name


def test_a_diverged_policy_leaves_and_the_others_are_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwm_fast.learning.population.RING", 2)
    model = world_model()
    obs = torch.randn(ROWS, OBS_DIM, generator=torch.Generator().manual_seed(0))
    settings = extraction(model).config
    ranges = {"first": [0, 0, 0], "count": [ROWS] * 3}
    population = Population(model, obs, [4, 5, 6], 6, settings, task_ids=[0, 1, 2], **ranges)
    start, at_work = population._start, []

    def with_a_sick_one(members: list[int]) -> Any:
        ext, graph = start(members)
        if 1 in members:
            ext.critic.parameters["2.bias"][settings.num_critics * members.index(1)] = 1e200
        return ext, graph

    monkeypatch.setattr(population, "_start", with_a_sick_one)
    results = population.run(lambda members, done, metrics: at_work.append(members))
    assert [r.diverged for r in results] == [False, True, False]
    assert [r.steps for r in results] == [6, 2, 6]
    assert at_work == [[0, 1, 2], [0, 2], [0, 2]]
    healthy = Population(model, obs, [4, 6], 6, settings, task_ids=[0, 2]).run()
    for one, other in zip((results[0], results[2]), healthy, strict=True):
        for name, value in other.policy.tensors().items():
            assert relative(one.policy.tensors()[name], value) < 1e-12, name


def test_a_part_of_a_state_is_the_state_of_those_policies() -> None:
    model = world_model()
    whole, part = extraction(model, 3), extraction(model, seeds=[12, 10], task_ids=[2, 0])
    whole.return_statistics.mean.copy_(torch.arange(3.0))
    part.load_state_dict(of_policies(whole.state_dict(), [2, 0]))
    assert part.return_statistics.mean.tolist() == [2.0, 0.0]
    assert torch.equal(part.critic.parameters.flat[:3], whole.critic.parameters.flat[6:])
