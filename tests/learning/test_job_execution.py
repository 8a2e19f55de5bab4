"""A whole job over static memory is the job that runs operation by operation, whatever its steps learn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.extract import Execution, Options, execution_of
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import ExtractionConfig
from pwm_fast.learning.finetuning import RoundConfig
from pwm_fast.learning.job import Budget, Job, make_job
from pwm_fast.learning.precision import PrecisionError
from pwm_fast.learning.step_inputs import StagedStates, StagedTrajectories, StartTable
from pwm_fast.models.world_model import WorldModel

SMALL = ExtractionConfig(horizon=4, batch_size=8, actor_units=(16,), critic_units=(16,), critic_epochs=1)
PRACTICE = RoundConfig(
    cycles=2, extraction_steps=2, model_steps=1, model_batch_size=8, practice_steps=6, practice_envs=8,
    warm_up_steps=12, capacity=160, evaluation_episodes=2,
)  # fmt: skip
ROUNDS = {
    "grounded": (PRACTICE, StagedTrajectories),
    "imagined": (replace(PRACTICE, grounded=False), StagedStates),
    "frozen": (RoundConfig(cycles=2, extraction_steps=2, model_steps=0, evaluation_episodes=2), StartTable),
}


def make(model: Path, store: Path, rounds: RoundConfig, execution: ExecutionConfig | None, **more: Any) -> Job:
    return make_job(
        "hopper", WorldModel.load(model), EpisodeStore.open(store), (0, 1), Budget(steps=6), SMALL, rounds,
        start="scratch", execution=execution, **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", ROUNDS)
def test_the_same_policies(name: str, tiny_world_model: Path, tiny_store: Path) -> None:
    rounds, inputs = ROUNDS[name]
    plain, static = (make(tiny_world_model, tiny_store, rounds, e) for e in (None, ExecutionConfig()))
    rows: list[list[dict]] = [[], []]
    plain.run(rows[0].append)
    static.run(rows[1].append)
    assert isinstance(static.rounds._graph.inputs, inputs)
    for a, b in zip(plain.rounds.extraction.policies(), static.rounds.extraction.policies(), strict=True):
        for key, value in a.tensors().items():
            assert torch.equal(b.tensors()[key], value), key
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == [4, 6]
    for a, b in zip(*rows):
        assert b["imagined_return"] == pytest.approx(a["imagined_return"], rel=1e-5)


def test_a_start_table_too_large_for_the_device_stays_on_the_host(
    tiny_world_model: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pwm_fast.learning.finetuning.TABLE_BYTES", 1)
    job = make(tiny_world_model, tiny_store, ROUNDS["frozen"][0], ExecutionConfig())
    whole = make(tiny_world_model, tiny_store, ROUNDS["frozen"][0], None)
    job.run()
    whole.run()
    assert isinstance(job.rounds._graph.inputs, StagedStates)
    assert torch.equal(job.rounds.extraction.actor.parameters.flat, whole.rounds.extraction.actor.parameters.flat)


def test_a_precision_must_pass_its_check(
    tiny_world_model: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, rounds = ExecutionConfig(precision="bf16"), ROUNDS["frozen"][0]
    assert make(tiny_world_model, tiny_store, rounds, low).rounds.extraction.precision == "bf16"
    plain = make(tiny_world_model, tiny_store, rounds, None, precision="bf16").rounds
    assert plain.extraction.precision == "bf16" and plain.execution is None
    monkeypatch.setitem(__import__("pwm_fast.learning.precision").learning.precision.LEAST_COSINE, "bf16", 1.0)
    with pytest.raises(PrecisionError, match="use a higher precision"):
        make(tiny_world_model, tiny_store, rounds, low)


def test_the_commands_switches() -> None:
    assert execution_of(Options(task=["hopper"])) is None
    switched = Options(task=["hopper"], device="cuda", precision="bf16", execution=Execution(overlap=False))
    assert execution_of(switched) == ExecutionConfig(overlap=False, precision="bf16")
