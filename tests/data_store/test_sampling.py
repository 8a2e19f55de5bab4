"""Batches are right, uniform and the same for every backend and number of threads."""

import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pwm_fast import backend as backends
from pwm_fast.data.drawing import Draw
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError, WindowSampler
from pwm_fast.data.philox import philox4x32_10, random_bits, scale_to

S, A = 5, 2
needs_native = pytest.mark.skipif(backends.native is None, reason=f"no native module: {backends.native_reason}")
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# random numbers


@pytest.mark.parametrize(
    "counter, key, words",
    [  # the known answers published with Random123 (Salmon et al. 2011)
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    got = philox4x32_10(np.array(counter, np.uint64)[:, None], key)
    assert got[:, 0].tolist() == words


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**63 - 1))
def test_scaling_is_the_high_half_of_the_product(bits, limit):
    assert int(scale_to(np.array([bits], np.uint64), limit)[0]) == bits * limit >> 64


@needs_native
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(1, 2**63 - 1))
def test_native_draws_are_the_numpy_draws(seed, step, stream, total):
    rows = np.empty(50, np.int64)
    draw = Draw(np.array([0]), np.array([total])).native(backends.native)
    backends.native.draw_rows(seed, stream, step, draw, rows)
    np.testing.assert_array_equal(rows, scale_to(random_bits(seed, stream, step, 50), total))


# what a batch holds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("horizon", [1, 3, 20])
def test_windows_are_pieces_of_single_episodes(store, episode, lengths, horizon, backend):
    batch = WindowSampler(store, horizon, seed=1, backend=backend).windows(step=0, batch=200)
    assert {name: (array.shape, array.dtype.str) for name, array in batch.items()} == {
        "obs": ((horizon + 1, 200, S), "<f4"),
        "action": ((horizon, 200, A), "<f4"),
        "reward": ((horizon, 200), "<f4"),
        "terminated": ((horizon, 200), "|u1"),
        "task": ((200,), "<i4"),
    }
    for b in range(200):
        index, first = divmod(int(batch["obs"][0, b, 0]), 1000)
        source, end = episode(index, lengths[index]), first + horizon
        assert end <= lengths[index]
        np.testing.assert_array_equal(batch["obs"][:, b], source["obs"][first : end + 1].astype(np.float32))
        np.testing.assert_array_equal(batch["action"][:, b], source["action"][first:end].astype(np.float32))
        np.testing.assert_array_equal(batch["reward"][:, b], source["reward"][first:end].astype(np.float32))
        ends_here = index % 2 == 1 and end == lengths[index]
        np.testing.assert_array_equal(batch["terminated"][:, b], [0] * (horizon - 1) + [ends_here])
        assert batch["task"][b] == index % 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("horizon", [1, 3, 20])
def test_partial_windows_start_anywhere_and_are_valid_to_their_episodes_end(store, episode, lengths, horizon, backend):
    sampler = WindowSampler(store, horizon, seed=1, backend=backend, partial=True)
    starts = set()
    for step in range(3):
        batch = sampler.windows(step, batch=500)
        assert batch["valid"].shape == (horizon, 500)
        for b in range(500):
            index, first = divmod(int(batch["obs"][0, b, 0]), 1000)
            source, left = episode(index, lengths[index]), min(lengths[index] - first, horizon)
            starts.add((index, first))
            assert batch["valid"][:, b].tolist() == [h < left for h in range(horizon)]
            np.testing.assert_array_equal(batch["obs"][: left + 1, b], source["obs"][first : first + left + 1])
            np.testing.assert_array_equal(batch["action"][:left, b], source["action"][first : first + left])
            np.testing.assert_array_equal(batch["reward"][:left, b], source["reward"][first : first + left])
            ends = [index % 2 == 1 and first + h + 1 == lengths[index] for h in range(left)]
            assert batch["terminated"][:left, b].tolist() == ends
    rows = [(i, t) for i, length in enumerate(lengths) for t in range(length)]
    # no window may run over the store's end: those of the last episode's end start earlier
    assert {r for r in rows if r[0] < len(lengths) - 1} <= starts


@pytest.mark.parametrize("backend", BACKENDS)
def test_start_states_are_never_an_episodes_last_row(store, lengths, backend):
    obs = WindowSampler(store, 1, backend=backend).start_states(step=0, batch=3000)
    index, row = np.divmod(obs[:, 0].astype(int), 1000)
    assert set(zip(index.tolist(), row.tolist())) == {(i, t) for i, T in enumerate(lengths) for t in range(T)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["windows", "start_states"])
def test_draws_are_uniform(store, lengths, backend, what):
    """Chi-squared over all rows that may be drawn. The seed is fixed, so this cannot fail by chance."""
    sampler, draws = WindowSampler(store, 3, seed=7, backend=backend), 200_000
    if what == "windows":
        obs, places = sampler.windows(0, draws)["obs"][0], [(i, t) for i, T in enumerate(lengths) for t in range(T - 2)]
        assert sampler.num_windows == len(places)
    else:
        obs, places = sampler.start_states(0, draws), [(i, t) for i, T in enumerate(lengths) for t in range(T)]
        assert sampler.num_start_states == len(places)
    drawn, counts = np.unique(obs[:, 0].astype(int), return_counts=True)
    assert drawn.tolist() == [1000 * i + t for i, t in places]
    expected = draws / len(places)
    chi_squared = np.square(counts - expected).sum() / expected
    degrees = len(places) - 1
    assert chi_squared < degrees + 4 * np.sqrt(2 * degrees)


# the same everywhere


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    horizon=st.integers(1, 40),
    batch=st.integers(1, 70),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40),
)
@needs_native
def test_native_and_numpy_agree_bit_for_bit(tmp_path_factory, write, lengths, horizon, batch, seed, step):
    store = write(tmp_path_factory.mktemp("agree") / "s", lengths)
    horizon = min(horizon, max(lengths))
    native, plain = (WindowSampler(store, horizon, seed=seed, backend=name) for name in ("native", "torch"))
    assert_same(native.windows(step, batch), plain.windows(step, batch))
    np.testing.assert_array_equal(native.start_states(step, batch), plain.start_states(step, batch))


ISAS = backends.native.available_isas() if backends.native is not None else []
WIDTHS = [(1, 1), (3, 9), (4, 2), (5, 4), (8, 7), (11, 16), (17, 3), (76, 21)]  # of obs and actions
SHARES = [Fraction(1, 4), Fraction(3, 4)]


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_instruction_set_copies_rows_of_any_width(tmp_path, isa, widths):
    """Widths below, at and above a vector's; horizons and batches that are no multiple of what goes side by side."""
    before, random, (S, A) = backends.native.isa(), np.random.default_rng(0), widths
    with EpisodeWriter(tmp_path / "s", S, A, task_names=["t"]) as writer:
        for n in (40, 21, 90):
            writer.add(random.normal(size=(n + 1, S)), random.normal(size=(n, A)), random.normal(size=n), n == 21)
    store = EpisodeStore.open(tmp_path / "s")
    try:
        backends.native.set_isa(isa)
        for horizon, batch in ((1, 1), (3, 7), (16, 8), (17, 33), (2, 300)):
            native, plain = (WindowSampler(store, horizon, seed=3, backend=name) for name in ("native", "torch"))
            assert_same(native.windows(1, batch), plain.windows(1, batch))
            np.testing.assert_array_equal(native.start_states(1, batch), plain.start_states(1, batch))
    finally:
        backends.native.set_isa(before)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "seed, stream, step", [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**64 - 1), (3 << 32 | 5, 1, 7 << 32)]
)
def test_every_instruction_set_draws_the_same_rows(isa, seed, stream, step):
    """Counts below, at and above a vector's and a block's; the groups are chosen by the second half of the bits."""
    before, draw = backends.native.isa(), Draw(np.array([40, 3]), np.array([5, 900]), np.arange(3), SHARES)
    try:
        backends.native.set_isa(isa)
        for count in (1, 7, 8, 63, 64, 65, 200):
            rows = np.full(count + 1, -1)  # what follows must stay as it is
            backends.native.draw_rows(seed, stream, step, draw.native(backends.native), rows[:-1])
            np.testing.assert_array_equal(rows[:-1], draw.rows(seed, stream, step, count, None))
            assert rows[-1] == -1
    finally:
        backends.native.set_isa(before)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_every_instruction_set_notices_every_number_that_is_not_finite(tmp_path, isa, bad):
    """One by one, at every place of a window of 2 transitions whose rows are wider than a vector and a half."""
    before, (S, A, T) = backends.native.isa(), (13, 6, 2)
    with EpisodeWriter(tmp_path / "s", S, A, task_names=["t"]) as writer:
        writer.add(np.full((T + 1, S), 3e38), np.full((T, A), -3e38), np.full(T, 3e38), False)
    store, rows = EpisodeStore.open(tmp_path / "s"), np.zeros(9, np.int64)
    columns = {name: np.array(getattr(store, name)) for name in ("obs", "action", "reward", "terminated", "task")}
    out = [array for name, array in WindowSampler(store, T).windows(0, 9).items()]
    try:
        backends.native.set_isa(isa)
        assert backends.native.gather_windows(*columns.values(), rows, T, 1, *out) == -1
        for name, count in (("obs", T + 1), ("action", T), ("reward", T)):
            values = columns[name][:count].reshape(-1)  # a view
            for place in range(len(values)):
                values[place], good = bad, values[place]
                assert backends.native.gather_windows(*columns.values(), rows, T, 1, *out) == 0, (name, place)
                values[place] = good
    finally:
        backends.native.set_isa(before)


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory) -> EpisodeStore:
    """Rows of 4 kB, so that a batch is large enough to be shared between threads."""
    path, rng = tmp_path_factory.mktemp("wide") / "s", np.random.default_rng(0)
    with EpisodeWriter(path, 1000, 24, task_names=["t"]) as writer:
        for length in (300, 17, 500):
            writer.add(
                rng.normal(size=(length + 1, 1000)), rng.normal(size=(length, 24)), rng.normal(size=length), True
            )
    return EpisodeStore.open(path)


@needs_native
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_change_a_batch(wide_store, threads):
    one, many = (WindowSampler(wide_store, 16, seed=5, threads=n, backend="native") for n in (1, threads))
    for batch in (1, 2, 97, 256):
        assert_same(one.windows(3, batch), many.windows(3, batch))
        np.testing.assert_array_equal(one.start_states(3, 8 * batch), many.start_states(3, 8 * batch))


def test_batches_depend_on_seed_and_step_only(store):
    sampler = WindowSampler(store, 2, seed=4)
    first, second = sampler.windows(0, 64), sampler.windows(1, 64)
    assert not np.array_equal(first["obs"], second["obs"])
    assert not np.array_equal(first["obs"], WindowSampler(store, 2, seed=5).windows(0, 64)["obs"])
    assert_same(first, sampler.windows(0, 64))  # not on what was drawn in between
    assert_same({"obs": first["obs"][:, :10]}, {"obs": sampler.windows(0, 10)["obs"]})  # a larger batch only continues


def test_out_is_filled_and_returned(store):
    sampler = WindowSampler(store, 2, seed=4)
    fresh = sampler.windows(9, 8)
    out = {name: np.full_like(array, 77) for name, array in fresh.items()}
    assert sampler.windows(9, 8, out=out) is out
    assert_same(out, fresh)
    states = np.empty((8, S), np.float32)
    assert sampler.start_states(9, 8, out=states) is states


@needs_native
@pytest.mark.parametrize("what", ["gather_windows", "gather_rows"])
def test_the_lock_is_released_while_gathering(wide_store, what):
    """Python is told never to take its lock from a running thread, so another one moves only while the lock is free."""
    rows, many = np.zeros(2048, np.int64), np.zeros(17 * 2048, np.int64)
    columns = [getattr(wide_store, name) for name in ("obs", "action", "reward", "terminated", "task")]
    out = list(WindowSampler(wide_store, 16).windows(0, 2048).values())
    gather = {
        "gather_windows": lambda: backends.native.gather_windows(*columns, rows, 16, 1, *out),
        "gather_rows": lambda: backends.native.gather_rows(wide_store.obs, many, 1, out[0].reshape(-1, 1000)),
    }[what]
    count, running, interval = 0, True, sys.getswitchinterval()

    def counting():
        nonlocal count
        while running:
            count += 1
            time.sleep(1e-5)

    sys.setswitchinterval(1000.0)
    thread = threading.Thread(target=counting)
    try:
        thread.start()
        moved, deadline = False, time.monotonic() + 60
        while not moved and time.monotonic() < deadline:  # a busy machine may not run the other thread at once
            before = count
            gather()
            moved = count > before
            time.sleep(1e-3)
    finally:
        sys.setswitchinterval(interval)
        running = False
        thread.join()
    assert moved


# what is refused


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("column, row", [("obs", 12), ("action", 12), ("reward", 12)])
def test_nan_in_a_window_is_refused_with_its_place(store, column, row, backend):
    file = {"obs": "obs.f32", "action": "action.f32", "reward": "reward.f32"}[column]
    values = np.memmap(store.path / file, "<f4", "r+", shape=getattr(store, column).shape)
    values[row] = np.nan
    values.flush()
    sampler = WindowSampler(store, 3, backend=backend)
    with pytest.raises(StoreError, match=rf"NaN or infinity: {column}, row {row} \(episode 2\)"):
        sampler.windows(0, 500)
    if column == "obs":
        with pytest.raises(StoreError, match="NaN or infinity: obs, row 12"):
            sampler.start_states(0, 500)
    else:
        sampler.start_states(0, 500)


def test_short_episodes_give_no_window(store, lengths):
    sampler = WindowSampler(store, 7)
    assert sampler.num_windows == sum(max(0, T - 6) for T in lengths)
    episodes = np.floor_divide(sampler.windows(0, 300)["obs"][0, :, 0], 1000)
    assert set(episodes.astype(int)) == {0, 2, 4}


def test_only_the_chosen_episodes_are_drawn(store):
    sampler = WindowSampler(store, 2, episodes=[3, 0])
    assert set(np.floor_divide(sampler.windows(0, 300)["obs"][0, :, 0], 1000).astype(int)) == {0, 3}
    assert set(np.floor_divide(sampler.start_states(0, 300)[:, 0], 1000).astype(int)) == {0, 3}


@pytest.mark.parametrize(
    "arguments, error, reason",
    [
        ({"horizon": 0}, ValueError, "horizon must be >= 1, got 0"),
        ({"threads": 0}, ValueError, "threads must be >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be < 2\^64"),
        ({"horizon": 21}, StoreError, "the longest of the 5 episodes has 20 transitions"),
        ({"horizon": 4, "episodes": [1, 3]}, StoreError, "the longest of the 2 episodes has 3"),
        ({"episodes": []}, StoreError, "at least one episode"),
        ({"episodes": [0, 5]}, StoreError, r"must be in \[0, 5\), got 5"),
        ({"backend": "fortran"}, ValueError, "must be one of native, triton, torch"),
    ],
)
def test_bad_samplers_are_refused(store, arguments, error, reason):
    with pytest.raises(error, match=reason):
        WindowSampler(store, **{"horizon": 2, **arguments})


@pytest.mark.parametrize("step, batch", [(-1, 4), (0, 0)])
def test_bad_requests_are_refused(store, step, batch):
    sampler = WindowSampler(store, 2)
    for draw in (sampler.windows, sampler.start_states):
        with pytest.raises(ValueError, match="step must be >= 0 and batch >= 1"):
            draw(step, batch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["shape", "dtype", "order", "missing"])
def test_an_unfit_out_is_refused(store, change, backend):
    sampler = WindowSampler(store, 2, backend=backend)
    out = sampler.windows(0, 8)
    obs = out.pop("obs")
    if change != "missing":
        out["obs"] = {"shape": obs[:2], "dtype": obs.astype(np.float64), "order": np.asfortranarray(obs)}[change]
    with pytest.raises(ValueError, match="obs"):
        sampler.windows(0, 8, out=out)


@needs_native
def test_native_checks_what_it_is_given(store):
    """Rows outside the store never become reads outside its memory."""
    columns = [getattr(store, name) for name in ("obs", "action", "reward", "terminated", "task")]
    sampler = WindowSampler(store, 2)
    out = list(sampler.windows(0, 1).values())
    for row in (-1, len(store.obs) - 2, 2**63 - 1):
        with pytest.raises(ValueError, match="outside the store"):
            backends.native.gather_windows(*columns, np.array([row]), 2, 1, *out)
    for row in (-1, len(store.obs), 2**63 - 1):
        with pytest.raises(ValueError, match="outside the store"):
            backends.native.gather_rows(store.obs, np.array([row]), 1, out[0][0])
