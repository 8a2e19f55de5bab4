"""Foreign episodes into our store: exact rows, a choice of tasks, exact resumes, memory that does not grow."""

import os
import signal
import subprocess
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import DATA, write_archive

from pwm_fast.data.conversion import convert_episodes, episode_sources
from pwm_fast.data.episodes import EpisodeStore, StoreError
from pwm_fast.data.stored_zip import ForeignFileError
from pwm_fast.data.task_table import tasks

CHUNK = DATA / "mt30_mini_chunk_0_tensordict020.pt"
TASKS = ["walker-walk"] * 4 + ["pendulum-swingup"] * 4 + ["reacher-three-easy"] * 4  # of its episodes


def convert(source: Path | list[Path], destination: Path, **options) -> EpisodeStore:
    convert_episodes(episode_sources(source), destination, **options)
    store = EpisodeStore.open(destination)
    store.verify()
    return store


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """The chunk's raw storages, read by nothing of ours."""
    shapes = {"obs": (12, 501, 24), "action": (12, 501, 6), "reward": (12, 501), "task": (12, 501)}
    with zipfile.ZipFile(CHUNK) as archive:
        root = archive.namelist()[0].split("/")[0]
        return {
            name: np.frombuffer(archive.read(f"{root}/data/{i}"), "<i4" if name == "task" else "<f4").reshape(shape)
            for i, (name, shape) in enumerate(shapes.items())
        }


def assert_rows(store: EpisodeStore, arrays: dict[str, np.ndarray], chosen: list[int]) -> None:
    """Row t's action and reward belong to the transition from t - 1; row 0's are nowhere."""
    assert store.num_episodes == len(chosen) and (store.lengths == 500).all()
    for i, n in enumerate(chosen):
        episode = store.episode(i)
        assert np.array_equal(episode["obs"], arrays["obs"][n])
        assert np.array_equal(episode["action"], arrays["action"][n, 1:])
        assert np.array_equal(episode["reward"], arrays["reward"][n, 1:])
        assert episode["task"] == arrays["task"][n, 1] and not episode["terminated"].any()


def test_a_chunk_comes_over_exactly(arrays, tmp_path):
    assert np.isnan(arrays["reward"][:, 0]).all(), "the fixture's row 0 is of the kind that must go"
    store = convert(CHUNK, tmp_path / "s")
    assert_rows(store, arrays, list(range(12)))
    assert store.task_names == [task.name for task in tasks("mt30")]
    account = store.meta["convert"]
    assert [store.task_names[i] for i in store.episode_task] == TASKS
    walker = account["by_task"]["walker-walk"]
    assert (walker["episodes"], walker["transitions"]) == (4, 2000)
    assert abs(walker["return_best"] - 70.44871520996094) < 1e-3  # as recorded when the episodes were run


def test_a_chunk_of_another_tensordict_is_the_same_data(arrays, tmp_path):
    """It holds episodes 0, 4 and 8."""
    assert_rows(convert(DATA / "mt30_mini_chunk_0_tensordict0143.pt", tmp_path / "s"), arrays, [0, 4, 8])


@pytest.mark.parametrize("inner", [dict, "_StringOnlyDict"])
def test_tensordict_0_4_pickles_are_read(inner, arrays, tmp_path, monkeypatch):
    """Objects of `tensordict._td` with their state; its classes exist here only while the file is written."""
    names = ("tensordict", "tensordict._td", "tensordict.utils")
    modules = {name: types.ModuleType(name) for name in names}
    table = type("TensorDict", (), {"__module__": "tensordict._td"})
    strings = type("_StringOnlyDict", (dict,), {"__module__": "tensordict.utils"})
    modules["tensordict._td"].TensorDict, modules["tensordict.utils"]._StringOnlyDict = table, strings
    data = table()
    made = dict if inner is dict else strings
    data.__dict__.update(_tensordict=made((key, torch.tensor(value)) for key, value in arrays.items()))
    data.__dict__.update(_batch_size=torch.Size([12, 501]), _device=torch.device("cpu"), _lock_parents_weakrefs=[])
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save(data, tmp_path / "c.pt")
    assert_rows(convert(tmp_path / "c.pt", tmp_path / "s"), arrays, list(range(12)))


def test_row_0_is_dropped_by_its_place_not_its_value(arrays, tmp_path):
    """In other files it is uninitialised memory; and NaN elsewhere is damage that leaves the episode out."""
    action, reward, obs = arrays["action"].copy(), arrays["reward"].copy(), arrays["obs"].copy()
    action[:, 0], reward[:, 0] = 1e30, -7.0
    reward[5, 200] = np.nan
    np.savez(tmp_path / "a.npz", obs=obs, action=action, reward=reward, task=arrays["task"])
    store = convert(tmp_path / "a.npz", tmp_path / "s")
    assert_rows(store, arrays, [n for n in range(12) if n != 5])
    assert store.meta["convert"]["left_out"] == 1


@pytest.mark.parametrize(
    ("chosen", "episodes"),
    [(["walker-walk"], [0, 1, 2, 3]), (["reacher-three-easy", "pendulum-swingup"], list(range(4, 12))),
     (["mt30"], list(range(12))), (["dm_control", "walker-walk"], list(range(12)))],
)  # fmt: skip
def test_tasks_are_selectable_and_keep_their_numbers(chosen, episodes, arrays, tmp_path):
    assert_rows(convert(CHUNK, tmp_path / "s", tasks=chosen), arrays, episodes)


def test_a_choice_that_gives_nothing_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'walker-wakl'; did you mean 'walker-walk'"):
        convert(CHUNK, tmp_path / "s", tasks=["walker-wakl"])
    with pytest.raises(ForeignFileError, match="gave no episode"):
        convert(CHUNK, tmp_path / "s", tasks=["fish-swim"])
    assert not list(tmp_path.iterdir())


def test_a_folder_of_chunks_is_one_store_in_the_order_of_their_numbers(arrays, tmp_path):
    folder = tmp_path / "chunks"
    folder.mkdir()
    for name, rows in (("chunk_10", slice(8, 12)), ("chunk_2", slice(4, 8)), ("chunk_1", slice(0, 4))):
        torch.save({key: torch.tensor(value[rows]) for key, value in arrays.items()}, folder / f"{name}.pt")
    (folder / "README.txt").write_text("not data")
    assert_rows(convert(folder, tmp_path / "s"), arrays, list(range(12)))


def test_files_of_different_shapes_do_not_mix(arrays, tmp_path):
    folder = tmp_path / "chunks"
    folder.mkdir()
    for i, width in enumerate((24, 23)):
        chunk = {key: torch.tensor(value[..., :width] if key == "obs" else value) for key, value in arrays.items()}
        torch.save(chunk, folder / f"{i}.pt")
    with pytest.raises(ForeignFileError, match=r"1\.pt has 23 observations and 6 actions, 0\.pt has 24 and 6"):
        convert(folder, tmp_path / "s")


def test_a_sequence_of_two_tasks_stops_the_conversion_with_what_came_before(arrays, tmp_path):
    task = arrays["task"].copy()
    task[7, 100] = 3
    torch.save({**{k: torch.tensor(v) for k, v in arrays.items()}, "task": torch.tensor(task)}, tmp_path / "c.pt")
    with pytest.raises(ForeignFileError, match=r"sequence 7 must be of one task in \[0, 30\), got 3 to 7"):
        convert(tmp_path / "c.pt", tmp_path / "s")
    assert EpisodeStore.open(tmp_path / "s").num_episodes == 7


def columns(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if path.suffix != ".json"}


KILLED = """
import os, signal, sys
from pwm_fast.data import conversion, writer
commit, left = writer.EpisodeWriter.commit, [int(sys.argv[3])]
def counted(self):
    if sys.argv[4] == "before" and left[0] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL if sys.argv[4] != "ctrl-c" else signal.SIGINT)
writer.EpisodeWriter.commit = counted
sources = conversion.episode_sources(sys.argv[1])
resume = os.path.exists(sys.argv[2])
conversion.convert_episodes(sources, sys.argv[2], commit_seconds=0.0, resume=resume)
"""


@pytest.mark.parametrize("how", ["after", "before", "ctrl-c"])
def test_a_killed_conversion_goes_on_exactly(how, tmp_path, command_environment):
    """Killed again and again, right before or after its second commit, until it is through."""
    folder = tmp_path / "chunks"
    folder.mkdir()
    for name in (CHUNK.name, "mt30_mini_chunk_0_tensordict0143.pt"):
        (folder / name).symlink_to(DATA / name)
    convert(folder, tmp_path / "whole")
    killed = 0
    program = [sys.executable, "-c", KILLED, folder, tmp_path / "parts", "6", how]
    while True:
        done = subprocess.run([str(part) for part in program], env=command_environment, capture_output=True, text=True)
        if done.returncode == 0:
            break
        killed += 1
        if how == "ctrl-c":
            assert "Interrupted: stopped; " in done.stderr and killed < 10
        else:
            assert done.returncode == -signal.SIGKILL and killed < 10, done.stderr
    assert killed >= 2
    assert columns(tmp_path / "parts") == columns(tmp_path / "whole")
    accounts = [EpisodeStore.open(tmp_path / name).meta["convert"] for name in ("parts", "whole")]
    assert accounts[0] == accounts[1] and accounts[0]["done"] == [2, 0]
    again = convert_episodes(episode_sources(folder), tmp_path / "parts", resume=True)
    assert again == accounts[1] and columns(tmp_path / "parts") == columns(tmp_path / "whole")


def test_a_resume_must_be_of_the_same_conversion(tmp_path, write):
    convert(CHUNK, tmp_path / "s", tasks=["walker-walk"])
    with pytest.raises(FileExistsError, match="go on with it by --resume, or choose another DST"):
        convert(CHUNK, tmp_path / "s")
    with pytest.raises(ValueError, match=r"was begun with tasks \['walker-walk'\], got None"):
        convert(CHUNK, tmp_path / "s", resume=True)
    with pytest.raises(ValueError, match="was begun with sources"):
        convert(DATA / "mt30_mini_chunk_0_tensordict0143.pt", tmp_path / "s", tasks=["walker-walk"], resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        convert(CHUNK, tmp_path / "other", resume=True)
    write(tmp_path / "collected", [5])
    with pytest.raises(StoreError, match="was not made by convert"):
        convert(CHUNK, tmp_path / "collected", resume=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        convert(CHUNK, tmp_path / "file")


def big_chunk(path: Path, sequences: int = 1000) -> Path:
    """A chunk of 60 MB."""
    generator = torch.Generator().manual_seed(0)
    shape = (sequences, 501)
    torch.save(
        {"obs": torch.rand(*shape, 24, generator=generator), "action": torch.rand(*shape, 6, generator=generator),
         "reward": torch.rand(shape, generator=generator), "task": torch.zeros(shape, dtype=torch.int32)},
        path,
    )  # fmt: skip
    return path


def test_memory_does_not_grow_with_the_file(tmp_path):
    """What Python and numpy allocate; the file is mapped."""
    source = big_chunk(tmp_path / "c.pt")
    assert source.stat().st_size > 60e6
    tracemalloc.start()
    try:
        convert_episodes(episode_sources(source), tmp_path / "s")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    assert EpisodeStore.open(tmp_path / "s").num_transitions == 500_000


def test_a_full_disk_keeps_what_was_committed_and_the_rest_follows(tmp_path, command_environment):
    """No file may grow past 300 kB: the sixth episode's observations do not fit."""
    program = """
import resource, sys
from pwm_fast.data.conversion import convert_episodes, episode_sources
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
convert_episodes(episode_sources(sys.argv[1]), sys.argv[2], commit_seconds=0.0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(CHUNK), str(tmp_path / "s")],
        env=command_environment, capture_output=True, text=True,
    )  # fmt: skip
    assert "StoreError: cannot write episode store" in done.stderr and "6 committed episodes are safe" in done.stderr
    assert EpisodeStore.open(tmp_path / "s").num_episodes == 6
    convert(CHUNK, tmp_path / "s", resume=True)
    convert(CHUNK, tmp_path / "whole")
    assert columns(tmp_path / "s") == columns(tmp_path / "whole")


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "text", "truncated", "no episodes", "empty folder", "store", "hostile"]
)
def test_bad_sources_are_named(kind, tmp_path, write):
    path, text = tmp_path / "source.pt", {
        "missing": "does not exist", "empty": "is empty", "text": "is no zip archive", "truncated": "truncated",
        "no episodes": "no table with columns obs, action and reward", "empty folder": "holds neither .pt nor .npz",
        "store": "is an episode store already", "hostile": "calls 'os.system'; it would run code",
    }[kind]  # fmt: skip
    if kind == "empty folder":
        path.mkdir()
    elif kind == "store":
        write(path, [5])
    elif kind == "no episodes":
        torch.save({"weights": torch.ones(3)}, path)
    elif kind == "hostile":
        write_archive(path, b"\x80\x02cos\nsystem\n(X\x0c\x00\x00\x00touch hackedtR.")
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"my data", "truncated": CHUNK.read_bytes()[:-1000]}[kind])
    with pytest.raises((ForeignFileError, FileNotFoundError), match=text) as caught:
        convert(path, tmp_path / "s")
    assert str(path) in str(caught.value) and not (tmp_path / "s").exists()
    assert not os.path.exists("hacked")


def test_a_damaged_storage_is_found_before_it_is_stored(tmp_path):
    content = bytearray(CHUNK.read_bytes())
    content[300_000] ^= 1
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(ForeignFileError, match=r"member '.*/data/0' fails its checksum"):
        convert(tmp_path / "c.pt", tmp_path / "s")
    assert not (tmp_path / "s").exists()
    unchecked = episode_sources(tmp_path / "c.pt", verify=False)
    convert_episodes(unchecked, tmp_path / "s")
    assert EpisodeStore.open(tmp_path / "s").num_episodes == 12
