"""The native scheduler against gathers by numpy and torch, beside the machine's copy bandwidth.

    pytest bench/test_scheduler.py -s                         # a store of 0.1 GB, in the page cache
    PWM_FAST_BENCH_LARGE=/path pytest bench/test_scheduler.py -s   # and 4 GB, dropped from it (written to that folder)

Episodes have the humanoid's shape. numpy and torch are given the drawn rows for nothing, "torch drawing" finds them;
none of them looks for NaN. The scheduler draws and looks, and its CPU seconds are those of all its threads. "copy"
writes one buffer over and over, which stays in the core's cache where it is not too large for it; "into a ring" writes
as many buffers in turn as the scheduler has slots.
Everything in turn, the fastest of each; cold reads are timed by the clock, because they wait.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pwm_fast import backend
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, WindowSampler
from pwm_fast.data.layout import COLUMNS
from pwm_fast.data.scheduler import RolloutScheduler
from pwm_fast.data.start_states import StartStates
from pwm_fast.learning.extraction import PRESETS, Extraction
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

pytestmark = [
    pytest.mark.skipif(backend.native is None, reason=f"no native module: {backend.native_reason}"),
    pytest.mark.benchmark(timer=time.process_time, min_rounds=3, max_time=0.1, warmup=False),
]
OBS, ACTION, LENGTH = 76, 21, 1000
ROW_BYTES = 4 * (OBS + ACTION + 1 + 1) + 1
BATCH = 64  # start states of a policy
LARGE = "PWM_FAST_BENCH_LARGE"
DRAWN = 64, 2**25  # steps whose rows are given to numpy and torch, their bytes: fewer would come from the cache
SHAPES = [  # policies, windows of each, horizon (None: start states)
    pytest.param(1, 256, 16, id="windows-1x256"),
    pytest.param(8, 64, 16, id="windows-8x64"),
    pytest.param(1, 64, None, id="starts-1x64"),
    pytest.param(80, 64, None, id="starts-80x64"),
]


def write_store(path: Path, size: float) -> EpisodeStore:
    """Episodes of 1000 random transitions, `size` bytes in all."""
    random = np.random.default_rng(0)
    obs = random.normal(size=(LENGTH + 1, OBS)).astype(np.float32)
    action = random.uniform(-1, 1, (LENGTH, ACTION)).astype(np.float32)
    with EpisodeWriter(path, OBS, ACTION, task_names=["humanoid"]) as writer:
        for i in range(max(1, round(size / ROW_BYTES / (LENGTH + 1)))):
            writer.add(obs + np.float32(i), action, action[:, 0], terminated=False)
    return EpisodeStore.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """0.1 GB, read once."""
    store = write_store(tmp_path_factory.mktemp("bench") / "small", 0.1e9)
    store.verify()
    return store


def tensor(column: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the store is read-only
        return torch.from_numpy(column)


class Case:
    """One shape of batch, and the ways to gather it: each method makes one batch of step `step`."""

    def __init__(self, store: EpisodeStore, policies: int, batch: int, horizon: int | None, threads: int) -> None:
        self.store, self.horizon, self.batch = store, horizon, batch
        self.sampler = WindowSampler(store, horizon or 1, backend="native")
        self.columns = {name: getattr(store, name) for name in ("obs", "action", "reward", "terminated")}
        self.columns = self.columns if horizon else {"obs": store.obs}
        self.tensors = {name: tensor(np.asarray(column)) for name, column in self.columns.items()}
        self.scheduler = RolloutScheduler(store, batch, horizon, policies, threads=threads, backend="native")
        for policy in range(policies):
            self.scheduler.admit(policy, seed=policy)
        self.bytes = sum(x[0].nbytes for x in self.scheduler.ring.values())
        self.draw_from(0)
        draw = self.sampler.window_draw if horizon else self.sampler.start_draw
        self.cumulative, self.first_row = torch.from_numpy(draw.cumulative), torch.from_numpy(draw.first_row)
        self.policies, self.total = policies, draw.total
        self.windows = policies * batch

    def draw_from(self, step: int) -> None:
        """Draws the rows that numpy and torch are given."""
        self.drawn = [self.rows(step + i) for i in range(max(DRAWN[0], DRAWN[1] // self.bytes))]

    def rows(self, step: int) -> dict[str, Any]:
        """Indices [P, H+1, B] of a step."""
        draw, stream = (self.sampler.window_draw, 0) if self.horizon else (self.sampler.start_draw, 1)
        count = self.scheduler.capacity
        first = np.stack([draw.rows(p, stream, step, self.batch, backend.native) for p in range(count)])
        index = first[:, None] + np.arange((self.horizon or 0) + 1)[:, None]
        every, before = np.ascontiguousarray(index), np.ascontiguousarray(index[:, : self.horizon])
        parts = {name: every if name == "obs" else before for name in self.columns}
        return {"numpy": parts, "torch": {name: torch.from_numpy(part) for name, part in parts.items()}, "first": first}

    def numpy(self, step: int) -> dict[str, np.ndarray]:
        drawn = self.drawn[step % len(self.drawn)]
        out = {name: column[drawn["numpy"][name]] for name, column in self.columns.items()}
        return out | ({"task": self.store.task[drawn["first"]]} if self.horizon else {})

    def torch(self, step: int) -> dict[str, torch.Tensor]:
        index = self.drawn[step % len(self.drawn)]["torch"]
        return {name: column[index[name]] for name, column in self.tensors.items()}

    def torch_drawing(self, step: int) -> dict[str, torch.Tensor]:
        drawn = torch.randint(self.total, (self.policies, 1, self.batch))
        episode = torch.searchsorted(self.cumulative, drawn, right=True) - 1
        rows = self.first_row[episode] + drawn - self.cumulative[episode]
        index = rows + torch.arange((self.horizon or 0) + 1)[:, None]  # [P, H+1, B]
        return {
            name: column[index if name == "obs" else index[:, : self.horizon]] for name, column in self.tensors.items()
        }

    def native(self, step: int) -> None:
        next(self.scheduler).release()

    def check(self) -> None:
        """All three hold the same numbers."""
        for step in range(3):
            plain, other = self.numpy(step), self.torch(step)
            with self.scheduler.at(step) as batch:
                for name, column in batch.items():
                    expected = plain[name] if self.horizon else plain[name][:, 0]
                    np.testing.assert_array_equal(column.numpy(), expected)
            for name, column in other.items():
                np.testing.assert_array_equal(column.numpy(), plain[name])


def copying(case: Case, slots: int) -> Callable[[int], None]:
    """Copies as many bytes as a batch has, from the store's observations in order to one of `slots` buffers in turn."""
    source = np.asarray(case.store.obs).reshape(-1).view(np.uint8)
    buffers = np.empty((slots, case.bytes), np.uint8)
    pieces = max(1, len(source) // case.bytes)

    def copy(step: int) -> None:
        first = step % pieces * case.bytes
        np.copyto(buffers[step % slots, : len(source) - first], source[first : first + case.bytes])

    return copy


def fastest(case: Case, rounds: int = 40) -> dict[str, float]:
    """CPU seconds of one batch by each way, in turn. Rounds of 3 ms: in longer ones others have used the caches.

    A round of the scheduler begins and ends with a full ring, so that it pays for as many batches as it takes.
    """
    calls = {"native": case.native, "numpy": case.numpy, "torch": case.torch, "torch drawing": case.torch_drawing}
    calls["copy"], calls["ring copy"] = copying(case, 1), copying(case, case.scheduler.prefetch + 1)
    best, step = dict.fromkeys(calls, float("inf")), 0
    repeats = max(4, int(3e-3 * 8e9 / case.bytes))
    for _ in range(rounds):
        for name, call in calls.items():
            fill(case)
            start = time.process_time()
            for _ in range(repeats):
                call(step)
                step += 1
            fill(case)
            best[name] = min(best[name], (time.process_time() - start) / repeats)
    return best


def fill(case: Case) -> None:
    """Waits for a full ring; of small batches, takes as many as wake the workers."""
    scheduler = case.scheduler
    while (ready := scheduler.ready) <= scheduler.prefetch:
        if case.bytes < 2**18 and 2 * ready > scheduler.prefetch:
            next(scheduler).release()
        time.sleep(1e-3)


def report(benchmark: Any, case: Case, title: str, best: dict[str, float]) -> None:
    native = best["native"]
    benchmark.extra_info.update(best, windows_per_s=case.windows / native, bytes_per_s=case.bytes / native)
    print(
        f"\n  {title:34s} {case.windows / native:10.3g} windows/s {case.bytes / native / 1e9:6.2f} GB/s"
        f"   numpy / native {best['numpy'] / native:5.2f}   torch / native {best['torch'] / native:5.2f}"
        + (f" (drawing {best['torch drawing'] / native:5.2f})" if "torch drawing" in best else "")
        + f"   copy / native {best['copy'] / native:5.2f} (copy {case.bytes / best['copy'] / 1e9:.2f} GB/s)"
        + (f", into a ring {best['ring copy'] / native:5.2f}" if "ring copy" in best else "")
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("policies, batch, horizon", SHAPES)
def test_cached(
    benchmark: Any, store: EpisodeStore, policies: int, batch: int, horizon: int | None, threads: int
) -> None:
    """Goals: 5 times torch, 0.6 of a copy. Of two cores with AVX-512, 2 MB of L2 each and the store in their L3,
    shared with others: windows 1.9 to 3.4 times torch with rows given, 2.1 to 4.1 with drawing, and 0.54 to 0.71 of a
    copy to one buffer, 0.67 to 0.81 of one into a ring. Start states of one policy 2.6 to 2.9 and 5.8 to 6.7 times,
    0.30 to 0.35 of a copy; of 80 policies 3.3 to 3.6 and 4.3 to 4.9 times, 0.44 to 0.49 of a copy.

    Windows cannot be 5 times as fast as torch there: of 1 x 256, a copy of as many bytes in order into a ring of that
    size took 124 to 132 us and the gather alone 141 to 169, where a fifth of torch's time is 96. Reading alone took
    72 to 88; to ask for the ring's lines, even without writing them, made it 145. The gather by eight or sixteen
    numbers, aligned stores, lines asked for before they are written and windows put together in other groups changed
    less than 5%; non-temporal stores took 1.4 to 2.5 times as long; other pieces, one slot less and huge pages for
    the ring changed nothing. Start states of 80 policies: reading alone took 108 to 118 us, the gather alone 155 to
    175, a fifth of torch's time is 172; the draws add 20 us (66 before many were made at once) and the Python around
    a batch, which has lost the caches to the batch before, some 30. Of one policy, Python and the locks take 2 of 6
    us.

    On 2 Zen 3 cores with AVX2: windows 1.8 to 2.2 times torch with rows given, 1.8 to 2.3 with drawing, and 0.33 to
    0.36 of a copy, 0.39 to 0.53 of one into a ring, which takes about a fifth of torch's time or more; start states of
    one policy 2.0 to 2.3 and 5.7 to 6.6 times, of 80 policies 2.5 to 3.3 and 3.4 to 4.5 times, 0.22 to 0.25 of a copy,
    where no bound is shown. Idle and before draws were made many at once, windows 2.0 to 3.0
    times torch, start states of one policy 1.0 to 1.4 (torch's rows still fit the cache). The same
    gather of windows called in a loop, without workers, reached 0.44 to 0.55: observations take a half of its time,
    actions a quarter, rewards and ends a tenth, draws 3%. One that only reads, window after window, reached 0.6.

    The memory binds, not the loop: the same gather reached 0.46 to 0.48 of a copy where another had just used the
    caches, and 0.58 to 0.64 where the ring was still in them; a copy's one buffer always is. Twice as many numbers per
    turn, other counts of windows side by side, stores that pass the caches (the consumer's reading then takes 2.3 times
    as long) and asking for start states as they are drawn changed less than that. A map in huge pages read 10 to 20%
    faster, but the page cache makes them only of a file that is read so, 2 MB for every cold window."""
    case = Case(store, policies, batch, horizon, threads)
    with case.scheduler:
        case.check()
        report(benchmark, case, f"{policies} x {batch}, H {horizon}, {threads} threads", fastest(case))
        benchmark(case.native, 0)


def starting(store: EpisodeStore, policies: int) -> StartStates:
    """What `ExtractionRounds` takes its start states from; the first step is checked."""
    samplers = [WindowSampler(store, 1, seed=policy) for policy in range(policies)]
    starts = StartStates(samplers, BATCH, OBS)
    with starts.at(0) as batch:
        np.testing.assert_array_equal(batch["obs"].numpy(), np.stack([s.start_states(0, BATCH) for s in samplers]))
    return starts


@pytest.mark.parametrize(
    "policies, milliseconds",
    [pytest.param(1, 0.8, id="one policy at a GPU's best"), pytest.param(80, 10.0, id="80 policies at a GPU's best")],
)
def test_extraction_never_waits(benchmark: Any, store: EpisodeStore, policies: int, milliseconds: float) -> None:
    """The consumer is away as long as an extraction step of the 48M model takes on the fastest GPU."""
    share, steps, at = [], 50, iter(range(1, 10**9))
    with starting(store, policies) as starts:
        buffer = torch.empty(policies, BATCH, OBS)
        for _ in range(7):
            before, start = starts.waited, time.perf_counter()
            for _ in range(steps):
                with starts.at(next(at)) as batch:
                    buffer.copy_(batch["obs"])
                time.sleep(milliseconds / 1e3)
            share.append((starts.waited - before) / (time.perf_counter() - start))
        benchmark.extra_info.update(waited_share=min(share))
        print(f"\n  {policies:3d} x 64 start states every {milliseconds} ms: waiting {min(share):.2%} of the time")
        benchmark(lambda: starts.at(next(at)).release())


def test_extraction_of_48M_never_waits(benchmark: Any, store: EpisodeStore) -> None:
    """Real gradient steps on this machine; the share counts the round's first batch, which nobody could make ahead."""
    torch.manual_seed(0)
    model = WorldModel(WorldModelConfig.of_size("48M", OBS, ACTION))
    learner, steps = Extraction(model, PRESETS["paper"]), 3
    with starting(store, 1) as starts:
        starts.close()
        begin = time.perf_counter()
        for step in range(steps):
            with starts.at(step) as batch:
                learner.step(batch["obs"])
        seconds, waited = time.perf_counter() - begin, starts.waited
        benchmark.extra_info.update(waited_share=waited / seconds)
        print(
            f"\n  48M: {steps} steps of {seconds / steps:.2f} s, waiting {1e6 * waited:.0f} us, {waited / seconds:.4%}"
        )
        benchmark(lambda: starts.at(0).release())
    assert not learner.diverged.any() and waited < 0.01 * seconds


def forget(store: EpisodeStore) -> None:
    """Drops the store from the page cache: its own maps first, whose pages would stay."""
    for name, column in COLUMNS.items():
        mapped = getattr(store, name)
        if isinstance(mapped, np.memmap):
            mapped._mmap.madvise(4)  # type: ignore[attr-defined]  # MADV_DONTNEED
        descriptor = os.open(store.path / column.file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@pytest.mark.skipif(not os.environ.get(LARGE), reason=f"writes 4 GB; set {LARGE} to a folder with that much room")
@pytest.mark.parametrize("threads", [1, 2])
def test_cold(benchmark: Any, threads: int) -> None:
    """256 windows of 16 transitions, the first reads of a store that is on the disk only; seconds by the clock.

    The scheduler asks for all windows of a piece before it reads the first: 44 to 57 times as fast as numpy and
    torch, whose every fault reads the megabytes around it (8 MB there). Without asking it was 0.94 to 1.09 times as
    fast. A copy in order reads 6 to 8 times as many bytes a second: what is read at random comes in single pages."""
    path = Path(os.environ[LARGE]) / "pwm_fast-bench-store"
    store = EpisodeStore.open(path) if path.exists() else write_store(path, 4e9)
    case, best, steps = Case(store, 1, 256, 16, threads), {}, 4
    with case.scheduler:
        case.check()
        case.draw_from(1000)
        source = np.asarray(store.obs).reshape(-1).view(np.uint8)[: steps * case.bytes]
        for round_ in range(3):
            calls: dict[str, Callable[[int], Any]] = {
                "numpy": case.numpy,
                "torch": case.torch,
                "copy": lambda step: source[step * case.bytes : (step + 1) * case.bytes].copy(),
            }
            for name, call in calls.items():
                forget(store)
                start = time.perf_counter()
                for step in range(steps):
                    call(step)
                best[name] = min(best.get(name, np.inf), (time.perf_counter() - start) / steps)
            with RolloutScheduler(store, 256, 16, threads=threads, backend="native") as fresh:
                forget(store)
                start = time.perf_counter()
                fresh.admit(0, 0, step=1000 + 100 * round_, end=1000 + 100 * round_ + steps)
                for batch in fresh:
                    batch.release()
                best["native"] = min(best.get("native", np.inf), (time.perf_counter() - start) / steps)
        report(benchmark, case, f"cold, 1 x 256, H 16, {threads} threads", best)
        benchmark(case.native, 0)
