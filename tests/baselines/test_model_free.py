"""SAC: what is recorded is what the environment gave, and a resumed run is the uninterrupted one."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed: pip install 'pwm_fast[baselines]'")

from pwm_fast.baselines.model_free import SACConfig, SACTraining
from pwm_fast.baselines.sac_collection import CHECKPOINT, FOLDER, collect_sac
from pwm_fast.data.collect import derived_seed
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.envs import registry
from pwm_fast.errors import Interrupted

SMALL = SACConfig(units=(8,), batch_size=8, random_steps=300, update_every=4)
PENDULUM = registry.get("gym:Pendulum-v1")


def collect(path: Path, steps: int, tasks=(PENDULUM,), **options) -> EpisodeStore:
    collect_sac(path, list(tasks), steps=steps, seed=5, config=SMALL, **options)
    return EpisodeStore.open(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Five uninterrupted episodes: two random ones, three of training."""
    return collect(tmp_path_factory.mktemp("sac") / "whole", 1000)


def same(one: EpisodeStore, other: EpisodeStore) -> None:
    for name in ("obs", "action", "reward", "terminated", "task"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("mixture", "order"):
        assert one.meta["collect"][name] == other.meta["collect"][name]


def test_the_record_is_what_the_environment_gave(whole: EpisodeStore):
    """Every episode, played again by its actions from its seed, bit for bit."""
    env = PENDULUM.make()
    for number in range(whole.num_episodes):
        episode = whole.episode(number)
        obs, _ = env.reset(seed=derived_seed(derived_seed(5, 0), number))
        np.testing.assert_array_equal(episode["obs"][0], obs)
        for t, action in enumerate(episode["action"]):
            obs, reward, *_ = env.step(action)
            np.testing.assert_array_equal(episode["obs"][t + 1], obs)
            assert episode["reward"][t] == np.float32(reward)


def test_the_record_is_the_replay_that_sac_learns_from():
    training = SACTraining(PENDULUM, SMALL, seed=1, buffer_size=1000)
    episodes = [training.episode() for _ in range(3)]
    buffer, filled = training.model.replay_buffer, slice(0, 600)
    assert buffer.size() == 600 == training.steps
    for name, column in (("actions", "action"), ("rewards", "reward")):
        recorded = np.concatenate([getattr(episode, column) for episode in episodes])
        np.testing.assert_array_equal(getattr(buffer, name)[filled, 0].reshape(recorded.shape), recorded)
    np.testing.assert_array_equal(buffer.observations[filled, 0], np.concatenate([e.obs[:-1] for e in episodes]))
    np.testing.assert_array_equal(buffer.next_observations[filled, 0], np.concatenate([e.obs[1:] for e in episodes]))
    assert buffer.timeouts[199, 0] and buffer.dones[199, 0], "a time limit is no end of the task"
    again = SACTraining(PENDULUM, SMALL, seed=1, buffer_size=1000)
    again.load_state_dict(training.state_dict(), episodes)
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(again.model.replay_buffer, name), getattr(buffer, name))


def test_phases_tell_random_from_learned(whole: EpisodeStore):
    notes = whole.meta["collect"]
    assert notes["order"][0] == ["random actions", 2] and sum(count for _, count in notes["order"]) == 5
    assert all(phase.startswith("training ") for phase, _ in notes["order"][1:])
    assert notes["policy"] == "sac" and notes["sac"]["units"] == [8] and notes["sac"]["update_every"] == 4
    assert (whole.path / FOLDER / "gym:Pendulum-v1.zip").is_file()


def test_a_killed_run_goes_on_exactly(tmp_path: Path, whole: EpisodeStore, monkeypatch: pytest.MonkeyPatch):
    """Killed in the fourth episode, after a checkpoint at the end of each; the store is one episode ahead of it."""
    original, calls = SACTraining.episode, []

    def dying(self):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(SACTraining, "episode", dying)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path / "store", 1000, checkpoint_seconds=0.0)
    assert EpisodeStore.open(tmp_path / "store").num_episodes == 3
    same(collect(tmp_path / "store", 1000, resume=True), whole)


def test_ctrl_c_saves_to_the_end_of_the_episode(tmp_path: Path, whole: EpisodeStore, monkeypatch: pytest.MonkeyPatch):
    original = SACTraining.episode

    def interrupted(self):
        if self.steps == 400:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(SACTraining, "episode", interrupted)
        with pytest.raises(Interrupted, match="stopped after 600 steps of gym:Pendulum-v1"):
            collect(tmp_path / "store", 1000)
    same(collect(tmp_path / "store", 1000, resume=True), whole)


def test_several_tasks_train_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped in the second task; the first is not touched again."""
    tasks = (PENDULUM, registry.get("gym:MountainCarContinuous-v0"))
    uninterrupted = collect(tmp_path / "whole", 400, tasks)
    assert uninterrupted.task_names == ["gym:Pendulum-v1", "gym:MountainCarContinuous-v0"]
    assert (uninterrupted.obs_dim, uninterrupted.action_dim) == (3, 1)
    original = SACTraining.episode

    def dying(self):
        if self.task is tasks[1]:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(SACTraining, "episode", dying)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path / "parts", 400, tasks)
    same(collect(tmp_path / "parts", 400, tasks, resume=True), uninterrupted)


@pytest.mark.parametrize("last", [0, 1])
def test_other_policies_episodes_and_sac_share_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call, last: int
):
    """Random episodes of one task, then SAC on another: killed before (0) or after SAC's first episode is saved."""
    arguments = ["--task", "hopper", "gym:Pendulum-v1", "--policy", "random", "sac", "--episodes", 4, "--num-envs", 4]
    arguments += ["--steps", 400, "--sac.units", 8, "--sac.batch-size", 8, "--sac.random-steps", 300, "--threads", 1]
    arguments += ["--checkpoint-minutes", 1e-9]
    assert call("collect", *arguments, "--out", tmp_path / "whole") == 0
    uninterrupted = EpisodeStore.open(tmp_path / "whole")
    assert [phase for phase, _ in uninterrupted.meta["collect"]["order"]][:2] == [
        "hopper: random actions", "gym:Pendulum-v1: random actions"
    ]  # fmt: skip
    assert (uninterrupted.num_episodes, uninterrupted.obs_dim, uninterrupted.action_dim) == (6, 11, 3)
    assert uninterrupted.episode_task.tolist() == [0, 0, 0, 0, 1, 1]
    original, calls = SACTraining.episode, []

    def dying(self):
        calls.append(None)
        if len(calls) > last:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(SACTraining, "episode", dying)
        assert call("collect", *arguments, "--out", tmp_path / "parts") == 130
    assert EpisodeStore.open(tmp_path / "parts").num_episodes == 4 + last
    assert call("collect", *arguments, "--out", tmp_path / "parts", "--resume") == 0
    same(EpisodeStore.open(tmp_path / "parts"), uninterrupted)


def test_a_larger_budget_goes_on(tmp_path: Path, whole: EpisodeStore):
    collect(tmp_path / "store", 500)
    longer = collect(tmp_path / "store", 1000, resume=True)
    for name in ("obs", "action", "reward"):
        np.testing.assert_array_equal(getattr(longer, name), getattr(whole, name))


def test_training_ends_where_the_store_is_full(tmp_path: Path):
    store = collect(tmp_path / "store", 10_000, max_transitions=650)
    assert store.num_transitions == 600, "another episode might not fit"
    with pytest.raises(ValueError, match="room for an episode of 200 steps of each task, got 150 for 1 tasks"):
        collect(tmp_path / "other", 10_000, max_transitions=150)
    assert not (tmp_path / "other").exists()


def test_refusals_name_the_mend(tmp_path: Path, whole: EpisodeStore):
    with pytest.raises(ValueError, match=r"hopper is differentiable.*--policy shac"):
        collect(tmp_path / "store", 100, [registry.get("hopper")])
    with pytest.raises(ValueError, match="give --steps or --minutes"):
        collect_sac(tmp_path / "store", [PENDULUM])
    with pytest.raises(FileNotFoundError, match="leave out --resume"):
        collect(tmp_path / "store", 100, resume=True)
    with pytest.raises(FileExistsError, match="--resume"):
        collect(whole.path, 100)
    with pytest.raises(ValueError, match="begun with seed 5, got 6"):
        collect_sac(whole.path, [PENDULUM], steps=2000, seed=6, config=SMALL, resume=True)
    assert (whole.path / FOLDER / CHECKPOINT).is_file() and not (tmp_path / "store").exists()
    for options, text in (({"batch_size": 0}, "batch_size must be > 0"), ({"units": ()}, "units must be >= 1")):
        with pytest.raises(ValueError, match=text):
            SACConfig(**options)
