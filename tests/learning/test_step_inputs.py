"""A table of start states on the device draws what the samplers of its policies' tasks draw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small import ACTION_DIM, OBS_DIM, extraction, world_model

from pwm_fast.data.drawing import choose
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, WindowSampler
from pwm_fast.data.start_states import StartStates
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.step_inputs import StagedStates, StartTable, start_rows


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    """Episodes of tasks a, c, b, a, b, ...; none of d."""
    random = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "store", OBS_DIM, ACTION_DIM, task_names=["a", "b", "c", "d"]) as writer:
        for length, task in ((5, 0), (2, 2), (9, 1), (1, 0), (4, 1), (3, 2)):
            obs = random.normal(size=(length + 1, OBS_DIM))
            writer.add(obs, np.zeros((length, ACTION_DIM)), np.zeros(length), terminated=False, task=task)
    return EpisodeStore.open(tmp_path / "store")


def three() -> Extraction:
    return extraction(world_model(dtype=torch.float32), policies=3)


def tables(store: EpisodeStore, *tasks: str) -> dict[str, np.ndarray]:
    return {task: start_rows(store, choose(store, tasks=task).ids) for task in tasks}


def test_every_policy_draws_what_its_tasks_sampler_draws(store: EpisodeStore) -> None:
    ext = three()
    ext.tasks = ["b", "a", "b"]
    table = StartTable.of_tasks(ext, tables(store, "a", "b"))
    assert len(table.obs) == 5 + 1 + 9 + 4  # those of c are not copied, those of b once
    samplers = [WindowSampler(store, 1, seed=s, tasks=t) for s, t in zip(ext.seeds, ext.tasks)]
    for step in (0, 7, 2**33 + 1):
        expected = np.stack([s.start_states(step, ext.config.batch_size) for s in samplers])
        np.testing.assert_array_equal(table.states(torch.tensor(step)).numpy(), expected)


def test_a_task_without_start_observations_is_named(store: EpisodeStore) -> None:
    ext = three()
    ext.tasks = ["b", "e", "b"]
    with pytest.raises(ValueError, match="no start observations of e"):
        StartTable.of_tasks(ext, tables(store, "a", "b"))


def test_a_staged_batch_is_copied_and_released(store: EpisodeStore) -> None:
    ext = three()
    samplers = [WindowSampler(store, 1, seed=seed) for seed in ext.seeds]
    staged = StagedStates(ext)
    with StartStates(samplers, ext.config.batch_size, OBS_DIM, prefetch=1) as starts:
        for step in range(5):  # more than the ring has slots
            staged.stage(starts.at(step))
            expected = np.stack([s.start_states(step, ext.config.batch_size) for s in samplers])
            np.testing.assert_array_equal(staged.states(torch.tensor(step)).numpy(), expected)


def test_a_batch_of_another_shape_is_refused_and_released(store: EpisodeStore) -> None:
    ext = three()
    with StartStates([WindowSampler(store, 1)], ext.config.batch_size, OBS_DIM, prefetch=1) as starts:
        for step in range(5):
            with pytest.raises(ValueError, match="start observations"):
                StagedStates(ext).stage(starts.at(step))
