"""Policies of one batch may draw from several stores; their rows come in one width."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pwm_fast import backend as backends
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError, WindowSampler
from pwm_fast.data.scheduler import RolloutScheduler
from pwm_fast.data.task_table import fitted

BACKENDS = ["native", "torch"] if backends.native is not None else ["torch"]
WIDTHS = [(5, 2), (1, 1), (19, 7)]
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> list[EpisodeStore]:
    """Three stores of different widths and lengths, of random numbers."""
    folder, rng, out = tmp_path_factory.mktemp("several"), np.random.default_rng(0), []
    for number, (obs_dim, action_dim) in enumerate(WIDTHS):
        with EpisodeWriter(folder / str(number), obs_dim, action_dim, task_names=["a", "b"]) as writer:
            for i, n in enumerate((6 + number, 9, 14)):
                obs, action = rng.normal(size=(n + 1, obs_dim)), rng.uniform(-1, 1, (n, action_dim))
                writer.add(obs, action, rng.normal(size=n), i % 2 == 1, task=i % 2)
        out.append(EpisodeStore.open(folder / str(number)))
    return out


def expected(sampler, horizon, step, batch, widths):
    """What a plain sampler draws, padded or cut by numpy."""
    drawn = sampler.windows(step, batch) if horizon else {"obs": sampler.start_states(step, batch)}
    for name, width in zip(("obs", "action"), widths):
        if name in drawn:
            drawn[name] = fitted(drawn[name], width)
    return drawn


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    horizon=st.none() | st.integers(1, 6),
    partial=st.booleans(),
    widths=st.none() | st.tuples(st.integers(1, 24), st.integers(1, 9)),
    batch=st.integers(1, 40),
    capacity=st.integers(1, 4),
    threads=st.integers(1, 3),
    policies=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**64 - 1), st.integers(1, 3)), max_size=6),
    backend=st.sampled_from(BACKENDS),
)
def test_rows_are_the_samplers_of_their_stores(
    stores, horizon, partial, widths, batch, capacity, threads, policies, backend
):
    """Rows move up as policies leave, so each place of the ring holds rows of several widths in turn."""
    partial = partial and horizon is not None
    own = {} if widths is None else {"obs_dim": widths[0], "action_dim": widths[1]}
    with RolloutScheduler(
        stores, batch, horizon, capacity, threads=threads, partial=partial, backend=backend, **own
    ) as s:
        for i, (store, seed, count) in enumerate(policies):
            s.admit(i, seed, end=count, tasks=i % 2, store=store)
        for drawn in s:
            with drawn:
                for p, (policy, step) in enumerate(zip(drawn.policies, drawn.steps)):
                    store, seed, _ = policies[policy]
                    sampler = WindowSampler(
                        stores[store], horizon or 1, seed=seed, tasks=policy % 2, partial=partial, backend="torch"
                    )
                    plain = expected(sampler, horizon, step, batch, widths or (19, 7))
                    assert drawn.keys() == plain.keys()
                    for name, array in plain.items():
                        np.testing.assert_array_equal(drawn[name][p].numpy(), array, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_saved_state_knows_each_policys_store(stores, backend):
    options = {"capacity": 3, "backend": backend}
    with RolloutScheduler(stores, 4, **options) as first, RolloutScheduler(stores, 4, **options) as second:
        for policy, store in enumerate((2, 0, 2)):
            first.admit(policy, seed=policy, store=store, tasks="b")
        next(first).release()
        second.load_state_dict(first.state_dict())
        for _ in range(3):
            with next(first) as a, next(second) as b:
                assert a.steps == b.steps and (a["obs"] == b["obs"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_data_is_told_with_its_store(tmp_path, write, backend):
    good, bad = write(tmp_path / "good", [9, 9]), write(tmp_path / "bad", [9, 9])
    np.memmap(bad.path / "obs.f32", "<f4", "r+", shape=bad.obs.shape)[3] = np.inf
    for width in (5, 8, 1):  # whole, padded, and where the broken value itself is left out
        np.memmap(bad.path / "obs.f32", "<f4", "r+", shape=bad.obs.shape)[3, :-1] = 0
        with RolloutScheduler([good, bad], 300, capacity=2, backend=backend, obs_dim=width) as scheduler:
            scheduler.admit(0, seed=0, store=0)
            scheduler.admit(1, seed=0, store=1)
            with pytest.raises(StoreError, match=r"bad holds NaN or infinity: obs, row 3 \(episode 0\)"):
                next(scheduler)
            scheduler.retire(1)
            with next(scheduler) as batch:
                assert batch.policies == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_truncated_file_is_told_with_its_store(tmp_path, write, backend):
    """Policies of the other store go on."""
    whole, cut = write(tmp_path / "whole", [9, 9]), write(tmp_path / "cut", [9, 9])
    with RolloutScheduler([whole, cut], 4, capacity=2, backend=backend) as scheduler:
        with open(cut.path / "obs.f32", "r+b") as file:
            file.truncate(8)
        scheduler.admit(0, seed=0, store=0)
        scheduler.admit(1, seed=0, store=1)
        with pytest.raises(StoreError, match=r"cut/obs\.f32 was truncated while in use"):
            next(scheduler)
        scheduler.retire(1)
        with next(scheduler) as batch:
            assert batch.policies == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_policies_are_admitted_all_or_none(stores, backend):
    samplers = {i: WindowSampler(stores[i], 1, seed=i, backend="torch") for i in range(3)}
    with RolloutScheduler(stores, 4, capacity=4, backend=backend) as scheduler:
        scheduler.admit(1, seed=9)
        with pytest.raises(ValueError, match="policy 1 is admitted already"):
            scheduler.admit_samplers(samplers)
        assert [p.policy for p in scheduler.policies()] == [1]
        scheduler.retire(1)
        scheduler.admit_samplers(samplers, step=5)
        assert [(p.policy, p.seed, p.step) for p in scheduler.policies()] == [(0, 0, 5), (1, 1, 5), (2, 2, 5)]


def test_what_is_refused(stores, store):
    for arguments, reason in [
        ({"stores": []}, "at least one episode store, got none"),
        ({"obs_dim": 0}, "obs_dim must be >= 1, got 0"),
        ({"action_dim": -1}, "action_dim must be >= 1, got -1"),
    ]:
        with pytest.raises(ValueError, match=reason):
            RolloutScheduler(**{"stores": stores, "batch": 4, **arguments})
    with RolloutScheduler(stores, 4, 3) as scheduler:
        with pytest.raises(ValueError, match=r"store must be in \[0, 3\), got 3"):
            scheduler.admit(0, seed=0, store=3)
        with pytest.raises(ValueError, match="is not one of the scheduler's"):
            scheduler.admit_samplers({0: WindowSampler(store, 3)})
        with pytest.raises(ValueError, match="have horizon 3 and partial False, the sampler's 2 and False"):
            scheduler.admit_samplers({0: WindowSampler(stores[0], 2)})
