"""A population's start states come ahead of its steps, and are those of its samplers."""

import gc
import os

import numpy as np
import pytest
from live_threads import threads_alive

from pwm_fast import backend as backends
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError, WindowSampler
from pwm_fast.data.scheduler import RingFullError
from pwm_fast.data.start_states import StartStates
from pwm_fast.data.task_table import fitted

needs_native = pytest.mark.skipif(backends.native is None, reason=f"no native module: {backends.native_reason}")
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]
pytestmark = pytest.mark.timeout(60)
WIDTH = 9


@pytest.fixture
def samplers(store, tmp_path) -> list[WindowSampler]:
    """Five policies of two stores, whose rows are narrower and wider than WIDTH, and of different tasks."""
    with EpisodeWriter(tmp_path / "wide", 13, 1, task_names=["x", "y"]) as writer:
        rng = np.random.default_rng(0)
        for i in range(4):
            writer.add(rng.normal(size=(8, 13)), np.zeros((7, 1)), np.zeros(7), False, task=i % 2)
    wide = EpisodeStore.open(tmp_path / "wide")
    of = [(store, 0), (wide, 1), (store, 1), (wide, None), (store, 0)]
    return [WindowSampler(where, 1, seed=seed, tasks=task) for seed, (where, task) in enumerate(of)]


def expected(samplers, step, batch=6):
    return np.stack([fitted(sampler.start_states(step, batch), WIDTH) for sampler in samplers])


def taken(starts, step):
    with starts.at(step) as batch:
        return batch["obs"].numpy().copy()


def files_open():
    return sorted(path for path in map(_target, os.listdir("/proc/self/fd")) if path.endswith(".f32"))


def _target(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # the listing's own
        return ""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch", [None, 1])
def test_every_step_is_the_samplers(samplers, backend, threads, prefetch):
    """In sequence, out of it, far away and again; also after a close, and from the middle of a run on."""
    with StartStates(samplers, 6, WIDTH, threads, prefetch, backend) as starts:
        for step in (0, 1, 2, 3, 9, 10, 4, 4, 2**40, 2**40 + 1, 0):
            np.testing.assert_array_equal(taken(starts, step), expected(samplers, step))
        starts.close()
        np.testing.assert_array_equal(taken(starts, 7), expected(samplers, 7))


@needs_native
def test_batches_are_made_ahead(samplers):
    """While a batch is used the next ones are gathered, in memory that is used again."""
    with StartStates(samplers, 6, WIDTH, prefetch=2) as starts:
        places = set()
        for step in range(12):
            with starts.at(step) as batch:
                places.add(batch["obs"].data_ptr())
        assert len(places) <= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeping_every_batch_is_refused_and_keeps_them(samplers, backend):
    with StartStates(samplers, 6, WIDTH, prefetch=1, backend=backend) as starts:
        kept = [starts.at(0), starts.at(1)]
        with pytest.raises(RingFullError, match="all 2 batches are in use"):
            starts.at(2)
        for step, batch in enumerate(kept):
            np.testing.assert_array_equal(batch["obs"].numpy(), expected(samplers, step))
            batch.release()
        np.testing.assert_array_equal(taken(starts, 2), expected(samplers, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_data_stops_its_step_and_no_other(samplers, backend):
    """A step asked for after a refused one is the one that was asked for."""
    store = samplers[0].store
    values = np.memmap(store.path / "obs.f32", "<f4", "r+", shape=store.obs.shape)
    starts = StartStates([samplers[0]], 500, WIDTH, backend=backend)
    with starts:
        good = taken(starts, 3)
        values[2] = np.nan
        for step in (20, 20, 4):
            with pytest.raises(StoreError, match="NaN or infinity: obs, row 2"):
                for again in range(50):  # those that are ready come first
                    taken(starts, step + again)
        values[2] = store.obs[3]
        starts.close()
        assert taken(starts, 3).shape == good.shape


@needs_native
@needs_proc
@pytest.mark.parametrize("end", ["close", "exception", "interrupt", "deleted"])
@pytest.mark.parametrize("holding", [False, True])
def test_every_end_leaves_no_thread_and_no_file(samplers, end, holding):
    gc.collect()  # what earlier tests left
    before, files = threads_alive(), files_open()
    starts = StartStates(samplers, 6, WIDTH, threads=2)
    assert threads_alive() == before  # none before the first step
    batch = starts.at(0)
    assert threads_alive() == before + 2 and len(files_open()) == len(files) + 2
    if not holding:
        batch.release()
    if end == "close":
        starts.close()
        starts.close()
    elif end == "deleted":
        del starts
        batch.release()
    else:
        error = KeyError if end == "exception" else KeyboardInterrupt
        with pytest.raises(error), starts:
            raise error
    if holding and end != "deleted":
        np.testing.assert_array_equal(batch["obs"].numpy(), expected(samplers, 0))
    del batch
    gc.collect()
    assert threads_alive() == before and files_open() == files


def test_what_is_refused(samplers):
    with pytest.raises(ValueError, match="a sampler for each policy, got none"):
        StartStates([], 6, WIDTH)
    for name in ("batch", "obs_dim", "threads", "prefetch"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            StartStates(samplers, **{"batch": 6, "obs_dim": WIDTH, name: 0})
