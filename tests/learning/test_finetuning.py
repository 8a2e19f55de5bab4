"""Rounds of extraction, reality and model learning on the real hopper, with tiny networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.envs.evaluation import Episode
from pwm_fast.learning.extraction import Extraction, ExtractionConfig
from pwm_fast.learning.finetuning import RoundConfig
from pwm_fast.learning.job import Budget, Job, make_job
from pwm_fast.learning.reality import Look, imagined_over_real, real_episodes, returns_to_go
from pwm_fast.learning.waves import extract_policies
from pwm_fast.models.world_model import WorldModel
from pwm_fast.state_files import load_state, save_state

SMALL = ExtractionConfig(horizon=4, batch_size=8, actor_units=(16,), critic_units=(16,), critic_epochs=1)
ROUND = RoundConfig(
    cycles=3,
    model_steps=2,
    model_batch_size=8,
    practice_steps=6,
    practice_envs=8,
    warm_up_steps=12,
    capacity=160,
    evaluation_episodes=2,
    critic_episodes=2,
)
FROZEN = RoundConfig(cycles=1, extraction_steps=3, model_steps=0, evaluation_episodes=2)


@pytest.fixture
def job(tiny_world_model, tiny_store):
    """A function that makes the same job anew."""

    def make(rounds: RoundConfig = ROUND, seeds=(0, 1), steps: int = 9, start="scratch"):
        model, data = WorldModel.load(tiny_world_model), EpisodeStore.open(tiny_store)
        return make_job("hopper", model, data, seeds, Budget(steps=steps), SMALL, rounds, start=start)

    return make


def final_tensors(job: Job) -> dict[str, torch.Tensor]:
    found = {f"{i}.{k}": v for i, p in enumerate(job.rounds.extraction.policies()) for k, v in p.tensors().items()}
    return found | {f"model.{k}": v for k, v in job.rounds.world_model.state_dict().items()}


def test_a_run_ends_after_its_steps_and_reports_every_round(job):
    rows = []
    work = job(steps=8)
    assert work.run(rows.append)
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert all(np.isfinite(row["real_return"]).all() and row["real_return"].shape == (2,) for row in rows)
    assert rows[-1]["best_return"] == pytest.approx(np.max([row["real_return"] for row in rows], axis=0))


def test_cloned_policies_are_looked_at_before_the_first_step(job):
    rows = []
    work = job(steps=3, start="cloned")
    work.run(rows.append)
    assert [(row["round"], row["step"]) for row in rows] == [(0, 0), (1, 3)]
    assert (rows[1]["best_return"] >= rows[0]["real_return"]).all()


@pytest.mark.parametrize("grounded", [True, False], ids=["grounded", "imagined"])
def test_resume_through_a_file_equals_the_whole_run(job, tmp_path, grounded):
    rounds = replace(ROUND, grounded=grounded)
    whole = job(rounds)
    whole.run()
    first = job(rounds)
    states = []
    first.run(lambda row: states.append(first.state_dict()) or save_state(tmp_path / f"{len(states)}", states[-1]))
    second = job(rounds)  # as after a kill in round 3
    second.load_state_dict(load_state(tmp_path / "2"))
    assert second.steps_done == 6
    second.run()
    expected, found = final_tensors(whole), final_tensors(second)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert np.array_equal(whole.rounds.best_return, second.rounds.best_return)


def test_a_frozen_model_stays_as_it_was(job):
    frozen = job(FROZEN)
    before = {k: v.clone() for k, v in frozen.rounds.world_model.state_dict().items()}
    frozen.run()
    for name, value in frozen.rounds.world_model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_fine_tuning_moves_the_model_but_not_the_encoder(job):
    tuned = job()
    before = {k: v.clone() for k, v in tuned.rounds.world_model.state_dict().items()}
    tuned.run()
    after = tuned.rounds.world_model.state_dict()
    assert torch.equal(after["_encoder.0.weight"], before["_encoder.0.weight"])
    assert not torch.equal(after["_dynamics.0.weight"], before["_dynamics.0.weight"])
    assert tuned.rounds.experience.steps == 16 + 8 * 6


def test_a_frozen_policy_does_not_depend_on_who_shares_the_batch(job):
    together, alone = job(FROZEN, seeds=(0, 1)), job(FROZEN, seeds=(1,))
    together.run()
    alone.run()
    for (name, a), b in zip(
        together.rounds.extraction.policies()[1].tensors().items(),
        alone.rounds.extraction.policies()[0].tensors().values(),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_real_episodes_judge_mean_actions_and_explore_with_sampled_ones(tiny_policies):
    found, again, other = (
        real_episodes(["hopper"] * 2, tiny_policies, 2, 3, seed=5, draw=draw, threads=1) for draw in (0, 0, 1)
    )
    assert [(len(look.judged), len(look.explored)) for look in found] == [(2, 3)] * 2
    judged, explored = found[0].judged[0], found[0].explored[0]
    np.testing.assert_allclose(judged.action, tiny_policies[0].act(judged.obs[:-1]), atol=1e-6)
    assert np.abs(explored.action - tiny_policies[0].act(explored.obs[:-1])).max() > 0.1
    np.testing.assert_array_equal(judged.reward, again[0].judged[0].reward)
    np.testing.assert_array_equal(explored.action, again[0].explored[0].action)
    assert not np.array_equal(judged.obs[0], other[0].judged[0].obs[0])


def test_the_gauge_is_imagined_over_real_reward(tiny_world_model, tiny_policies):
    model = WorldModel.load(tiny_world_model)
    episodes = real_episodes(["hopper"], tiny_policies[:1], 2, 0, seed=5, draw=0, threads=1)[0].judged
    with torch.no_grad():
        z = model.encode(torch.as_tensor(np.stack([e.obs[0] for e in episodes])))
        imagined = 0.0
        for _ in range(min(200, max(len(e.reward) for e in episodes))):
            action = tiny_policies[0].act_latent(z)
            imagined += model.reward(z, action).mean().item()
            z = model.next(z, action)
    real = np.mean([e.reward[:200].sum() for e in episodes])
    assert imagined_over_real(model, tiny_policies[0], episodes, None) == pytest.approx(imagined / real, rel=1e-4)


def test_extract_policies_is_the_short_way(tiny_world_model, tiny_store):
    found = extract_policies(tiny_world_model, tiny_store, ["hopper"], seeds=2, steps=4, config=SMALL, rounds=ROUND)
    assert [p.task for p in found["hopper"]] == ["hopper", "hopper"]
    assert found["hopper"][0].act(np.zeros(11, np.float32)).shape == (3,)


def test_models_and_data_of_another_task_are_refused(tiny_world_model, tiny_store):
    model, data = WorldModel.load(tiny_world_model), EpisodeStore.open(tiny_store)
    with pytest.raises(ValueError, match="world model has 11 observations and 3 actions, task ant has 37 and 8"):
        make_job("ant", model, data, (0,), Budget(steps=1), SMALL, ROUND)
    with pytest.raises(ValueError, match="needs steps or minutes"):
        Budget()
    with pytest.raises(ValueError, match="extraction_steps must be >= 1, got 0"):
        RoundConfig(extraction_steps=0)


def test_returns_to_go_are_discounted_sums():
    obs, action = np.zeros((4, 11), np.float32), np.zeros((3, 3), np.float32)
    reward = np.array([1.0, 2.0, 3.0], np.float32)
    fallen = returns_to_go(Episode(obs, action, reward, True), 0.9)
    np.testing.assert_allclose(fallen, [1 + 0.9 * 2 + 0.81 * 3, 2 + 0.9 * 3, 3], rtol=1e-6)
    cut = returns_to_go(Episode(obs, action, reward, False), 0.9)
    np.testing.assert_allclose(cut - fallen, [0.9**3 * 20, 0.9**2 * 20, 0.9 * 20], rtol=1e-5)


def test_critics_start_at_the_values_they_are_given(tiny_world_model):
    torch.manual_seed(1)  # how much of an observation a random encoder's 16 numbers keep is a matter of luck
    model = WorldModel.load(tiny_world_model)
    with torch.no_grad():
        model._encoder[0].weight.normal_(0, 0.5)
        model._encoder[1].weight.normal_(0, 0.5)
    learner = Extraction(model, ExtractionConfig(actor_units=(16,), critic_units=(64, 32)), seeds=[0, 1])
    obs = [torch.randn(2000, 11), torch.randn(1500, 11)]
    value = [700 + 50 * obs[0][:, 0], -3 + obs[1][:, 1]]
    learner.fit_critics(obs, value, steps=50)
    for p in range(2):
        found = learner.critic.forward(model.encode(torch.stack([obs[p][:500]] * 2)).detach())[0][p]  # [K, R]
        error = (found - value[p][:500]).square().mean(1)
        assert (error < 0.5 * value[p].var()).all(), (p, error)


def look(real_return: float, successes=None) -> Look:
    """Of one episode of one step."""
    episode = Episode(np.zeros((2, 11), np.float32), np.zeros((1, 3), np.float32), np.array([real_return]), False)
    return Look([episode], [], successes)


def test_success_ranks_before_return():
    merits = [
        look(r, s).merit for r, s in ((900.0, np.array([0.0])), (100.0, np.array([1.0])), (200.0, np.array([1.0])))
    ]
    assert merits == sorted(merits)


@pytest.mark.parametrize("best, below, above", [(100.0, 96.0, 98.0), (-100.0, -104.0, -102.0)])
def test_a_policy_that_lost_its_way_goes_back_to_its_best(job, best, below, above):
    work = job(steps=3, seeds=(0, 1))
    work.run()
    rounds, learner = work.rounds, work.rounds.extraction
    policies = learner.policies()
    rounds.cloned, rounds._best_merit[:] = True, [-np.inf, -np.inf]
    for i in range(2):
        rounds._keep_best(i, look(best), policies[i])
    before = [p.tensors() for p in learner.policies()]
    learner.actor.parameters.flat.add_(1.0)
    rounds._keep_best(0, look(below), policies[0])  # more than 3% below: back
    rounds._keep_best(1, look(above), policies[1])  # not below: stays as it is now
    after = [p.tensors() for p in learner.policies()]
    assert all(torch.equal(after[0][k], v) for k, v in before[0].items())
    assert not torch.equal(after[1]["actor.0.weight"], before[1]["actor.0.weight"])
    assert torch.equal(learner.average[0], learner.actor.parameters.flat[0])
    assert rounds.rollbacks.tolist() == [1, 0]


def test_many_steps_look_at_reality_no_more_than_fifty_times(job):
    rows = []
    work = job(replace(FROZEN, evaluation_episodes=1), seeds=(0,), steps=310)  # rounds of 3 steps
    assert work.rounds.stretch == 2
    work.run(rows.append)
    assert [row["step"] for row in rows[:3]] == [6, 12, 18] and rows[-1]["step"] == 310


def test_rounds_become_longer_where_looks_take_the_time(job, monkeypatch):
    """On a GPU a hundred steps take less than one real episode."""
    work = job(FROZEN, seeds=(0,))
    work.budget = Budget(seconds=100.0)
    clock = iter(range(10_000))
    monkeypatch.setattr("pwm_fast.learning.job.time.monotonic", lambda: 3.0 * next(clock))
    rows = []
    monkeypatch.setattr(work.rounds, "look_at_reality", slow_look(work.rounds.look_at_reality, clock))
    work.run(rows.append)
    steps = np.diff([0, *(row["step"] for row in rows)])
    assert (steps[1:] >= steps[:-1]).all() and steps[-1] > 3


def slow_look(look, clock):
    def slow():
        for _ in range(9):
            next(clock)
        return look()

    return slow
