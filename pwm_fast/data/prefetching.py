"""`WindowSampler` that gathers the next batches while the present one is used. Same interface, same numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pwm_fast.data.drawing import Tasks
from pwm_fast.data.sampling import WindowSampler
from pwm_fast.data.scheduler import Batch, RingFullError, RolloutScheduler
from pwm_fast.data.store import EpisodeStore


class PrefetchingSampler(WindowSampler):
    """Takes the place of a `WindowSampler`: arguments, batches and errors are the same, and `prefetch`.

    From the second step in sequence on, a worker keeps the next `prefetch` batches ready; steps out of sequence, and
    those with an `out`, are gathered at once. The arrays are views of a staging buffer that returns to the worker when
    the last of them is garbage-collected: keep them as long as you like. Without the native module nothing is ahead.
    """

    def __init__(
        self,
        store: EpisodeStore,
        horizon: int,
        episodes: Sequence[int] | np.ndarray | None = None,
        seed: int = 0,
        threads: int = 1,
        backend: str | None = None,
        partial: bool = False,
        prefetch: int | None = None,
        *,
        tasks: Tasks | None = None,
        balanced: bool = False,
    ) -> None:
        super().__init__(store, horizon, episodes, seed, threads, backend, partial, tasks=tasks, balanced=balanced)
        if prefetch is not None and prefetch < 1:
            raise ValueError(f"prefetch must be >= 1, got {prefetch}")
        chosen = {"episodes": episodes, "tasks": tasks, "balanced": balanced}
        self._windows_ahead = _Ahead(self, chosen, horizon, partial, prefetch)
        self._starts_ahead = _Ahead(self, chosen, None, False, prefetch)

    def windows(self, step: int, batch: int, out: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """As `WindowSampler.windows`."""
        ahead = self._windows_ahead.take(step, batch) if out is None and self._native is not None else None
        return super().windows(step, batch, out) if ahead is None else ahead

    def start_states(self, step: int, batch: int, out: np.ndarray | None = None) -> np.ndarray:
        """As `WindowSampler.start_states`."""
        ahead = self._starts_ahead.take(step, batch) if out is None and self._native is not None else None
        return super().start_states(step, batch, out) if ahead is None else ahead["obs"]

    def close(self) -> None:
        """Ends the workers; later batches start new ones."""
        self._windows_ahead.close()
        self._starts_ahead.close()


class _Ahead:
    """The scheduler of one kind of batch, made when steps are asked for in sequence."""

    def __init__(
        self,
        sampler: WindowSampler,
        chosen: dict[str, Any],
        horizon: int | None,
        partial: bool,
        prefetch: int | None,
    ) -> None:
        self._store, self._seed, self._threads = sampler.store, sampler.seed, sampler.threads
        self._chosen, self._horizon, self._partial, self._prefetch = chosen, horizon, partial, prefetch
        self._scheduler: RolloutScheduler | None = None
        self._last: tuple[int, int] | None = None

    def take(self, step: int, batch: int) -> dict[str, np.ndarray] | None:
        """Batch `step` if it comes after the last one and the ring has room, else None."""
        in_sequence = self._last == (step - 1, batch)
        self._last = step, batch
        if not in_sequence:
            return None
        if self._scheduler is None or self._scheduler.batch != batch:
            self.close()
            self._scheduler = RolloutScheduler(
                self._store, batch, self._horizon, 1, self._prefetch, self._threads, self._partial, "native"
            )
            self._scheduler.admit(0, self._seed, step=step, **self._chosen)
        try:
            got = self._scheduler.at(step)
        except RingFullError:  # the caller keeps them all
            return None
        lease = _Lease(got)
        return {name: np.asarray(_Borrowed(column[0].numpy(), lease)) for name, column in got.items()}

    def close(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
            self._scheduler = None


class _Lease:
    """Releases a batch when nothing refers to it any more."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __del__(self) -> None:
        self._batch.release()


class _Borrowed:
    """What numpy keeps as an array's base, and every view of it, torch's included."""

    def __init__(self, array: np.ndarray, lease: _Lease) -> None:
        self.__array_interface__: dict[str, Any] = array.__array_interface__
        self._lease = lease
