"""The scheduler ends, and its errors reach the consumer, whatever either of them is doing."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from live_threads import threads_alive

from pwm_fast import backend as backends
from pwm_fast.data.episodes import StoreError
from pwm_fast.data.scheduler import RolloutScheduler

needs_native = pytest.mark.skipif(backends.native is None, reason=f"no native module: {backends.native_reason}")
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]
pytestmark = pytest.mark.timeout(60)


def started(store, **options):
    scheduler = RolloutScheduler(store, 50, 3, **{"threads": 2, "prefetch": 3, **options})
    scheduler.admit(0, seed=0)
    return scheduler


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")


@needs_native
@needs_proc
@pytest.mark.parametrize("end", ["close", "with", "exception", "deleted", "cycle"])
@pytest.mark.parametrize("state", ["untouched", "stopped", "holding"])
def test_every_end_ends_the_workers(store, end, state):
    """Also while the consumer has stopped reading, or still holds a batch, which stays readable."""
    before = threads_alive()
    scheduler = started(store)
    held = None
    if state != "untouched":
        held = next(scheduler)
        if state == "stopped":
            held.release()
            held = None
    assert threads_alive() == before + 2
    if end == "close":
        scheduler.close()
        scheduler.close()
    elif end == "with":
        with scheduler:
            pass
    elif end == "exception":
        with pytest.raises(KeyError), scheduler:
            raise KeyError
    else:
        gone, obs = weakref.ref(scheduler), held and held["obs"]
        held = None
        if end == "cycle":
            scheduler.myself = scheduler
        del scheduler
        gc.collect()
        assert gone() is None
        assert obs is None or obs.isfinite().all()
    if held is not None:
        assert held["obs"].isfinite().all()
        held.release()
    assert threads_alive() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_scheduler_says_so(store, backend):
    scheduler = started(store, backend=backend)
    scheduler.close()
    for call in (lambda: next(scheduler), lambda: scheduler.admit(1, 1), lambda: scheduler.resize(1)):
        with pytest.raises(RuntimeError, match="the scheduler is closed"):
            call()


END_OF_A_PROCESS = """
import sys
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.scheduler import RolloutScheduler

scheduler = RolloutScheduler(EpisodeStore.open(sys.argv[1]), 50, 3, threads=3, prefetch=8)
scheduler.admit(0, seed=0)
keep = [scheduler]; keep.append(keep)
kept = next(scheduler)
print(kept["obs"].shape, flush=True)
"""


@pytest.mark.parametrize(
    "ending, code", [("", 0), ("sys.exit(3)", 3), ("raise KeyError", 1), ("import os; os._exit(4)", 4)]
)
def test_a_process_ends_beside_its_workers(store, command_environment, ending, code):
    done = subprocess.run(
        [sys.executable, "-c", END_OF_A_PROCESS + ending, str(store.path)],
        env=command_environment, timeout=50, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "torch.Size([1, 4, 50, 5])" in done.stdout


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_and_ends(store):
    scheduler = started(store)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            next(scheduler)
        except RuntimeError as error:
            code = 0 if "does not survive a fork" in str(error) else 2
        scheduler.close()
        del scheduler
        gc.collect()
        os._exit(code)
    deadline = time.monotonic() + 30
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if status[0] == 0:
        os.kill(child, signal.SIGKILL)
    assert status[0] == child and os.waitstatus_to_exitcode(status[1]) == 0
    with next(scheduler) as batch:
        assert batch.steps == (0,)
    scheduler.close()


@needs_native
def test_closing_frees_a_consumer_in_another_thread(store):
    scheduler = started(store)
    outcome: list[BaseException] = []

    def consume():
        try:
            while True:
                next(scheduler).release()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=consume)
    thread.start()
    time.sleep(0.05)
    scheduler.close()
    thread.join(30)
    assert not thread.is_alive() and "closed" in str(outcome[0])


# errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("column, row", [("obs", 12), ("action", 12), ("reward", 12)])
def test_nan_reaches_the_consumer_with_its_place(store, backend, column, row):
    path = store.path / {"obs": "obs.f32", "action": "action.f32", "reward": "reward.f32"}[column]
    values = np.memmap(path, "<f4", "r+", shape=getattr(store, column).shape)
    good = values[row].copy()
    values[row] = np.nan
    with RolloutScheduler(store, 500, 3, capacity=2, threads=2, backend=backend) as scheduler:
        scheduler.admit(0, seed=0, episodes=[0, 4])
        scheduler.admit(1, seed=1)
        with pytest.raises(StoreError, match=rf"NaN or infinity: {column}, row {row} \(episode 2\)"):
            next(scheduler)
        scheduler.retire(1)  # the policy whose data is bad: the other goes on
        with next(scheduler) as batch:
            assert batch.policies == (0,) and batch.steps == (0,)
        scheduler.admit(1, seed=1)
        with pytest.raises(StoreError, match="NaN or infinity"):
            next(scheduler)
        values[row] = good
        for _ in range(2):  # the batch in the ring may have been tried before the repair
            try:
                batch = next(scheduler)
                break
            except StoreError:
                continue
        assert batch.policies == (0, 1) and batch.steps == (1, 0)
        batch.release()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", ["obs.f32", "action.f32", "terminated.u8"])
def test_a_file_truncated_in_use_reaches_the_consumer(store, backend, file):
    """Batches that were ready come first; the process is not killed by reading past the file's end."""
    whole = (store.path / file).read_bytes()
    with started(store, backend=backend) as scheduler:
        next(scheduler).release()
        with open(store.path / file, "r+b") as cut:
            cut.truncate(8)
        with pytest.raises(StoreError, match=rf"{file} was truncated while in use: it has 8 bytes, but its .* need"):
            for _ in range(10):
                next(scheduler).release()
        with open(store.path / file, "r+b") as restored:
            restored.write(whole)
        before = scheduler.policies()[0].step
        for _ in range(10):
            try:
                with next(scheduler) as batch:
                    assert batch.steps == (before,)  # no step is lost
                break
            except StoreError:
                time.sleep(0.01)
        else:
            pytest.fail("the restored file is still refused")


@needs_native
def test_a_missing_file_is_refused(store):
    (store.path / "reward.f32").unlink()
    with pytest.raises(StoreError, match=r"reward\.f32 cannot be read: No such file"):
        RolloutScheduler(store, 4, 2, backend="native")
