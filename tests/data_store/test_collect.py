"""Episodes out of windows, an even choice among too many, and fixed policies recorded into a store."""

from pathlib import Path

import numpy as np
import pytest

from pwm_fast.data.collect import NoisyPolicy, RandomActions, collect_episodes, derived_seed, policy_source
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.recording import EpisodeAssembler, EvenThinning, Recording
from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import Episode

S, A = 5, 2


class Stream:
    """Windows of an environment whose episodes of known lengths count their steps: obs = [env, episode, step, 0, 0]."""

    def __init__(self, lengths: list[list[int]]):
        self.lengths = lengths
        self.at = [(0, 0)] * len(lengths)  # (episode, step) of each environment

    def window(self, horizon: int) -> tuple[np.ndarray, ...]:
        columns: list[list[list]] = []
        for _ in range(horizon):
            rows = []
            for env, (episode, step) in enumerate(self.at):
                last = step + 1 == self.lengths[env][episode]
                obs, after = [env, episode, step, 0, 0], [env, episode, step + 1, 0, 0]
                fell = last and episode % 2 == 0
                rows.append([obs, [step + 1, -0.5], step, fell, last and not fell, after])
                self.at[env] = (episode + 1, 0) if last else (episode, step + 1)
            columns.append([list(column) for column in zip(*rows)])
        kinds = (np.float32, np.float32, np.float32, bool, bool, np.float32)
        return tuple(np.array(column, kind) for column, kind in zip(zip(*columns), kinds))


LENGTHS = [[3, 1, 7, 50], [12, 50], [1, 1, 1, 8, 50]]


def check(episode: Episode, shown_action: int = 0) -> tuple[int, int, int]:
    """The episode is what the stream made; (environment, episode, length)."""
    length = len(episode.reward)
    assert episode.obs.shape == (length + 1, S) and episode.action.shape == (length, A)
    assert (episode.obs[:, :2] == episode.obs[0, :2]).all()
    np.testing.assert_array_equal(episode.obs[:, 2], np.arange(length + 1))
    np.testing.assert_array_equal(episode.reward, np.arange(length))
    np.testing.assert_array_equal(episode.action, np.tile([1.0, -0.5], (length, 1)))  # clipped: what was applied
    if shown_action:
        np.testing.assert_array_equal(episode.obs[0, -A:], 0.0)
        np.testing.assert_array_equal(episode.obs[1:, -A:], episode.action)
    return int(episode.obs[0, 0]), int(episode.obs[0, 1]), length


@pytest.mark.parametrize("horizon", [1, 4, 5, 20])
@pytest.mark.parametrize("shown_action", [0, A])
def test_windows_become_whole_episodes(horizon: int, shown_action: int):
    stream, assembler = Stream(LENGTHS), EpisodeAssembler(3, shown_action)
    ended = [episode for _ in range(20 // horizon) for episode in assembler.add(*stream.window(horizon))]
    found = [check(episode, shown_action) for episode in ended]
    assert sorted(found) == [(0, 0, 3), (0, 1, 1), (0, 2, 7), (1, 0, 12), (2, 0, 1), (2, 1, 1), (2, 2, 1), (2, 3, 8)]
    assert [episode.terminated for episode in ended] == [number % 2 == 0 for _, number, _ in found]
    rest = assembler.flush()
    assert [check(episode, shown_action) for episode in rest] == [(0, 3, 9), (1, 1, 8), (2, 4, 9)]
    assert not any(episode.terminated for episode in rest), "what is cut off has not ended"
    assert assembler.flush() == []


def test_episodes_come_in_the_order_of_their_ends():
    ended = EpisodeAssembler(3).add(*Stream(LENGTHS).window(12))
    assert [check(episode)[:2] for episode in ended] == [(2, 0), (2, 1), (0, 0), (2, 2), (0, 1), (0, 2), (2, 3), (1, 0)]


def test_assembling_goes_on_after_a_restart():
    stream, first = Stream(LENGTHS), EpisodeAssembler(3, A)
    first.add(*stream.window(4))
    second = EpisodeAssembler(3, A)
    second.load_state_dict(first.state_dict())
    window = stream.window(16)
    for expected, found in zip(first.add(*window) + first.flush(), second.add(*window) + second.flush(), strict=True):
        for name in ("obs", "action", "reward", "terminated"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("capacity", [3_000, 20_000, 10**9])
def test_thinning_fills_its_capacity_evenly(capacity: int):
    """Episodes grow from 10 to 1000 steps over a run of 200k steps, as they do while a robot learns to walk."""
    random = np.random.default_rng(0)
    thinning, total, kept = EvenThinning(capacity), 200_000, []
    clock = 0
    while clock < total:
        length = int(random.integers(10, 11 + 990 * clock // total))
        clock += length
        if thinning.keep(length, min(clock / total, 1.0)):
            kept.append((clock / total, length))
    amount = sum(length for _, length in kept)
    assert amount == thinning.kept <= capacity
    if capacity > total:
        assert amount == clock, "where all fits, all is kept"
        return
    assert amount > 0.7 * capacity
    quarters = [sum(length for at, length in kept if quarter / 4 <= at < (quarter + 1) / 4) for quarter in range(4)]
    if capacity >= 20_000:
        assert min(quarters) > 0.6 * max(quarters), quarters


def test_random_actions_are_bounded_and_repeatable():
    first, second = RandomActions(3, seed=1), RandomActions(3, seed=1)
    obs = np.zeros((64, 5), np.float32)
    actions = np.stack([first(obs) for _ in range(200)])
    assert actions.shape == (200, 64, 3) and actions.dtype == np.float32 and np.abs(actions).max() <= 1
    np.testing.assert_array_equal(actions[0], second(obs))
    change = np.abs(np.diff(actions, axis=0)).mean(axis=(0, 2))
    assert change[0::2].min() > 2 * change[1::2].max(), "even rows jump, odd rows are smooth"


def test_noise_is_added_and_clipped():
    class Constant:
        def act(self, obs: np.ndarray) -> np.ndarray:
            return np.full((len(obs), 2), 0.9, np.float32)

    obs = np.zeros((5000, 5), np.float32)
    np.testing.assert_array_equal(NoisyPolicy(Constant(), 0.0, 0)(obs), Constant().act(obs))
    noisy = NoisyPolicy(Constant(), 0.2, 0)(obs)
    assert (
        noisy.max() == 1.0
        and abs(noisy[noisy < 1].min()) < 0.9
        and np.mean(noisy == 1.0) == pytest.approx(0.31, abs=0.03)
    )


def test_seeds_of_parts_differ():
    seeds = [derived_seed(7), derived_seed(7, 0), derived_seed(7, 1), derived_seed(7, 0, 0), derived_seed(8, 0)]
    assert len(set(seeds)) == 5 and derived_seed(7, 0, 0) == seeds[3]


def collect(path: Path, episodes: int, resume: bool = False, **options) -> EpisodeStore:
    task = registry.get("hopper")
    source = policy_source(task, lambda seed: RandomActions(3, seed), "random actions", seed=3, threads=1)
    settings = dict(options={"task": "hopper", "policy": "random"}, batch=4) | options
    collect_episodes(path, [source], episodes=episodes, resume=resume, **settings)
    return EpisodeStore.open(path)


def test_a_fixed_policy_is_recorded_and_continued(tmp_path: Path):
    whole = collect(tmp_path / "whole", 10)
    assert whole.num_episodes == 10 and whole.task_names == ["hopper"]
    collect(tmp_path / "parts", 4)
    parts = collect(tmp_path / "parts", 10, resume=True)
    for name in ("obs", "action", "reward", "terminated"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    notes = parts.meta["collect"]
    assert notes["mixture"] == whole.meta["collect"]["mixture"]
    (row,) = notes["mixture"]
    returns = whole.statistics()["returns"]
    assert row["phase"] == "random actions" and row["episodes"] == 10 and row["transitions"] == whole.num_transitions
    assert row["return_mean"] == pytest.approx(returns.mean(), rel=1e-6)
    assert row["return_quantiles"]["1"] == pytest.approx(returns.max(), rel=1e-6)
    assert notes["policy"] == "random" and "torch" in notes["versions"] and "command" in notes


def test_the_cap_holds(tmp_path: Path):
    store = collect(tmp_path / "store", 50, max_transitions=400)
    assert 250 < store.num_transitions <= 400 and store.num_episodes < 20


def test_mismatches_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        collect(tmp_path / "store", 4, resume=True)
    collect(tmp_path / "store", 4)
    with pytest.raises(FileExistsError, match="--resume"):
        collect(tmp_path / "store", 4)
    with pytest.raises(ValueError, match="policy 'random', got 'other'"):
        collect(tmp_path / "store", 8, resume=True, options={"task": "hopper", "policy": "other"})
    with pytest.raises(ValueError, match="max_transitions must be >= 1"):
        Recording(tmp_path / "other", registry.get("hopper"), max_transitions=0)
    assert not (tmp_path / "other").exists()
