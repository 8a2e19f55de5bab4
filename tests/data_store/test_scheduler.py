"""The scheduler's batches are the sampler's, whoever shares them and however they are made ahead."""

import os
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pwm_fast import backend as backends
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError, WindowSampler
from pwm_fast.data.scheduler import RingFullError, RolloutScheduler

needs_native = pytest.mark.skipif(backends.native is None, reason=f"no native module: {backends.native_reason}")
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]
pytestmark = pytest.mark.timeout(60)


def drain(scheduler, steps=None):
    """Every batch that is left (or so many): policies, steps and copies of the columns."""
    taken = []
    while steps is None or len(taken) < steps:
        batch = next(scheduler, None)
        if batch is None:
            break
        with batch:
            taken.append((batch.policies, batch.steps, {name: column.clone() for name, column in batch.items()}))
    return taken


def assert_drawn_by_samplers(taken, store, batch, horizon, partial, seeds, episodes):
    """Each row is what a plain sampler of its own seed and episodes draws at its step."""
    for policies, steps, columns in taken:
        for p, (policy, step) in enumerate(zip(policies, steps)):
            sampler = WindowSampler(
                store, horizon or 1, episodes[policy], seeds[policy], backend="torch", partial=partial
            )
            if horizon is None:
                expected = {"obs": sampler.start_states(step, batch)}
            else:
                expected = sampler.windows(step, batch)
            assert columns.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(columns[name][p].numpy(), array, err_msg=name)


def packing(taken):
    return [(policies, steps) for policies, steps, _ in taken]


# the same batches


@needs_native
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing tells the system to forget a file")
@pytest.mark.parametrize("horizon", [None, 3])
def test_a_store_that_is_on_the_disk_only_gives_the_same_batches(write, tmp_path, horizon):
    """Its pages are asked for before they are read, up to the store's last row; later batches find them there."""
    write(tmp_path / "s", [4000, 3, 700])
    for file in (tmp_path / "s").iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    store = EpisodeStore.open(tmp_path / "s")
    with RolloutScheduler(store, 300, horizon, threads=2, backend="native") as scheduler:
        scheduler.admit(0, seed=5, end=8)
        taken = drain(scheduler)
    assert len(taken) == 8
    assert_drawn_by_samplers(taken, store, 300, horizon, False, [5], [None])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    horizon=st.none() | st.integers(1, 12),
    partial=st.booleans(),
    batch=st.integers(1, 90),
    capacity=st.integers(1, 4),
    prefetch=st.integers(1, 4),
    threads=st.integers(1, 3),
    policies=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 4)), max_size=6),
    backend=st.sampled_from(["native", "torch"] if backends.native is not None else ["torch"]),
)
def test_rows_are_the_samplers_of_their_policies(
    tmp_path_factory, write, lengths, horizon, partial, batch, capacity, prefetch, threads, policies, backend
):
    store = write(tmp_path_factory.mktemp("rows") / "s", lengths)
    horizon = horizon and min(horizon, max(lengths))
    partial = partial and horizon is not None
    longest = [int(np.argmax(lengths))]
    seeds, episodes = [seed for seed, *_ in policies], [longest if i % 2 else None for i in range(len(policies))]
    with RolloutScheduler(store, batch, horizon, capacity, prefetch, threads, partial, backend) as scheduler:
        for i, (seed, step, count) in enumerate(policies):
            scheduler.admit(i, seed, episodes[i], step, step + count)
        taken = drain(scheduler)
    assert_drawn_by_samplers(taken, store, batch, horizon, partial, seeds, episodes)
    for i, (_, step, count) in enumerate(policies):  # every step of every policy, once and in order
        own = [s for rows, steps, _ in taken for policy, s in zip(rows, steps) if policy == i]
        assert own == list(range(step, step + count))


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory) -> EpisodeStore:
    """Rows of 4 kB, so that one batch is many pieces of work."""
    path, rng = tmp_path_factory.mktemp("wide") / "s", np.random.default_rng(0)
    with EpisodeWriter(path, 1000, 24, task_names=["t"]) as writer:
        for n in (300, 17, 200):
            writer.add(rng.normal(size=(n + 1, 1000)), rng.normal(size=(n, 24)), rng.normal(size=n), True)
    return EpisodeStore.open(path)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_threads_and_prefetch_do_not_change_a_batch(wide_store, threads, prefetch):
    with RolloutScheduler(wide_store, 37, 16, 2, prefetch, threads, backend="native") as scheduler:
        for policy in range(3):
            scheduler.admit(policy, seed=policy, end=3 + policy)
        taken = drain(scheduler)
    assert packing(taken)[:3] == [((0, 1), (s, s)) for s in range(3)]
    assert_drawn_by_samplers(taken, wide_store, 37, 16, False, [0, 1, 2], [None] * 3)


@needs_native
def test_windows_never_cross_an_episodes_end(store, lengths):
    with RolloutScheduler(store, 200, 3, backend="native") as scheduler:
        scheduler.admit(0, seed=1, end=3)
        for _, _, columns in drain(scheduler):
            index, row = np.divmod(columns["obs"][0, :, :, 0].numpy().astype(int), 1000)  # [H+1, B]
            assert (index == index[0]).all() and (np.diff(row, axis=0) == 1).all()
            assert all(row[-1, b] <= lengths[index[0, b]] for b in range(200))


# who shares a batch


@pytest.mark.parametrize("backend", BACKENDS)
def test_policies_are_packed_in_the_order_of_their_admission(store, backend):
    with RolloutScheduler(store, 4, capacity=2, backend=backend) as scheduler:
        scheduler.admit(7, seed=1, end=2)
        scheduler.admit(3, seed=2)
        scheduler.admit(5, seed=3, step=10, end=12)
        scheduler.admit(9, seed=4)
        assert packing(drain(scheduler, 3)) == [((7, 3), (0, 0)), ((7, 3), (1, 1)), ((3, 5), (2, 10))]
        scheduler.retire(3)
        assert packing(drain(scheduler, 2)) == [((5, 9), (11, 0)), ((9,), (1,))]
        scheduler.admit(3, seed=2, step=3)  # an id may come back
        assert packing(drain(scheduler, 1)) == [((9, 3), (2, 3))]
        assert [tuple(p) for p in scheduler.policies()] == [(9, 4, 3, None), (3, 2, 4, None)]
        scheduler.retire(9)
        scheduler.retire(3)
        assert next(scheduler, None) is None
        scheduler.admit(1, seed=0)
        assert packing(drain(scheduler, 1)) == [((1,), (0,))]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(data=st.data())
def test_admission_and_retirement_count_from_the_next_batch(store, backend, data):
    """Whatever was prepared ahead, the batches are those of the list of policies kept by hand."""
    capacity, prefetch = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    with RolloutScheduler(store, 3, 2, capacity, prefetch, 2, backend=backend) as scheduler:
        policies, seeds = [], []
        for _ in range(data.draw(st.integers(1, 15))):
            action = data.draw(st.sampled_from(["admit", "retire", "next", "next"]))
            if action == "admit":
                scheduler.admit(len(seeds), seed=len(seeds))
                policies.append([len(seeds), 0])
                seeds.append(len(seeds))
            elif action == "retire" and policies:
                chosen = data.draw(st.integers(0, len(policies) - 1))
                scheduler.retire(policies.pop(chosen)[0])
            elif action == "next":
                taken, rows = drain(scheduler, 1), policies[:capacity]
                assert packing(taken) == ([(tuple(p for p, _ in rows), tuple(s for _, s in rows))] if rows else [])
                assert_drawn_by_samplers(taken, store, 3, 2, False, seeds, [None] * len(seeds))
                for row in rows:
                    row[1] += 1


# going on from any step


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_saved_state_goes_on_exactly(store, backend):
    def make():
        return RolloutScheduler(store, 5, 2, capacity=2, prefetch=3, threads=2, backend=backend)

    with make() as whole, make() as other:
        for policy in range(4):
            whole.admit(policy, seed=policy, episodes=[0, 4] if policy % 2 else None, end=3 + policy)
        drain(whole, 4)
        state = whole.state_dict()
        other.admit(99, seed=0)
        other.load_state_dict(state)
        rest, again = drain(whole), drain(other)
        assert packing(rest) == packing(again) and len(rest) > 2
        for (_, _, one), (_, _, two) in zip(rest, again):
            assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_step_can_be_asked_for(store, backend):
    sampler = WindowSampler(store, 1, seed=3)
    with RolloutScheduler(store, 6, backend=backend) as scheduler:
        scheduler.admit(0, seed=3)
        for step in (0, 1, 2, 50, 51, 7, 7, 2**40):
            with scheduler.at(step) as batch:
                np.testing.assert_array_equal(batch["obs"][0].numpy(), sampler.start_states(step, 6))
        scheduler.retire(0)
        with pytest.raises(ValueError, match="no policy has a step 3"):
            scheduler.at(3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resizing_changes_nothing_but_the_ring(store, backend):
    with RolloutScheduler(store, 5, 2, backend=backend) as scheduler:
        scheduler.admit(0, seed=1)
        taken = drain(scheduler, 2)
        with next(scheduler) as batch, pytest.raises(ValueError, match="1 batches are in use; release them"):
            scheduler.resize(prefetch=1)
        assert batch.steps == (2,) and scheduler.prefetch == 32  # small batches, many of them
        scheduler.resize(prefetch=5, threads=3)
        taken += drain(scheduler, 4)
        assert (scheduler.prefetch, scheduler.threads) == (5, 3)
        assert [steps for _, steps, _ in taken] == [(0,), (1,), (3,), (4,), (5,), (6,)]
        assert_drawn_by_samplers(taken, store, 5, 2, False, [1], [None])


# what a step costs


@needs_native
def test_the_workers_fill_the_ring_and_then_rest(store):
    with RolloutScheduler(store, 4, 2, prefetch=3, backend="native") as scheduler:
        assert scheduler.ready == 0
        scheduler.admit(0, seed=0)
        for held in (0, 1):
            deadline = time.monotonic() + 30
            while scheduler.ready < 4 - held and time.monotonic() < deadline:
                time.sleep(1e-3)
            assert scheduler.ready == 4 - held
            next(scheduler)
        assert scheduler.waited >= 0


@needs_native
def test_of_small_batches_half_a_ring_is_made_at_a_time(store):
    """One waking serves many batches; what is asked for before that is made on the spot."""

    def ready_is(count):
        deadline = time.monotonic() + 30
        while scheduler.ready != count and time.monotonic() < deadline:
            time.sleep(1e-3)
        return scheduler.ready == count

    with RolloutScheduler(store, 4, 2, prefetch=8, backend="native") as scheduler:
        scheduler.admit(0, seed=0)
        assert ready_is(9)
        taken = drain(scheduler, 3)
        time.sleep(0.05)
        assert scheduler.ready == 6
        taken += drain(scheduler, 2)
        assert ready_is(9)
        held = [next(scheduler) for _ in range(8)]  # one slot goes round: never half of the ring
        taken += drain(scheduler, 3)
        assert len(held) == 8
    assert [steps for _, steps, _ in taken] == [(s,) for s in (0, 1, 2, 3, 4, 13, 14, 15)]
    assert_drawn_by_samplers(taken, store, 4, 2, False, [0], [None])


@needs_native
def test_a_step_copies_and_allocates_nothing(wide_store):
    """A batch is a view of the ring: torch runs no operation that makes or moves data, and the slots are few."""

    operations = set()

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            operations.add(function.overloadpacket.__name__)
            return function(*arguments, **(keywords or {}))

    with RolloutScheduler(wide_store, 8, 4, capacity=2, backend="native") as scheduler:
        scheduler.admit(0, seed=0)
        scheduler.admit(1, seed=1)
        ring = {name: (x.data_ptr(), x.data_ptr() + x.nbytes) for name, x in scheduler.ring.items()}
        with Recorded():
            for _ in range(20):
                with next(scheduler) as batch:
                    for name, column in batch.items():
                        assert ring[name][0] <= column.data_ptr() < ring[name][1] and column.is_contiguous()
                        assert column.untyped_storage().data_ptr() == ring[name][0]
        assert operations <= {"select", "slice"}  # views


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_is_not_refilled_before_its_copy_to_the_device_has_ended(store, backend):
    """Events stand in for those that CUDA records: released batches count as in use until their copies end."""

    class Event:
        ended = waited = False

        def query(self):
            return self.ended

        def synchronize(self):
            self.ended = self.waited = True

    with RolloutScheduler(store, 4, prefetch=1, backend=backend) as scheduler:
        scheduler.admit(0, seed=0)
        events, places = [Event(), Event()], []
        for event in events:
            batch = next(scheduler)
            batch._copied = event
            places.append(batch["obs"].data_ptr())
            batch.release()
        assert places[0] != places[1]
        events[1].ended = True
        with next(scheduler) as batch:
            assert batch["obs"].data_ptr() == places[1] and not events[0].waited
            with next(scheduler) as last:  # only the slot that is still read is left
                assert last["obs"].data_ptr() == places[0] and events[0].waited
                assert (batch.steps, last.steps) == ((2,), (3,))


def test_copies_outlive_the_batch(store):
    with RolloutScheduler(store, 4, 2) as scheduler:
        scheduler.admit(0, seed=0)
        with next(scheduler) as batch:
            kept, expected = batch.to("cpu"), batch["obs"].clone()
        drain(scheduler, 5)
    assert torch.equal(kept["obs"], expected)


# what is refused


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"batch": 0}, "batch must be >= 1, got 0"),
        ({"capacity": 0}, "capacity must be >= 1, got 0"),
        ({"prefetch": 0}, "prefetch must be >= 1, got 0"),
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"horizon": 0}, "horizon must be >= 1, got 0"),
        ({"horizon": 21}, "the longest of the 5 episodes has 20 transitions"),
        ({"partial": True}, "partial windows need a horizon"),
    ],
)
def test_bad_schedulers_are_refused(store, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        RolloutScheduler(store, **{"batch": 4, **arguments})


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_requests_are_refused(store, backend):
    with RolloutScheduler(store, 4, 2, backend=backend) as scheduler:
        scheduler.admit(0, seed=0)
        for arguments, error, reason in [
            ({"policy": 0, "seed": 0}, ValueError, "policy 0 is admitted already"),
            ({"policy": 1, "seed": -1}, ValueError, "seed must be >= 0, got -1"),
            ({"policy": 1, "seed": 0, "step": 5, "end": 5}, ValueError, "below end, got step 5 and end 5"),
            ({"policy": 1, "seed": 0, "episodes": [5]}, StoreError, r"must be in \[0, 5\), got 5"),
            ({"policy": 1, "seed": 0, "episodes": [1]}, StoreError, "the longest of the 1 episodes has 1"),
        ]:
            with pytest.raises(error, match=reason):
                scheduler.admit(**arguments)
        with pytest.raises(ValueError, match="policy 4 is not here"):
            scheduler.retire(4)
        with pytest.raises(ValueError, match="step must be >= 0, got -1"):
            scheduler.seek(-1)
        assert packing(drain(scheduler, 1)) == [((0,), (0,))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_ring_is_refused_instead_of_waited_for(store, backend):
    with RolloutScheduler(store, 4, prefetch=1, backend=backend) as scheduler:
        scheduler.admit(0, seed=0)
        held = [next(scheduler), next(scheduler)]
        with pytest.raises(RingFullError, match="all 2 batches are in use; release one"):
            next(scheduler)
        held[1].release()
        with next(scheduler) as batch:
            assert batch.steps == (2,)
            assert held[0].steps == (0,) and held[0]["obs"].shape == (1, 4, 5)
        with pytest.raises(ValueError, match="this batch is released"):
            held[1]["obs"]
        held[1].release()
