"""Episodes in .npz files, in each of their forms."""

import io
import zipfile

import numpy as np
import pytest

from pwm_fast.data.conversion import convert_episodes, episode_sources
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.npz_files import NpzEpisodes
from pwm_fast.data.stored_zip import ForeignFileError

N, T, S, A = 3, 7, 4, 2


def arrays(rows: int) -> dict[str, np.ndarray]:
    """`rows` observations for every T actions."""
    random = np.random.default_rng(0)
    return {"obs": random.normal(size=(N, rows, S)), "action": random.uniform(-1, 1, (N, T, A)),
            "reward": random.normal(size=(N, T))}  # fmt: skip


def convert(tmp_path, save=np.savez, task=None, tasks=None, **data) -> EpisodeStore:
    save(tmp_path / "walk.npz", **data)
    convert_episodes(episode_sources(tmp_path / "walk.npz", task), tmp_path / "store", tasks=tasks)
    store = EpisodeStore.open(tmp_path / "store")
    store.verify()
    return store


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_row_more_than_actions(save, tmp_path):
    data = arrays(T + 1)
    store = convert(tmp_path, save, **data, terminated=np.array([0, 1, 0]))
    assert store.task_names == ["walk"] and store.lengths.tolist() == [T] * N
    for i in range(N):
        episode = store.episode(i)
        for name in data:
            assert np.array_equal(episode[name], data[name][i].astype(np.float32))
        assert episode["terminated"][-1] == (i == 1)


def test_as_many_rows_as_actions_are_tdmpc2s(tmp_path):
    data = arrays(T)
    data["reward"][:, 0], data["action"][:, 0] = np.nan, 1e9
    store = convert(tmp_path, **data, task="crawl")
    assert store.lengths.tolist() == [T - 1] * N and store.task_names == ["crawl"]
    assert np.array_equal(store.episode(2)["action"], data["action"][2, 1:].astype(np.float32))


def flat(lengths: list[int]) -> dict[str, np.ndarray]:
    """D4RL's form; the second episode is terminated, the others cut off in time."""
    random = np.random.default_rng(0)
    rows = sum(lengths)
    ends = np.cumsum(lengths) - 1
    data = {"observations": random.normal(size=(rows, S)).astype("f4"), "rewards": random.normal(size=rows),
            "actions": random.uniform(-1, 1, (rows, A)),
            "next_observations": random.normal(size=(rows, S)).astype("f4"), "terminals": np.zeros(rows, bool),
            "timeouts": np.zeros(rows, bool)}  # fmt: skip
    data["timeouts"][ends] = True
    data["terminals"][ends[1]], data["timeouts"][ends[1]] = True, False
    return data


def test_flat_rows_are_cut_into_episodes(tmp_path):
    lengths = [5000, 3, 1, 4096, 9000]
    data = flat(lengths)
    store = convert(tmp_path, **data)
    assert store.lengths.tolist() == lengths, "pieces of 4,096 rows cut through them"
    starts = np.cumsum([0, *lengths])
    for i, length in enumerate(lengths):
        episode, rows = store.episode(i), slice(starts[i], starts[i] + length)
        assert np.array_equal(episode["obs"][:-1], data["observations"][rows])
        assert np.array_equal(episode["obs"][-1], data["next_observations"][starts[i] + length - 1])
        assert np.array_equal(episode["action"], data["actions"][rows].astype("f4"))
        assert episode["terminated"][-1] == (i == 1)


def test_without_next_observations_each_episode_loses_its_last_step(tmp_path):
    data = flat([6, 3, 1, 4])
    del data["next_observations"]
    data["timeouts"][-1] = False  # the file's end cuts the last one off as well
    store = convert(tmp_path, **data)
    assert store.lengths.tolist() == [5, 2, 3] and not store.terminated.any()
    assert np.array_equal(store.episode(1)["obs"], data["observations"][6:9])


@pytest.mark.parametrize("kind", ["sequences", "flat"])
def test_reading_goes_on_from_any_unit(kind, tmp_path):
    data = arrays(T + 1) if kind == "sequences" else flat([5, 3, 2, 8])
    np.savez_compressed(tmp_path / "walk.npz", **data)
    source = NpzEpisodes(tmp_path / "walk.npz")
    whole = list(source.episodes(0, None))
    for k in range(len(whole)):
        rest = list(source.episodes(whole[k][0], None))
        assert [done for done, _ in rest] == [done for done, _ in whole[k + 1 :]]
        for (_, ours), (_, theirs) in zip(rest, whole[k + 1 :]):
            assert all(np.array_equal(a, b) for x, y in zip(ours, theirs) for a, b in zip(x, y))


def test_task_numbers_select(tmp_path):
    data = arrays(T + 1)
    np.savez(tmp_path / "many.npz", **data, task=np.array([0, 2, 2]))
    convert_episodes(episode_sources(tmp_path / "many.npz"), tmp_path / "many", tasks=["task-2"])
    store = EpisodeStore.open(tmp_path / "many")
    assert store.task_names == ["task-0", "task-1", "task-2"] and store.episode_task.tolist() == [2, 2]


def raw_npy(header: dict) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: {k: v for k, v in d.items() if k != "reward"}, "has no reward; it holds obs, action"),
        (lambda d: d | {"reward": d["reward"][:, :3]}, "do not belong together"),
        (lambda d: d | {"obs": d["obs"][:2]}, "do not belong together"),
        (lambda d: d | {"obs": d["obs"][:, :, 0]}, "do not belong together"),
        (lambda d: d | {"obs": d["obs"].astype(object)}, "holds object, not numbers"),
        (lambda d: d | {"obs": d["obs"].astype(str)}, "not numbers"),
        (lambda d: d | {"obs": np.asfortranarray(d["obs"])}, "Fortran order"),
        (lambda d: d | {"terminated": np.zeros((N, T))}, r"terminated is \(3, 7\)"),
        (lambda d: d | {"task": np.array([0, -1, 0])}, "task must be one number"),
        (lambda d: {k: v[0] for k, v in d.items()} | {"obs": d["obs"][0, :T]}, "says where episodes end"),
    ],
)
def test_what_does_not_fit_is_named(change, text, tmp_path):
    np.savez(tmp_path / "walk.npz", **change(arrays(T + 1)))
    with pytest.raises(ForeignFileError, match=text) as caught:
        NpzEpisodes(tmp_path / "walk.npz")
    assert str(tmp_path / "walk.npz") in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "checksum", "huge claim"])
def test_damaged_files_are_refused(kind, tmp_path):
    path = tmp_path / "walk.npz"
    data = arrays(T + 1)
    if kind == "huge claim":
        with zipfile.ZipFile(path, "w") as archive:
            for name, shape in (("obs", (3, 10**12, 4)), ("action", (3, 10**12, 2)), ("reward", (3, 10**12))):
                header = raw_npy({"descr": "<f8", "fortran_order": False, "shape": shape})
                archive.writestr(f"{name}.npy", header + bytes(100))
    elif kind != "missing":
        np.savez(path, **data)
        content = bytearray(path.read_bytes())
        place = content.find(data["obs"].tobytes()[:64])
        content[place] ^= 1
        path.write_bytes({"empty": b"", "text": b"episodes", "truncated": content[:-50], "checksum": content}[kind])
    with pytest.raises((ForeignFileError, FileNotFoundError)) as caught:
        convert_episodes(episode_sources(path), tmp_path / "s")
    assert str(path) in str(caught.value) and not (tmp_path / "s").exists()


def test_damage_is_found_before_anything_is_stored(tmp_path):
    """An array's checksum is known only at its end; here that is 4 MB after the damage."""
    data = {"obs": np.random.default_rng(0).normal(size=(200, 501, 5)).astype("f4"), "action": np.zeros((200, 500, 1)),
            "reward": np.zeros((200, 500))}  # fmt: skip
    path = tmp_path / "walk.npz"
    np.savez(path, **data)
    content = bytearray(path.read_bytes())
    content[content.find(data["obs"].tobytes()[:64])] ^= 1
    path.write_bytes(content)
    with pytest.raises(ForeignFileError, match=r"obs is damaged: Bad CRC-32"):
        convert_episodes(episode_sources(path), tmp_path / "s", commit_seconds=0.0)
    assert not (tmp_path / "s").exists()
