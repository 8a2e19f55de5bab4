"""Killed writers and full disks, in real processes: a reader sees the last commit and nothing half-written."""

import os
import resource
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError

S, A = 5, 2

PRELUDE = """
import sys
import numpy as np
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError

def add(writer, index, length):
    obs = 1000.0 * index + np.arange(length + 1)[:, None] + np.arange(5) / 8.0
    writer.add(obs, -obs[:-1, :2], index + np.arange(length) / 256.0, False)
"""


def start(body, *arguments, **options):
    program = PRELUDE + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, **options)


def first_obs(store):
    """What identifies each episode made by `add` above."""
    return [int(value) // 1000 for value in store.obs[store.episode_start[:-1], 0]]


@pytest.mark.parametrize("after", [0.0, 0.01, 0.03, 0.1])
def test_kill_during_append_keeps_the_last_commit(tmp_path, after):
    """Commits every 3 episodes, forever; killed at a moment of its own choosing."""
    body = """
        writer = EpisodeWriter(sys.argv[1], 5, 2, task_names=["t"], append=True)
        for i in range(10**9):
            add(writer, i, 50)
            if i % 3 == 2:
                writer.commit()
                if i == 5:
                    print("going", flush=True)
    """
    process = start(body, tmp_path / "s")
    assert process.stdout.readline() == b"going\n"
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()

    store = EpisodeStore.open(tmp_path / "s")
    store.verify()
    assert store.num_episodes >= 6
    assert store.num_episodes % 3 == 0
    assert first_obs(store) == list(range(store.num_episodes))
    # The next writer cuts the tail and goes on as if nothing had happened.
    with EpisodeWriter(tmp_path / "s", S, A, task_names=["t"], append=True) as writer:
        assert (tmp_path / "s" / "reward.f32").stat().st_size == 4 * store.num_rows
        writer.add(np.full((3, S), 1000.0 * store.num_episodes), np.zeros((2, A)), np.zeros(2), True)
    again = EpisodeStore.open(tmp_path / "s")
    again.verify()
    assert first_obs(again) == list(range(store.num_episodes + 1))
    assert not list((tmp_path / "s").glob("*.new.*"))


def test_kill_before_the_first_commit_leaves_nothing_visible(tmp_path):
    body = """
        writer = EpisodeWriter(sys.argv[1], 5, 2, task_names=["t"])
        add(writer, 0, 50)
        print("added", flush=True)
        sys.stdin.read()
    """
    process = start(body, tmp_path / "s", stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"added\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with pytest.raises(StoreError, match="no episode store"):
        EpisodeStore.open(tmp_path / "s")
    # What the dead writer left is hidden, and the next one takes it away.
    assert all(entry.name.startswith(".s.") for entry in tmp_path.iterdir())
    with EpisodeWriter(tmp_path / "s", S, A, task_names=["t"]) as writer:
        writer.add(np.zeros((3, S)), np.zeros((2, A)), np.zeros(2), True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_kill_between_meta_and_rename_leaves_nothing_visible(tmp_path):
    body = """
        import os, signal
        os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        writer = EpisodeWriter(sys.argv[1], 5, 2, task_names=["t"])
        add(writer, 0, 50)
        writer.commit()
    """
    process = start(body, tmp_path / "s")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "s").exists()


def test_disk_full_while_adding(tmp_path):
    """No file may grow past 20 kB: the write fails half-way, as on a full disk."""
    body = """
        writer = EpisodeWriter(sys.argv[1], 5, 2, task_names=["t"])
        add(writer, 0, 500)
        writer.commit()
        try:
            add(writer, 1, 2000)
        except StoreError as error:
            print(error)
        add(writer, 1, 100)  # what fits is still taken
        writer.commit()
        writer.close()
    """
    process = start(
        body, tmp_path / "s", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    )
    output, _ = process.communicate()
    assert process.returncode == 0
    assert b"cannot write episode store" in output
    assert b"File too large (1 committed episodes are safe)" in output
    store = EpisodeStore.open(tmp_path / "s")
    store.verify()
    assert list(store.lengths) == [500, 100]


def test_disk_full_while_committing(tmp_path):
    """The columns fit, meta.json (whose notes are long) does not: the earlier commit stays, no draft is left."""
    body = """
        writer = EpisodeWriter(sys.argv[1], 5, 2, task_names=["t"])
        add(writer, 0, 500)
        writer.commit()
        add(writer, 1, 100)
        writer.meta["notes"] = "x" * 30_000
        try:
            writer.commit()
        except StoreError as error:
            print(error)
        writer.close()
    """
    process = start(
        body, tmp_path / "s", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    )
    output, _ = process.communicate()
    assert process.returncode == 0
    assert b"1 committed episodes are safe" in output
    store = EpisodeStore.open(tmp_path / "s")
    store.verify()
    assert list(store.lengths) == [500]
    assert len(list((tmp_path / "s").iterdir())) == 7


def test_disk_full_while_creating(tmp_path):
    body = """
        try:
            with EpisodeWriter(sys.argv[1], 5, 2, task_names=["t"]) as writer:
                add(writer, 0, 5000)
        except StoreError as error:
            print(error)
    """
    process = start(
        body, tmp_path / "s", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    )
    output, _ = process.communicate()
    assert b"0 committed episodes are safe" in output
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place(tmp_path):
    with pytest.raises(StoreError, match="cannot write episode store /proc/nowhere/s"):
        EpisodeWriter("/proc/nowhere/s", S, A, task_names=["t"])
