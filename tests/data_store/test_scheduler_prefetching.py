"""`PrefetchingSampler` is a `WindowSampler`, only earlier."""

import gc

import numpy as np
import pytest
import torch

from pwm_fast import backend as backends
from pwm_fast.data.episodes import StoreError, WindowSampler
from pwm_fast.data.prefetching import PrefetchingSampler

pytestmark = pytest.mark.timeout(60)
needs_native = pytest.mark.skipif(backends.native is None, reason=f"no native module: {backends.native_reason}")
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("partial", [False, True])
def test_any_order_of_steps_gives_the_samplers_batches(store, backend, partial):
    arguments = {"horizon": 3, "episodes": [0, 2, 4], "seed": 5, "partial": partial, "backend": backend}
    plain, ahead = WindowSampler(store, **arguments), PrefetchingSampler(store, **arguments)
    for step, batch in [(0, 8), (1, 8), (2, 8), (3, 8), (9, 8), (10, 8), (11, 8), (11, 8), (12, 5), (13, 5), (0, 5)]:
        assert_same(ahead.windows(step, batch), plain.windows(step, batch))
        np.testing.assert_array_equal(ahead.start_states(step, batch), plain.start_states(step, batch))
    out = plain.windows(0, 5)
    assert ahead.windows(1, 5, out=out) is out
    assert_same(out, plain.windows(1, 5))
    ahead.close()
    assert_same(ahead.windows(2, 5), plain.windows(2, 5))
    assert_same(ahead.with_seed(9).windows(3, 5), plain.with_seed(9).windows(3, 5))


@needs_native
def test_batches_in_sequence_are_views_of_few_buffers(store):
    """Made ahead from the second on; more batches than the ring has slots, so slots return when arrays are dropped."""
    ahead, places = PrefetchingSampler(store, 2, prefetch=2), set()
    for step in range(12):
        batch = ahead.windows(step, 6)
        if step > 0:
            places.add(batch["obs"].ctypes.data)
        del batch
    assert 1 <= len(places) <= 3


@needs_native
@pytest.mark.parametrize("keep", ["arrays", "views", "tensors"])
def test_what_is_kept_is_never_overwritten(store, keep):
    """Whatever refers to a batch holds its slot; with every slot held, batches come in memory of their own."""
    plain, ahead, kept = WindowSampler(store, 2, seed=1), PrefetchingSampler(store, 2, seed=1, prefetch=1), []
    how = {"arrays": lambda x: x, "views": lambda x: x[:, ::2][..., 1:], "tensors": torch.as_tensor}[keep]
    for step in range(10):
        kept.append(how(ahead.windows(step, 6)["obs"]))
        gc.collect()
    for step, array in enumerate(kept):
        np.testing.assert_array_equal(np.asarray(array), how(plain.windows(step, 6)["obs"]))
    del ahead
    gc.collect()
    np.testing.assert_array_equal(np.asarray(kept[3]), how(plain.windows(3, 6)["obs"]))


@needs_native
def test_bad_data_is_refused_with_its_place(store):
    values = np.memmap(store.path / "obs.f32", "<f4", "r+", shape=store.obs.shape)
    ahead = PrefetchingSampler(store, 3)
    ahead.windows(0, 500)
    values[12] = np.nan
    with pytest.raises(StoreError, match=r"NaN or infinity: obs, row 12 \(episode 2\)"):
        ahead.windows(1, 500)


def test_prefetch_must_be_positive(store):
    with pytest.raises(ValueError, match="prefetch must be >= 1, got 0"):
        PrefetchingSampler(store, 3, prefetch=0)
