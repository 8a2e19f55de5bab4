"""Waves of jobs on the real hopper, and populations over the tasks of one world model."""

import numpy as np
import pytest
import torch

from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, WindowSampler
from pwm_fast.envs import registry
from pwm_fast.learning.extraction import ExtractionConfig
from pwm_fast.learning.finetuning import RoundConfig
from pwm_fast.learning.job import Budget, make_job
from pwm_fast.learning.members import Member, find_source, known_tasks, task_number
from pwm_fast.learning.waves import Waves, extract_policies
from pwm_fast.models.world_model import WorldModel, WorldModelConfig
from pwm_fast.state_files import load_state, save_state

SMALL = ExtractionConfig(horizon=4, batch_size=8, actor_units=(16,), critic_units=(16,), critic_epochs=1)
FROZEN = RoundConfig(cycles=1, extraction_steps=3, model_steps=0, evaluation_episodes=2, critic_episodes=2)
MEMBERS = [Member("hopper", seed) for seed in (0, 1, 2)]
TASKS, SIZES = ["hopper", "ant"], {"hopper": (11, 3), "ant": (37, 8)}


@pytest.fixture
def waves(tiny_world_model, tiny_store):
    """A function that makes the same waves anew."""
    model, data = WorldModel.load(tiny_world_model), EpisodeStore.open(tiny_store)

    def make(fits: int | None, steps: int = 6) -> Waves:
        def job(members, budget):
            tasks, seeds = zip(*members)
            return make_job(tasks, model, data, seeds, budget, SMALL, FROZEN, start="scratch")

        return Waves(job, MEMBERS, Budget(steps=steps), fits)

    return make


def tensors(waves: Waves) -> list[dict[str, torch.Tensor]]:
    return [result.policy.tensors() for result in waves.finished()]


def assert_close(some, others):
    for one, other in zip(some, others, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_waves_find_what_all_at_once_find(waves):
    rows = []
    split, whole = waves(2), waves(None)
    assert [len(wave) for wave in split.waves] == [1, 2] and len(whole.waves) == 1
    assert split.run(rows.append) and whole.run()
    last = [[p.tensors() for p in w.job.rounds.extraction.policies()] for w in (split, whole)]
    assert_close(last[0], last[1][1:])  # what is kept as the best may differ: looks depend on who is looked at beside
    assert len(split.finished()) == len(whole.finished()) == 3
    members = [member for row in rows for member in row["members"]]
    assert members == [MEMBERS[0]] * 2 + MEMBERS[1:] * 2
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert split.steps_done == 12 and split.total_steps == 12


def test_a_run_killed_in_its_second_wave_goes_on_from_there(waves, tmp_path):
    whole, first = waves(1), waves(1)
    whole.run()
    states = []
    first.run(lambda row: states.append(first.state_dict()) or save_state(tmp_path / f"{len(states)}", states[-1]))
    for number, wave in ((2, 0), (3, 1), (5, 2)):
        again = waves(1)
        again.load_state_dict(load_state(tmp_path / f"{number}"))
        assert again.wave == wave
        assert again.run()
        for one, other in zip(tensors(whole), tensors(again), strict=True):
            assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_stopping_ends_the_wave_and_those_to_come(waves):
    work = waves(1)
    assert not work.run(stop=lambda: True)
    assert work.wave == 0


def test_time_is_shared_among_the_waves_that_are_left(waves):
    work = waves(1)
    work.set_budget(Budget(seconds=90.0))
    assert work.job.budget.seconds == 30.0


def test_none_fits(waves):
    with pytest.raises(ValueError, match="not even one policy fits"):
        waves(0)


@pytest.fixture
def two_tasks(tmp_path) -> tuple[WorldModel, EpisodeStore]:
    """A random world model of the hopper and the ant, padded to the ant, and random data of both."""
    torch.manual_seed(0)
    config = WorldModelConfig(
        37, 8, latent_dim=16, mlp_dim=32, encoder_dim=32, encoder_layers=2, num_tasks=2, task_dim=4
    )
    random = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "data", 37, 8, task_names=TASKS) as writer:
        for episode in range(12):
            obs_dim, action_dim = SIZES[TASKS[episode % 2]]
            obs, action = np.zeros((31, 37)), np.zeros((30, 8))
            obs[:, :obs_dim] = random.normal(size=(31, obs_dim)).cumsum(0) / 10
            action[:, :action_dim] = random.uniform(-1, 1, (30, action_dim))
            writer.add(obs, action, action.sum(1), False, task=episode % 2)
    return WorldModel(config, provenance={"tasks": {"ant": 1, "hopper": 0}}), EpisodeStore.open(tmp_path / "data")


def test_tasks_of_one_model_are_learned_side_by_side(two_tasks):
    model, data = two_tasks
    rows = []
    found = extract_policies(
        model, data, TASKS, seeds=2, steps=3, config=SMALL, rounds=FROZEN, start="scratch", report=rows.append
    )
    assert {task: [(p.obs_dim, p.action_dim, p.task) for p in own] for task, own in found.items()} == {
        task: [(*SIZES[task], task)] * 2 for task in TASKS
    }
    assert rows[-1]["members"] == [Member(task, seed) for task in TASKS for seed in (0, 1)]
    alone = extract_policies(model, data, ["ant"], seeds=[1], steps=3, config=SMALL, rounds=FROZEN, start="scratch")
    assert_close([found["ant"][1].tensors()], [alone["ant"][0].tensors()])


def test_each_policy_starts_in_its_own_tasks_states(two_tasks):
    model, data = two_tasks
    job = make_job(TASKS, model, data, [0, 1], Budget(steps=3), SMALL, FROZEN)
    for sampler, task in zip(job.rounds._starts.samplers, TASKS):
        seen = sampler.start_states(0, 64)
        assert (seen[:, SIZES[task][0] :] == 0).all() and (seen[:, : SIZES[task][0]] != 0).all()


def test_fine_tuning_several_tasks_at_once_is_refused(two_tasks):
    model, data = two_tasks
    with pytest.raises(ValueError, match="fine-tuning learns one task at a time, got hopper, ant"):
        make_job(TASKS, model, data, [0, 1], Budget(steps=3), SMALL, RoundConfig())


def test_fine_tuning_one_of_a_models_tasks_pads_what_it_practised(two_tasks):
    model, data = two_tasks
    rounds = RoundConfig(
        cycles=2, model_steps=1, model_batch_size=8, practice_steps=6, practice_envs=8, warm_up_steps=12,
        capacity=160, evaluation_episodes=2, critic_episodes=2,
    )  # fmt: skip
    before = model._task_emb.weight.detach().clone()
    job = make_job(["hopper"], model, data, [0], Budget(steps=2), SMALL, rounds, start="scratch")
    assert job.run()
    batch = job.rounds._model_batch(0)
    assert batch.obs.shape[-1] == 37 and batch.action.shape[-1] == 8 and (batch.task == 0).all()
    after = model._task_emb.weight.detach()
    assert torch.equal(after[1], before[1])


def test_numbers_of_tasks(two_tasks):
    model, _ = two_tasks
    hopper, ant, walker = (registry.get(name) for name in ("hopper", "ant", "walker-walk"))
    assert known_tasks(model) == {"ant": 1, "hopper": 0}
    assert [task_number(model, task) for task in (ant, hopper)] == [1, 0]
    with pytest.raises(ValueError, match=r"unknown task 'walker-walk'.*was trained on 2"):
        task_number(model, walker)
    mt30 = WorldModel(WorldModelConfig(24, 6, 8, 8, 8, 2, num_tasks=30, task_dim=4))
    assert task_number(mt30, walker) == 1
    mt30.provenance["tasks"] = {"cup-spin": 2}
    with pytest.raises(ValueError, match="unknown task 'walker-walk'"):
        task_number(mt30, walker)
    with pytest.raises(ValueError, match="has 37 observations and 8 actions, task humanoid has 76 and 21"):
        task_number(model, registry.get("humanoid"))
    with pytest.raises(ValueError, match="knows 7 tasks and does not say which"):
        known_tasks(WorldModel(WorldModelConfig(24, 6, 8, 8, 8, 2, num_tasks=7, task_dim=4)))


def test_where_the_episodes_of_a_task_are(two_tasks, tiny_store):
    _, both = two_tasks
    hopper, ant, own = registry.get("hopper"), registry.get("ant"), EpisodeStore.open(tiny_store)
    assert find_source([both], ant).episodes.tolist() == [1, 3, 5, 7, 9, 11]
    assert find_source([own, both], hopper).store is own and find_source([own, both], ant).store is both
    with pytest.raises(ValueError, match="unknown task 'humanoid'"):
        find_source([both], registry.get("humanoid"))
    with pytest.raises(ValueError, match="has 11 observations and 3 actions, task ant has 37 and 8"):
        find_source([own], ant)


def test_stores_of_the_tasks_own_sizes_are_padded(two_tasks, tiny_store):
    model, both = two_tasks
    stores = [EpisodeStore.open(tiny_store), both]
    job = make_job(TASKS, model, stores, [0, 1], Budget(steps=3), SMALL, FROZEN, start="scratch")
    with job.rounds._starts.at(0) as batch:
        states = batch["obs"].numpy().copy()
    assert states.shape == (2, 8, 37) and (states[0, :, 11:] == 0).all()
    expected = WindowSampler(stores[0], 1, seed=0).start_states(0, 8)
    np.testing.assert_array_equal(states[0, :, :11], expected)
    assert job.run()
