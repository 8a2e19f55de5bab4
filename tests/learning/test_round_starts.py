"""Rounds with a frozen model take start states that workers gather ahead; nothing else about them changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from live_threads import threads_alive

from pwm_fast import backend as backends
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError, WindowSampler
from pwm_fast.data.task_table import fitted
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import ExtractionConfig
from pwm_fast.learning.finetuning import ExtractionRounds, RoundConfig
from pwm_fast.learning.job import Budget, make_job
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

SMALL = ExtractionConfig(horizon=4, batch_size=8, actor_units=(16,), critic_units=(16,), critic_epochs=1)
ROUND = RoundConfig(cycles=2, extraction_steps=3, model_steps=0)
TASKS, SEEDS = ["hopper", "ant", "hopper"], [0, 1, 2]
SIZES = {"hopper": (11, 3), "ant": (37, 8)}
EXECUTIONS = [None, ExecutionConfig(overlap=False), ExecutionConfig()]

needs_workers = pytest.mark.skipif(
    backends.native is None or not os.path.isdir("/proc/self/task"), reason="needs native workers, counted in /proc"
)


@pytest.fixture
def stores(tmp_path: Path) -> list[EpisodeStore]:
    """Each task's random episodes in a store of its own, of its own sizes."""
    out, random = [], np.random.default_rng(0)
    for task, (obs_dim, action_dim) in SIZES.items():
        with EpisodeWriter(tmp_path / task, obs_dim, action_dim, task_names=[task]) as writer:
            for _ in range(4):
                obs, action = random.normal(size=(31, obs_dim)), random.uniform(-1, 1, (30, action_dim))
                writer.add(obs, action, action.sum(1), False)
        out.append(EpisodeStore.open(tmp_path / task))
    return out


@pytest.fixture
def make(stores: list[EpisodeStore], monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExtractionRounds]:
    """A function that makes the same rounds anew; static memory is filled from the host."""
    monkeypatch.setattr("pwm_fast.learning.finetuning.TABLE_BYTES", 1)

    def rounds(execution: ExecutionConfig | None = None) -> ExtractionRounds:
        torch.manual_seed(0)
        config = WorldModelConfig(
            37, 8, latent_dim=16, mlp_dim=32, encoder_dim=32, encoder_layers=2, num_tasks=2, task_dim=4
        )
        model = WorldModel(config, provenance={"tasks": {"ant": 1, "hopper": 0}})
        budget = Budget(steps=100)
        return make_job(TASKS, model, stores, SEEDS, budget, SMALL, ROUND, start="scratch", execution=execution).rounds

    return rounds


def drawn(stores: list[EpisodeStore], step: int) -> np.ndarray:
    """Start states [P, B, S] of a step, by a sampler for each policy."""
    of = dict(zip(SIZES, stores))
    each = [WindowSampler(of[t], 1, seed=s).start_states(step, SMALL.batch_size) for t, s in zip(TASKS, SEEDS)]
    return np.stack([fitted(obs, 37) for obs in each])


def actors(rounds: ExtractionRounds) -> torch.Tensor:
    return rounds.extraction.actor.parameters.flat


@pytest.mark.parametrize("execution", EXECUTIONS, ids=["plain", "staged", "overlapped"])
def test_steps_begin_where_the_samplers_say(stores, make, execution) -> None:
    """A round's steps are those of an extraction that is handed each sampler's states."""
    rounds, by_hand = make(execution), make()
    rounds.learn()
    for step in range(6):
        by_hand.extraction.step(drawn(stores, step))
    assert torch.equal(actors(rounds), actors(by_hand))


@pytest.mark.parametrize("execution", EXECUTIONS[:2], ids=["plain", "staged"])
def test_a_resumed_round_goes_on_exactly(make, execution) -> None:
    whole, first, second = make(execution), make(execution), make(execution)
    whole.learn(5)
    first.learn(2)
    second.load_state_dict(first.state_dict())
    second.learn(3)
    assert torch.equal(actors(second), actors(whole))


def test_policies_beside_a_diverged_one_go_on_unchanged(make) -> None:
    """It keeps its row, so nobody moves."""
    whole, broken = make(), make()
    broken.extraction.diverged[0] = True
    before = actors(broken)[0].clone()
    whole.learn()
    broken.learn()
    assert torch.equal(actors(broken)[0], before)
    assert torch.equal(actors(broken)[1:], actors(whole)[1:])


@needs_workers
@pytest.mark.parametrize("ending", ["end", "stop", "error", "interrupt", "bad data"])
@pytest.mark.parametrize("execution", EXECUTIONS[:2], ids=["plain", "staged"])
def test_workers_end_with_the_round(stores, make, monkeypatch, execution, ending) -> None:
    rounds = make(execution)
    rounds.learn()  # whatever else has threads has started them
    before, seen = threads_alive(), []
    step = rounds.extraction.update_actor

    def watched(rollout):
        seen.append(threads_alive())
        if len(seen) == 2 and ending in ("error", "interrupt"):
            raise KeyError if ending == "error" else KeyboardInterrupt
        return step(rollout)

    monkeypatch.setattr(rounds.extraction, "update_actor", watched)
    if ending in ("end", "stop"):
        rounds.learn(stop=lambda: ending == "stop")
    elif ending == "bad data":
        values = np.memmap(stores[1].path / "obs.f32", "<f4", "r+", shape=stores[1].obs.shape)
        values[:] = np.nan
        with pytest.raises(StoreError, match="ant holds NaN or infinity"):
            rounds.learn()
    else:
        with pytest.raises(KeyError if ending == "error" else KeyboardInterrupt):
            rounds.learn()
    assert threads_alive() == before
    assert all(count == before + 1 for count in seen) and (seen or ending == "bad data")
