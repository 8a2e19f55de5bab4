"""What may be drawn: of which tasks, and in which proportion."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pwm_fast import backend as backends
from pwm_fast.data.drawing import Draw, choose
from pwm_fast.data.episodes import StoreError, WindowSampler
from pwm_fast.data.prefetching import PrefetchingSampler
from pwm_fast.data.scheduler import RolloutScheduler

needs_native = pytest.mark.skipif(backends.native is None, reason=f"no native module: {backends.native_reason}")
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]
LENGTHS = [7, 4, 12, 3, 20, 3, 5]  # episode i is of task i % 3: those of task 0 are long


@pytest.fixture
def many(tmp_path, write):
    """Episodes of three tasks, task-0 to task-2."""
    return write(tmp_path / "many", LENGTHS, tasks=3)


def places(obs):
    """(episode, row of it) of observations [B, S]; see conftest."""
    return np.divmod(obs[:, 0].astype(int), 1000)


def assert_frequencies(counts, probabilities):
    """Chi-squared, at four standard deviations; with fixed seeds, so this cannot fail by chance."""
    expected = np.asarray(probabilities) * counts.sum()
    chi_squared, degrees = (np.square(counts - expected) / expected).sum(), len(counts) - 1
    assert chi_squared < degrees + 4 * np.sqrt(2 * degrees)


# in which proportion


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options, share",
    [
        ({"balanced": True}, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}),
        ({"balanced": True, "tasks": ["task-2", 0]}, {0: 1 / 2, 2: 1 / 2}),
        ({"tasks": {"task-1": 3, 0: 0.5, 2: 1.5}}, {0: 0.1, 1: 0.6, 2: 0.3}),
    ],
)
@pytest.mark.parametrize("what", ["windows", "partial", "start_states"])
def test_tasks_have_their_shares_and_their_rows_are_equally_likely(many, backend, options, share, what):
    sampler = WindowSampler(many, 3, seed=3, backend=backend, partial=what == "partial", **options)
    if what == "start_states":
        obs = sampler.start_states(0, 100_000)
    else:
        obs = sampler.windows(0, 100_000)["obs"][0]
    # a partial window may not run over the store's end: the last three starts of the last episode are one
    probability = {}
    for i, length in enumerate(LENGTHS):
        rows = length - 2 if what == "windows" else length
        total = sum(n - 2 if what == "windows" else n for j, n in enumerate(LENGTHS) if j % 3 == i % 3)
        for row in range(rows):
            row = min(row, length - 3) if what == "partial" and i == len(LENGTHS) - 1 else row
            probability[i, row] = probability.get((i, row), 0) + share.get(i % 3, 0) / total
    probability = {place: p for place, p in probability.items() if p > 0}
    drawn, counts = np.unique(np.stack(places(obs), 1), axis=0, return_counts=True)
    assert [tuple(place) for place in drawn.tolist()] == sorted(probability)
    assert_frequencies(counts, [probability[tuple(place)] for place in drawn.tolist()])


def test_without_weights_every_window_of_the_tasks_is_equally_likely(many):
    sampler = WindowSampler(many, 3, tasks=[0, "task-2"])
    assert sampler.num_windows == sum(n - 2 for i, n in enumerate(LENGTHS) if i % 3 != 1)
    assert set(sampler.windows(0, 500)["task"].tolist()) == {0, 2}


# of which tasks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("balanced", [False, True])
def test_one_task_is_the_choice_of_its_episodes(many, backend, balanced):
    own = [i for i in range(len(LENGTHS)) if i % 3 == 1]
    named, chosen = (
        WindowSampler(many, 3, seed=2, backend=backend, **options)
        for options in ({"tasks": "task-1", "balanced": balanced}, {"episodes": own})
    )
    for name, array in named.windows(4, 90).items():
        np.testing.assert_array_equal(array, chosen.windows(4, 90)[name])
    np.testing.assert_array_equal(named.start_states(4, 90), chosen.start_states(4, 90))


def test_tasks_are_those_of_the_chosen_episodes(many):
    """A training split keeps its validation episodes out, whatever the task."""
    sampler = WindowSampler(many, 2, episodes=[0, 1, 4, 5], tasks=["task-0", "task-1"], balanced=True)
    assert set(places(sampler.start_states(0, 500))[0].tolist()) == {0, 1, 4}
    assert choose(many, [0, 1, 4], balanced=True).group.tolist() == [0, 1, 3]


# the same everywhere


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(4, 40), min_size=3, max_size=9),
    weights=st.none() | st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=3),
    partial=st.booleans(),
    batch=st.integers(1, 70),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40),
)
@needs_native
def test_native_numpy_and_scheduler_agree_bit_for_bit(
    tmp_path_factory, write, lengths, weights, partial, batch, seed, step
):
    store = write(tmp_path_factory.mktemp("agree") / "s", lengths, tasks=3)
    options = {"balanced": True} if weights is None else {"tasks": dict(enumerate(weights))}
    native, plain = (
        WindowSampler(store, 4, seed=seed, backend=name, partial=partial, **options) for name in ("native", "torch")
    )
    windows, starts = plain.windows(step, batch), plain.start_states(step, batch)
    for name, array in native.windows(step, batch).items():
        np.testing.assert_array_equal(array, windows[name])
    np.testing.assert_array_equal(native.start_states(step, batch), starts)
    for horizon, expected in ((4, windows), (None, {"obs": starts})):
        with RolloutScheduler(store, batch, horizon, partial=partial and horizon is not None) as scheduler:
            scheduler.admit(0, seed, step=step, **options)
            with next(scheduler) as got:
                for name, column in got.items():
                    np.testing.assert_array_equal(column[0].numpy(), expected[name])


@needs_native
@given(
    counts=st.lists(st.integers(1, 2**40), min_size=4, max_size=4),
    share=st.fractions(0, 1).filter(lambda x: 0 < x < 1),
    seed=st.integers(0, 2**64 - 1),
)
def test_large_counts_and_any_share_are_drawn_alike(counts, share, seed):
    draw = Draw(np.arange(4) * 2**41, np.array(counts), np.array([0, 2, 4]), [share, 1 - share])
    rows = draw.rows(seed, 0, 1, 50, None)
    np.testing.assert_array_equal(draw.rows(seed, 0, 1, 50, backends.native), rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_policies_of_different_tasks_share_batches_and_a_saved_state_goes_on(many, backend):
    """Extraction of many tasks from one store: policy p draws from task p's episodes."""

    def make():
        return RolloutScheduler(many, 30, capacity=3, backend=backend)

    chosen = [{"tasks": "task-0"}, {"tasks": [1]}, {"tasks": {2: 1.0}, "episodes": [5]}]
    with make() as scheduler, make() as other:
        for policy, options in enumerate(chosen):
            scheduler.admit(policy, seed=policy, **options)
        next(scheduler).release()
        other.load_state_dict(scheduler.state_dict())
        with next(scheduler) as batch, next(other) as again:
            assert torch.equal(batch["obs"], again["obs"]) and again.steps == (1, 1, 1)
            for policy, options in enumerate(chosen):
                sampler = WindowSampler(many, 1, seed=policy, **options)
                np.testing.assert_array_equal(batch["obs"][policy].numpy(), sampler.start_states(1, 30))
                assert {int(i) % 3 for i in places(batch["obs"][policy].numpy())[0]} == {policy}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefetching_sampler_draws_the_same(many, backend):
    options = {"horizon": 3, "seed": 1, "backend": backend, "balanced": True, "tasks": ["task-0", "task-2"]}
    plain, ahead = WindowSampler(many, **options), PrefetchingSampler(many, **options)
    for step in range(4):
        for name, array in ahead.windows(step, 20).items():
            np.testing.assert_array_equal(array, plain.windows(step, 20)[name])
        np.testing.assert_array_equal(ahead.start_states(step, 20), plain.start_states(step, 20))


# what is refused


@pytest.mark.parametrize(
    "options, error, reason",
    [
        ({"tasks": "tusk-1"}, ValueError, "unknown task 'tusk-1'; did you mean 'task-1'"),
        ({"tasks": 3}, ValueError, r"task ids must be in \[0, 3\), got 3"),
        ({"tasks": []}, ValueError, "at least one task, got none"),
        ({"tasks": ["task-1", 1]}, ValueError, "task 'task-1' is given twice"),
        ({"tasks": {0: 0.0}}, ValueError, "weight of task 0 must be > 0 and finite, got 0.0"),
        ({"tasks": {0: float("nan")}}, ValueError, "must be > 0 and finite, got nan"),
        ({"tasks": {0: float("inf")}}, ValueError, "must be > 0 and finite, got inf"),
        ({"tasks": {0: 1.0}, "balanced": True}, ValueError, "cannot be balanced too"),
        ({"tasks": "task-1", "episodes": [0, 2]}, StoreError, "none of the 2 chosen episodes is of task 'task-1'"),
        ({"balanced": True, "horizon": 8}, StoreError, "the longest of the 3 episodes of task 'task-0' has 7"),
    ],
)
def test_bad_choices_are_refused(many, options, error, reason):
    with pytest.raises(error, match=reason):
        WindowSampler(many, **{"horizon": 2, **options})


@needs_native
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"offsets": [0, 5, 3]}, "offsets of a draw must not decrease"),
        ({"offsets": [1, 2, 3]}, "begin at 0"),
        ({"offsets": [0, 3]}, r"offsets \[E\+1\]"),
        ({"group": [0, 1]}, "must cover its episodes"),
        ({"group": [0, 2, 2]}, "must count at least one window"),
        ({"group": [0, 9, 2]}, "must count at least one window"),
        ({"offsets": [0, 0, 3]}, "must count at least one window"),
        ({"threshold": []}, "with G-1 thresholds"),
    ],
)
def test_native_checks_what_it_draws_from(change, reason):
    parts = {"offsets": [0, 2, 3], "first_row": [0, 9], "group": [0, 1, 2]} | change
    arrays = {name: np.array(values, np.int64) for name, values in parts.items() if name != "threshold"}
    with pytest.raises(ValueError, match=reason):
        backends.native.Draw(**arrays, threshold=np.array(change.get("threshold", [7]), np.uint64))
