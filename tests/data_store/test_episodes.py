"""The store gives back what was written, and refuses what cannot be trusted, with the reason."""

import json
import pickle
import zlib

import numpy as np
import pytest

from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError
from pwm_fast.data.layout import COLUMNS

S, A = 5, 2


def edit_meta(path, **changes):
    fields = json.loads((path / "meta.json").read_text())
    fields.update(changes)
    (path / "meta.json").write_text(json.dumps(fields))


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# what a store holds


def test_every_episode_comes_back(store, lengths, episode):
    assert (store.num_episodes, store.num_transitions) == (5, sum(lengths))
    assert (store.obs_dim, store.action_dim, store.task_names) == (S, A, ["task-0", "task-1"])
    for i, length in enumerate(lengths):
        wrote, got = episode(i, length), store.episode(i)
        for name in ("obs", "action", "reward"):
            np.testing.assert_array_equal(got[name], wrote[name].astype(np.float32))
        np.testing.assert_array_equal(got["terminated"], [0] * (length - 1) + [i % 2])
        assert got["task"] == i % 2


def test_row_convention(store, lengths):
    np.testing.assert_array_equal(store.lengths, lengths)
    np.testing.assert_array_equal(store.episode_start, np.cumsum([0] + [length + 1 for length in lengths]))
    last_rows = store.episode_start[1:] - 1
    assert not store.action[last_rows].any()
    assert not store.reward[last_rows].any()
    assert not store.terminated[last_rows].any()
    np.testing.assert_array_equal(store.episode_task, [0, 1, 0, 1, 0])


def test_columns_are_raw_little_endian_and_mapped(store):
    assert isinstance(store.obs, np.memmap)
    raw = np.frombuffer((store.path / "obs.f32").read_bytes(), "<f4").reshape(-1, S)
    np.testing.assert_array_equal(raw, store.obs)
    assert not store.obs.flags.writeable
    store.verify()


def test_pickling_sends_the_path_not_the_data(store):
    data = pickle.dumps(store)
    assert len(data) < 500
    np.testing.assert_array_equal(pickle.loads(data).obs, store.obs)


def test_statistics(store, lengths, episode):
    statistics = store.statistics()
    episodes = [episode(i, length) for i, length in enumerate(lengths)]
    obs = np.concatenate([e["obs"] for e in episodes])
    reward = np.concatenate([e["reward"] for e in episodes])
    np.testing.assert_allclose(statistics["returns"], [e["reward"].sum() for e in episodes])
    np.testing.assert_array_equal(statistics["lengths"], lengths)
    np.testing.assert_array_equal(statistics["terminated"], [False, True, False, True, False])
    np.testing.assert_allclose(statistics["obs_mean"], obs.mean(axis=0))
    np.testing.assert_allclose(statistics["obs_std"], obs.std(axis=0))
    np.testing.assert_array_equal(statistics["obs_max"], obs.max(axis=0))
    assert statistics["reward_mean"] == pytest.approx(reward.mean())
    assert statistics["reward_std"] == pytest.approx(reward.std())
    assert statistics["reward_quantiles"]["0.5"] == pytest.approx(np.median(reward))
    assert statistics["action_abs_max"] == np.abs(obs[:, :A]).max() - 1  # the final observation has no action


def test_statistics_of_a_constant_far_from_zero(tmp_path):
    with EpisodeWriter(tmp_path / "s", 1, 1, task_names=["t"]) as writer:
        writer.add(np.full((9, 1), 1e6), np.zeros((8, 1)), np.zeros(8), False)
    assert EpisodeStore.open(tmp_path / "s").statistics()["obs_std"][0] == pytest.approx(1e-6)


@pytest.mark.parametrize("fraction, validation", [(0.0, 0), (0.01, 1), (0.4, 2), (0.99, 4)])
def test_split_by_whole_episodes(store, fraction, validation):
    train, held_out = store.split(fraction, seed=3)
    assert len(held_out) == validation
    np.testing.assert_array_equal(np.sort(np.concatenate((train, held_out))), np.arange(5))
    again = store.split(fraction, seed=3)
    np.testing.assert_array_equal(train, again[0])


def test_split_depends_on_the_seed(store):
    assert len({tuple(store.split(0.4, seed)[1]) for seed in range(50)}) > 5


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_split_refuses_a_fraction_outside_its_range(store, fraction):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        store.split(fraction, seed=0)


# appending


def test_append_continues_the_store(tmp_path, write, store):
    before = np.array(store.obs)
    longer = write(store.path, [4, 9], first=5)
    assert longer.num_episodes == 7
    np.testing.assert_array_equal(longer.obs[: len(before)], before)
    np.testing.assert_array_equal(store.obs, before)  # the reader of the older commit is not disturbed
    longer.verify()
    whole = write(tmp_path / "whole", [7, 1, 12, 3, 20, 4, 9])
    assert contents(whole.path) == contents(longer.path)


def test_append_creates_a_store_where_there_is_none(tmp_path, episode):
    with EpisodeWriter(tmp_path / "deep" / "new", S, A, task_names=["t"], append=True) as writer:
        writer.add(**episode(0, 3), terminated=False)
    assert EpisodeStore.open(tmp_path / "deep" / "new").num_episodes == 1


def test_notes_are_saved_with_the_commit(store, episode):
    with EpisodeWriter(store.path, S, A, task_names=store.task_names, meta={"seed": 1}, append=True) as writer:
        writer.add(**episode(5, 3), terminated=False)
        writer.meta["position"] = 17
        writer.commit()
        writer.meta["position"] = 18
        writer.close()
    assert EpisodeStore.open(store.path).meta == {"seed": 1, "position": 17}


def test_appending_may_add_tasks_at_the_end(store, episode):
    with EpisodeWriter(store.path, S, A, task_names=["task-0", "task-1", "new"], append=True) as writer:
        writer.add(**episode(5, 3), terminated=False, task=2)
    assert EpisodeStore.open(store.path).episode_task[-1] == 2


@pytest.mark.parametrize(
    "obs_dim, action_dim, names, reason",
    [
        (S + 1, A, ["task-0", "task-1"], "its obs_dim is 5, got 6"),
        (S, A + 1, ["task-0", "task-1"], "its action_dim is 2, got 3"),
        (S, A, ["task-1", "task-0"], "must come first"),
    ],
)
def test_appending_other_data_is_refused(store, obs_dim, action_dim, names, reason):
    before = contents(store.path)
    with pytest.raises(StoreError, match=reason):
        EpisodeWriter(store.path, obs_dim, action_dim, task_names=names, append=True)
    assert contents(store.path) == before


def test_an_existing_path_is_not_overwritten(store, tmp_path):
    with pytest.raises(StoreError, match="exists already"):
        EpisodeWriter(store.path, S, A, task_names=["t"])
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StoreError, match="exists already"):
        EpisodeWriter(tmp_path / "file", S, A, task_names=["t"], append=True)
    assert (tmp_path / "file").read_text() == "precious"


def test_one_writer_at_a_time(store):
    with EpisodeWriter(store.path, S, A, task_names=store.task_names, append=True):
        with pytest.raises(StoreError, match="being written by another"):
            EpisodeWriter(store.path, S, A, task_names=store.task_names, append=True)


def test_an_exception_discards_what_was_not_committed(store, episode):
    before = contents(store.path)
    with pytest.raises(KeyboardInterrupt):
        with EpisodeWriter(store.path, S, A, task_names=store.task_names, append=True) as writer:
            writer.add(**episode(5, 30), terminated=False)
            raise KeyboardInterrupt
    assert contents(store.path) == before


def test_a_new_store_is_invisible_until_committed(tmp_path, episode):
    with pytest.raises(KeyboardInterrupt):
        with EpisodeWriter(tmp_path / "s", S, A, task_names=["t"]) as writer:
            writer.add(**episode(0, 30), terminated=False)
            assert not (tmp_path / "s").exists()
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_right_after_the_commit_keeps_the_commit(store, episode, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with EpisodeWriter(store.path, S, A, task_names=store.task_names, append=True) as writer:
            writer.add(**episode(5, 30), terminated=False)
            monkeypatch.setattr("pwm_fast.data.writer.sync_directory", interrupted)
            writer.commit()
    again = EpisodeStore.open(store.path)
    assert again.num_episodes == 6
    again.verify()


# data that is refused


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"obs": np.zeros((4, S + 1))}, r"obs \[T\+1, 5\].*got obs \[4, 6\]"),
        ({"obs": np.zeros((3, S))}, r"got obs \[3, 5\], action \[3, 2\]"),
        ({"obs": np.zeros(S)}, r"got obs \[5\]"),
        ({"action": np.zeros((4, A))}, r"action \[4, 2\]"),
        ({"action": np.zeros((3, A + 1))}, r"action \[3, 3\]"),
        ({"reward": np.zeros((3, 1))}, r"reward \[3, 1\]"),
        ({"obs": np.zeros((1, S)), "action": np.zeros((0, A)), "reward": np.zeros(0)}, "T >= 1"),
        ({"reward": [0.0, float("nan"), 0.0]}, "episode 0: reward is NaN or infinite at step 1"),
        ({"obs": np.full((4, S), np.inf)}, "obs is NaN or infinite at step 0"),
        ({"action": np.full((3, A), 1e39)}, "action is NaN or infinite"),
        ({"reward": ["a", "b", "c"]}, "not made of numbers"),
        ({"task": 1}, r"task must be in \[0, 1\), got 1"),
        ({"task": -1}, r"task must be in"),
    ],
)
def test_bad_episodes_are_refused_and_the_writer_goes_on(tmp_path, change, reason):
    good = {"obs": np.zeros((4, S)), "action": np.zeros((3, A)), "reward": np.zeros(3), "terminated": False}
    with EpisodeWriter(tmp_path / "s", S, A, task_names=["t"]) as writer:
        with pytest.raises(StoreError, match=reason):
            writer.add(**{**good, **change})
        assert writer.num_episodes == 0
        writer.add(**good)
    assert EpisodeStore.open(tmp_path / "s").num_transitions == 3


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"obs_dim": 0}, "must be >= 1"),
        ({"task_names": []}, "at least one task"),
        ({"meta": {"path": object()}}, "meta must hold only what JSON can"),
        ({"meta": {"loss": float("nan")}}, "meta must hold only what JSON can"),
    ],
)
def test_bad_writers_are_refused(tmp_path, arguments, reason):
    with pytest.raises(StoreError, match=reason):
        EpisodeWriter(tmp_path / "s", **{"obs_dim": S, "action_dim": A, "task_names": ["t"], **arguments})
    assert list(tmp_path.iterdir()) == []


def test_a_writer_without_episodes_makes_no_store(tmp_path):
    with EpisodeWriter(tmp_path / "s", S, A, task_names=["t"]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_closed_writer_says_so(store, episode):
    writer = EpisodeWriter(store.path, S, A, task_names=store.task_names, append=True)
    writer.close()
    writer.close()
    with pytest.raises(StoreError, match="is closed"):
        writer.add(**episode(0, 3), terminated=False)


def test_nan_that_another_program_wrote_is_found(store):
    columns = np.memmap(store.path / "reward.f32", "<f4", "r+")
    columns[10] = np.nan
    columns.flush()
    with pytest.raises(StoreError, match="NaN or infinity: reward, row 10"):
        store.statistics()


# stores that are refused


def test_missing_store(tmp_path):
    with pytest.raises(StoreError, match=r"no episode store at .*missing"):
        EpisodeStore.open(tmp_path / "missing")
    with pytest.raises(StoreError, match=r"there is no meta\.json"):
        EpisodeStore.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="no episode store"):
        EpisodeStore.open(tmp_path / "file")


def test_empty_store(store):
    edit_meta(store.path, num_rows=0, num_episodes=0)
    with pytest.raises(StoreError, match="is empty"):
        EpisodeStore.open(store.path)


@pytest.mark.parametrize("column", COLUMNS)
def test_truncated_column(store, column):
    file = store.path / COLUMNS[column].file
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.truncate(size - 1)
    with pytest.raises(StoreError, match=rf"truncated: {file.name} has {size - 1} bytes, .* need {size}"):
        EpisodeStore.open(store.path)


@pytest.mark.parametrize("column", COLUMNS)
def test_missing_column(store, column):
    (store.path / COLUMNS[column].file).unlink()
    with pytest.raises(StoreError, match=f"{COLUMNS[column].file} cannot be read"):
        EpisodeStore.open(store.path)


@pytest.mark.parametrize("column", COLUMNS)
def test_changed_bytes_fail_the_checksum(store, column):
    file = store.path / COLUMNS[column].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=file.name):
        EpisodeStore.open(store.path).verify()


def test_torn_meta(store):
    text = (store.path / "meta.json").read_bytes()
    for length in range(0, len(text) - 2, 7):
        (store.path / "meta.json").write_bytes(text[:length])
        with pytest.raises(StoreError, match=r"meta\.json"):
            EpisodeStore.open(store.path)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"format": "zip"}, "is not an episode store"),
        ({"version": 2}, "has version 2; this release reads version 1"),
        ({"obs_dim": 0}, "obs_dim = 0"),
        ({"obs_dim": "5"}, "obs_dim = '5'"),
        ({"obs_dim": 10**9}, "truncated"),
        ({"num_rows": -1}, "num_rows = -1"),
        ({"num_rows": 5.5}, "num_rows = 5.5"),
        ({"num_rows": 9}, "5 episodes cannot have 9 rows"),
        ({"num_episodes": 0}, "0 episodes cannot have"),
        ({"num_episodes": 6}, "truncated"),
        ({"num_episodes": 4}, "checksum"),
        ({"task_names": []}, "task_names"),
        ({"checksums": {}}, "checksum for each"),
        ({"meta": None}, "meta = None"),
    ],
)
def test_inconsistent_meta(store, changes, reason):
    edit_meta(store.path, **changes)
    with pytest.raises(StoreError, match=reason):
        EpisodeStore.open(store.path)


@pytest.mark.parametrize("starts", [[1, 8, 10, 23, 27], [0, 8, 8, 23, 27], [0, 8, 9, 23, 27], [0, 8, 10, 23, 47]])
def test_impossible_episode_starts(store, starts):
    data = np.array(starts, "<i8").tobytes()
    (store.path / "episode_start.i64").write_bytes(data)
    fields = json.loads((store.path / "meta.json").read_text())
    edit_meta(store.path, checksums={**fields["checksums"], "episode_start": zlib.crc32(data)})
    with pytest.raises(StoreError, match=r"episode \d covers rows"):
        EpisodeStore.open(store.path)


def test_episode_index_outside_the_store(store):
    with pytest.raises(StoreError, match=r"episode must be in \[0, 5\), got 5"):
        store.episode(5)
