"""Windows and start states drawn from an episode store: of all its tasks or some, uniformly or balanced over them.

A batch is a function of (seed, step) alone: the random numbers are counter-based (Philox4x32-10), so the C++ sampler,
the numpy one and any number of threads give the same bits. The C++ sampler works without Python's lock.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pwm_fast import backend as backends
from pwm_fast.data.drawing import Draw, Tasks, choose, listed
from pwm_fast.data.layout import StoreError
from pwm_fast.data.store import EpisodeStore

WINDOW_STREAM, START_STREAM = 0, 1


class WindowSampler:
    """Batches of windows of `horizon` transitions, and of start states, from all or some episodes of a store.

    `episodes` are ids; `tasks` one task's name or id, several, or a mapping {task: weight}. Each window is equally
    likely, or with `balanced` each task is, or with weights each has its share; within a task each window again.
    Windows never cross an episode's end: an episode of T transitions gives T - horizon + 1 windows (none if it is
    shorter), and T start states (every row but its last). With `partial` a window may start in
    any of those T rows, and `valid` tells which of its transitions come before its episode's end: a model that is to
    imagine from there must have seen them. `threads` is how many threads gather
    one batch; `backend` is "native", "torch" (numpy here) or None for the best (`pwm_fast.backend`).

    Raises StoreError if no chosen episode is long enough (balanced or weighted: none of some task), or when a drawn
    window holds NaN or infinity; ValueError for horizon < 1, threads < 1, a seed out of range, an unknown task or a
    weight that is not > 0.
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
        *,
        tasks: Tasks | None = None,
        balanced: bool = False,
    ) -> None:
        for name, value in (("horizon", horizon), ("threads", threads)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        _check_seed(seed)
        self.store, self.horizon, self.seed, self.threads = store, int(horizon), int(seed), int(threads)
        self._native = backends.native if backends.resolve(backend) == "native" else None
        copied = None if episodes is None else np.array(episodes, np.int64).reshape(-1)
        self.chosen: dict[str, Any] = {"episodes": copied, "tasks": listed(tasks), "balanced": balanced}
        ids, group, share = choose(store, episodes, tasks, balanced)
        first, lengths = store.episode_start[ids], store.lengths[ids]
        longest = np.maximum.reduceat(lengths, group[:-1])  # [G]
        if store.num_rows <= horizon or (longest.min() < horizon and not partial):
            worst = int(longest.argmin())
            few = ids[group[worst] : group[worst + 1]]
            task = f" of task {store.task_names[store.episode_task[few[0]]]!r}" if len(longest) > 1 else ""
            raise StoreError(
                f"no window of horizon {horizon} fits: the longest of the {len(few)} episodes{task} has "
                f"{longest[worst]} transitions; choose a shorter horizon or add longer episodes"
            )
        self.partial = partial
        self.window_draw = Draw(first, np.maximum(lengths - horizon + 1, 0), group, share)
        self.start_draw = Draw(first, lengths, group, share)
        # Little-endian columns are the machine's own type wherever the native module runs.
        self._columns = {name: getattr(store, name) for name in ("obs", "action", "reward", "terminated", "task")}

    def with_seed(self, seed: int) -> "WindowSampler":
        """A sampler of the same windows that draws another policy's; raises ValueError for a seed out of range."""
        _check_seed(seed)
        other = WindowSampler.__new__(WindowSampler)
        other.__dict__.update(self.__dict__)
        other.seed = int(seed)
        return other

    @property
    def num_windows(self) -> int:
        """How many different windows there are."""
        return self.window_draw.total

    @property
    def num_start_states(self) -> int:
        """How many different start states there are."""
        return self.start_draw.total

    def windows(self, step: int, batch: int, out: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Batch number `step`, time first: obs [H+1, B, S], action [H, B, A], reward [H, B], terminated [H, B] (uint8),
        task [B] (int32); float32 otherwise; of a partial sampler also valid [H, B] (bool), outside which the numbers
        are another episode's. Fills and returns `out` if given (C-contiguous arrays of these shapes).
        """
        self._check(step, batch)
        H, S, A = self.horizon, self.store.obs_dim, self.store.action_dim
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "obs": ((H + 1, batch, S), np.float32),
            "action": ((H, batch, A), np.float32),
            "reward": ((H, batch), np.float32),
            "terminated": ((H, batch), np.uint8),
            "task": ((batch,), np.int32),
        }
        if out is None:
            out = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        for name, (shape, dtype) in shapes.items():
            if name not in out:
                raise ValueError(f"out lacks {name!r}")
            _check_out(name, out[name], shape, dtype)
        draw = self.start_draw if self.partial else self.window_draw
        rows = draw.rows(self.seed, WINDOW_STREAM, step, batch, self._native)
        if self.partial:
            rows = np.minimum(rows, self.store.num_rows - H - 1)  # the gather below must not run over the store's end
        source = self._columns
        if self._native is not None:
            bad = self._native.gather_windows(*source.values(), rows, H, self.threads, *(out[name] for name in shapes))
        else:
            index = rows + np.arange(H + 1)[:, None]  # [H+1, B]
            np.take(source["obs"], index, axis=0, out=out["obs"])
            for name in ("action", "reward", "terminated"):
                np.take(source[name], index[:H], axis=0, out=out[name])
            np.take(source["task"], rows, out=out["task"])
            finite = np.isfinite(out["obs"]).all(axis=(0, 2)) & np.isfinite(out["action"]).all(axis=(0, 2))
            finite &= np.isfinite(out["reward"]).all(axis=0)
            bad = -1 if finite.all() else int(rows[~finite].min())
        if bad >= 0:
            raise not_finite(self.store, bad, H)
        if self.partial:
            starts = self.store.episode_start
            last = starts[np.searchsorted(starts, rows, side="right")] - 1  # [B] its episode's last row
            out["valid"] = np.arange(H)[:, None] < last - rows
        return out

    def start_states(self, step: int, batch: int, out: np.ndarray | None = None) -> np.ndarray:
        """Observations [B, S] float32 of batch number `step`; fills and returns `out` if given."""
        self._check(step, batch)
        shape = (batch, self.store.obs_dim)
        if out is None:
            out = np.empty(shape, np.float32)
        _check_out("obs", out, shape, np.float32)
        rows = self.start_draw.rows(self.seed, START_STREAM, step, batch, self._native)
        if self._native is not None:
            bad = self._native.gather_rows(self._columns["obs"], rows, self.threads, out)
        else:
            np.take(self._columns["obs"], rows, axis=0, out=out)
            finite = np.isfinite(out).all(axis=1)
            bad = -1 if finite.all() else int(rows[~finite].min())
        if bad >= 0:
            raise not_finite(self.store, bad, 0)
        return out

    def _check(self, step: int, batch: int) -> None:
        if step < 0 or batch < 1:
            raise ValueError(f"step must be >= 0 and batch >= 1, got step {step} and batch {batch}")


def not_finite(store: EpisodeStore, row: int, horizon: int) -> StoreError:
    """Names the first value that is NaN or infinite in the window at `row` (horizon 0: in that observation)."""
    for name, length in (("obs", horizon + 1), ("action", horizon), ("reward", horizon)):
        finite = np.isfinite(getattr(store, name)[row : row + length])
        if not finite.all():
            finite = finite.reshape(length, -1).all(axis=1)
            where = row + int(np.argmin(finite))
            episode = int(np.searchsorted(store.episode_start, where, side="right")) - 1
            return StoreError(
                f"episode store {store.path} holds NaN or infinity: {name}, row {where} (episode {episode})"
            )
    return StoreError(f"episode store {store.path} changed while it was read: row {row} was NaN or infinite")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    if seed >= 2**64:
        raise ValueError(f"seed must be < 2^64, got {seed}")


def _check_out(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: Any) -> None:
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(
            f"out {name!r} must be a writeable C-contiguous array {list(shape)} of {np.dtype(dtype).name}, "
            f"got {list(array.shape)} of {array.dtype}"
        )
