"""Batches of many policies, gathered ahead of time by native threads into a ring of staging buffers.

    scheduler = RolloutScheduler(store, batch=64, capacity=8, prefetch=2)  # start states; horizon=16 gives windows
    for policy, seed in enumerate(seeds):
        scheduler.admit(policy, seed, end=10_000)
    for batch in scheduler:
        with batch:                               # the slot is refilled when the block ends
            extraction.step(batch["obs"])         # [P, B, S], a view of the ring
        for policy in diverged:
            scheduler.retire(policy)

Policy p's part of a batch is what `WindowSampler` with p's seed and episodes draws at p's step: a function of
(seed, policy, step), whatever the number of threads, how far ahead they are and who shares the batch. Policies may draw
from several stores, whose rows are padded with zeros to one width.
"""

import atexit
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pwm_fast import backend as backends
from pwm_fast.data.drawing import Tasks, listed
from pwm_fast.data.layout import COLUMNS, StoreError
from pwm_fast.data.plain_scheduler import PlainScheduler
from pwm_fast.data.sampling import WindowSampler, not_finite
from pwm_fast.data.store import EpisodeStore

_NO_END = 2**63 - 1
_DTYPES = {
    "obs": torch.float32,
    "action": torch.float32,
    "reward": torch.float32,
    "terminated": torch.uint8,
    "task": torch.int32,
    "valid": torch.bool,
}


class RingFullError(RuntimeError):
    """Every batch of the ring is in use: release one before asking for the next, or raise `prefetch`."""


class Admitted(NamedTuple):
    """A policy that has steps left: it draws batch `step` next and leaves at `end` (None: never)."""

    policy: int
    seed: int
    step: int
    end: int | None


class Batch(Mapping[str, Tensor]):
    """One batch: views of a slot of the ring, which is refilled after `release` or at the end of a `with` block.

    Row p belongs to policy `policies[p]` at its step `steps[p]`. Of start states it holds obs [P, B, S]; of windows
    obs [P, H+1, B, S], action [P, H, B, A], reward [P, H, B], terminated [P, H, B] (uint8), task [P, B] (int32, as its
    store numbers it) and, of partial ones, valid [P, H, B] (bool); float32 otherwise.
    """

    def __init__(
        self, scheduler: "RolloutScheduler", slot: int, policies: tuple[int, ...], steps: tuple[int, ...]
    ) -> None:
        self.policies, self.steps, self._slot = policies, steps, slot
        self._scheduler: RolloutScheduler | None = scheduler
        self._copied: torch.cuda.Event | None = None

    def __getitem__(self, column: str) -> Tensor:
        """The column's view; raises ValueError after release."""
        if self._scheduler is None:
            raise ValueError("this batch is released and its memory holds another; read it before releasing")
        return self._scheduler.ring[column][self._slot, : len(self.policies)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scheduler.ring if self._scheduler is not None else ())

    def __len__(self) -> int:
        return len(self._scheduler.ring) if self._scheduler is not None else 0

    def to(self, device: str | torch.device) -> dict[str, Tensor]:
        """Copies on a device. On CUDA the copy is asynchronous, and a release waits for it in the background."""
        moved = {name: column.to(device, non_blocking=True, copy=True) for name, column in self.items()}
        self.copied_to(torch.device(device))
        return moved

    def copied_to(self, device: torch.device) -> None:
        """Makes `release` wait, in the background, for copies that were begun on a device's current stream."""
        if device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    def release(self) -> None:
        """Gives the slot back. Releasing twice is harmless."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler._give_back(self._slot, self._copied)

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class RolloutScheduler:
    """Iterates over batches of at most `capacity` policies, `batch` start states (or windows) each.

    `horizon` None gives start states, else windows of that many transitions (`partial` as in `WindowSampler`).
    Rows are as wide as those of the widest of `stores`, or `obs_dim` and `action_dim`: narrower ones end in zeros, and
    of wider ones the last entries are left out.
    Policies share batches in the order of their admission: the first `capacity` that have steps left, packed into the
    first rows; the others wait. Native workers keep `prefetch` batches ready beside the one in use (None: 2, more of
    small ones); of batches below 256 kB they make half of the ring at a time. Without the native
    module (or with `backend="torch"`) the same batches are gathered when they are asked for.

    `admit`, `retire` and `seek` count from the next batch on. The iteration ends when no policy has steps left, and
    goes on if another is admitted. An error met while gathering (NaN in the data, a truncated file) is raised, as
    StoreError with the reason, by the `next` that would have returned that batch; the following `next` tries again.
    Closed by `close`, at the end of a `with` block, when it is garbage-collected and when the interpreter ends;
    batches in use stay readable. After a fork the child must make its own.

    Raises StoreError where `WindowSampler` does, ValueError for arguments out of range.
    """

    def __init__(
        self,
        stores: EpisodeStore | Sequence[EpisodeStore],
        batch: int,
        horizon: int | None = None,
        capacity: int = 1,
        prefetch: int | None = None,
        threads: int = 1,
        partial: bool = False,
        backend: str | None = None,
        *,
        obs_dim: int | None = None,
        action_dim: int | None = None,
    ) -> None:
        least = {"batch": batch, "capacity": capacity, "prefetch": prefetch, "threads": threads}
        for name, value in (least | {"obs_dim": obs_dim, "action_dim": action_dim}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if partial and horizon is None:
            raise ValueError("partial windows need a horizon, got None")
        backend = backends.resolve(backend)
        self.stores = [stores] if isinstance(stores, EpisodeStore) else list(stores)
        if not self.stores:
            raise ValueError("a scheduler needs at least one episode store, got none")
        self.batch, self.horizon, self.capacity = int(batch), horizon, int(capacity)
        self.partial, self.threads = partial, int(threads)
        self.obs_dim = max(store.obs_dim for store in self.stores) if obs_dim is None else obs_dim
        self.action_dim = max(store.action_dim for store in self.stores) if action_dim is None else action_dim
        self._samplers: dict[str, WindowSampler] = {}  # by what was chosen
        if horizon is not None:
            for store in self.stores:
                WindowSampler(store, horizon, backend="torch", partial=partial)
        self._chosen: dict[int, dict[str, Any]] = {}
        self._copying: list[tuple[torch.cuda.Event, int]] = []
        files = [self._files(store) for store in self.stores]
        self._ring = self._allocate(self._usual_prefetch() if prefetch is None else prefetch)
        self._engine: Any
        self._native = backends.native if backend == "native" else None
        if self._native is not None:
            columns = [{name: getattr(store, name) for name in COLUMNS} for store in self.stores]
            shape = (self.obs_dim, self.action_dim), self.capacity, self.batch, horizon or 0, partial
            try:
                self._engine = self._native.RolloutScheduler(
                    list(zip(columns, files)), _arrays(self._ring), *shape, self.threads
                )
            except ValueError as error:
                raise StoreError(f"episode store {', '.join(str(s.path) for s in self.stores)}: {error}") from error
        else:
            self._engine = PlainScheduler(self.capacity, self.batch, horizon, files, _arrays(self._ring))
        _open.add(self)

    def _files(self, store: EpisodeStore) -> list[tuple[str, int]]:
        """Those that batches come from, with their bytes."""
        names = [name for name in COLUMNS if name != "episode_start"] if self.horizon is not None else ["obs"]
        return [(str(store.path / COLUMNS[name].file), getattr(store, name).nbytes) for name in names]

    def _usual_prefetch(self) -> int:
        """Two, or of small batches as many as fit a core's cache: workers are woken once for many of them."""
        row = (self.obs_dim + (self.action_dim if self.horizon else 0)) * 4
        return max(2, min(32, 2**18 // (self.capacity * self.batch * ((self.horizon or 0) + 1) * row)))

    def _allocate(self, prefetch: int) -> dict[str, Tensor]:
        """Columns [slots, P, ...]; those of start states keep their horizon's axis, of length 1."""
        P, B, H = self.capacity, self.batch, self.horizon or 0
        shapes: dict[str, tuple[int, ...]] = {"obs": (P, H + 1, B, self.obs_dim)}
        if H:
            shapes |= {"action": (P, H, B, self.action_dim), "task": (P, B)}
            shapes |= dict.fromkeys(("reward", "terminated", *(["valid"] * self.partial)), (P, H, B))
        pinned = torch.cuda.is_available()
        return {n: torch.zeros(prefetch + 1, *s, dtype=_DTYPES[n], pin_memory=pinned) for n, s in shapes.items()}

    def _draw(self, sampler: WindowSampler) -> Any:
        """What the engine draws a policy's rows from."""
        if self._native is None:
            return sampler
        draw = sampler.start_draw if self.horizon is None or self.partial else sampler.window_draw
        return draw.native(self._native)

    @property
    def ring(self) -> dict[str, Tensor]:
        """The staging buffers [slots, P, ...], pinned where CUDA is available; batches are views of them."""
        return self._ring if self.horizon is not None else {"obs": self._ring["obs"][:, :, 0]}

    @property
    def prefetch(self) -> int:
        """How many batches are kept ready beside the one in use."""
        return len(self._ring["obs"]) - 1

    @property
    def waited(self) -> float:
        """Seconds that `next` has waited for data in all."""
        return float(self._engine.waited())

    @property
    def ready(self) -> int:
        """How many batches `next` would return without waiting for the workers."""
        return int(self._engine.ready())

    def policies(self) -> list[Admitted]:
        """The policies that have steps left, in the order of their admission; those past `capacity` wait."""
        every = self._engine.policies()
        return [Admitted(p, seed, step, None if end == _NO_END else end) for p, seed, step, end in every]

    def admit(
        self,
        policy: int,
        seed: int,
        episodes: Sequence[int] | np.ndarray | None = None,
        step: int = 0,
        end: int | None = None,
        *,
        tasks: Tasks | None = None,
        balanced: bool = False,
        store: int = 0,
    ) -> None:
        """Adds a policy, last in the order, that draws its steps `step` to `end` (excluded; None: until retired).

        `episodes`, `tasks` and `balanced` say what it draws from store number `store`, as in `WindowSampler`, whose
        errors for them are raised; also ValueError for an id that is there already, a store that is not, a seed out of
        range or no steps.
        """
        if not 0 <= store < len(self.stores):
            raise ValueError(f"store must be in [0, {len(self.stores)}), got {store}")
        ids = None if episodes is None else np.array(episodes, np.int64).reshape(-1)
        key = repr((store, None if ids is None else ids.tobytes(), listed(tasks), balanced))
        if key not in self._samplers:
            self._samplers[key] = WindowSampler(
                self.stores[store], self.horizon or 1, ids, partial=self.partial, backend="torch", tasks=tasks,
                balanced=balanced,
            )  # fmt: skip
        self.admit_samplers({policy: self._samplers[key].with_seed(seed)}, step, end)  # refuses a seed out of range

    def admit_samplers(self, samplers: Mapping[int, WindowSampler], step: int = 0, end: int | None = None) -> None:
        """Adds policies by id, all or none; each draws what its sampler draws, of one of the stores.

        Raises ValueError for an id that is there already, another store's or horizon's sampler, or no steps.
        """
        last = _NO_END if end is None else end
        if not 0 <= step < last:
            raise ValueError(f"step must be >= 0 and below end, got step {step} and end {end}")
        numbers = {id(store): number for number, store in enumerate(self.stores)}
        for sampler in samplers.values():
            if id(sampler.store) not in numbers:
                raise ValueError(f"episode store {sampler.store.path} is not one of the scheduler's")
            if self.horizon is not None and (self.horizon, self.partial) != (sampler.horizon, sampler.partial):
                raise ValueError(
                    f"the scheduler's windows have horizon {self.horizon} and partial {self.partial}, the sampler's "
                    f"{sampler.horizon} and {sampler.partial}"
                )
        store_of = {policy: numbers[id(sampler.store)] for policy, sampler in samplers.items()}
        self._engine.admit([(p, s.seed, step, last, self._draw(s), store_of[p]) for p, s in samplers.items()])
        self._chosen.update({p: {**s.chosen, "store": store_of[p]} for p, s in samplers.items()})

    def retire(self, policy: int) -> None:
        """Removes a policy; those behind it move up a row. Raises ValueError if it is not there."""
        self._engine.retire(policy)

    def seek(self, step: int) -> None:
        """Makes `step` the next of every policy; one whose `end` is not after it leaves."""
        self._engine.seek(step)

    def at(self, step: int) -> Batch:
        """Batch `step` of every policy: the next one, or a restart from there. Errors as of `next`."""
        if any(admitted.step != step for admitted in self.policies()):
            self.seek(step)
        batch = next(self, None)
        if batch is None:
            raise ValueError(f"no policy has a step {step}; admit one")
        return batch

    def resize(self, prefetch: int | None = None, threads: int | None = None) -> None:
        """Another ring and another number of threads; raises ValueError while a batch is in use."""
        prefetch = self.prefetch if prefetch is None else prefetch
        threads = self.threads if threads is None else threads
        if prefetch < 1 or threads < 1:
            raise ValueError(f"prefetch and threads must be >= 1, got {prefetch} and {threads}")
        self._settle(wait=True)
        ring = self._allocate(prefetch)
        self._engine.resize(_arrays(ring), threads)
        self._ring, self.threads = ring, threads

    def state_dict(self) -> dict[str, Any]:
        """Where every policy is; batches taken count as done. A few numbers, and what each draws from."""
        return {"policies": [{**p._asdict(), **self._chosen[p.policy]} for p in self.policies()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, with its policies in place of the present ones."""
        for admitted in self.policies():
            self.retire(admitted.policy)
        for admitted in state["policies"]:
            self.admit(**admitted)

    def __iter__(self) -> "RolloutScheduler":
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises StopIteration when no policy has steps left, RingFullError when every slot is in use,
        StoreError for bad data, RuntimeError when closed."""
        if self._copying:
            self._settle(wait=False)
        got = self._engine.acquire()
        while got[0] == "held" and self._copying:
            self._copying[0][0].synchronize()  # later copies may wait for the device's present work
            self._settle(wait=False)
            got = self._engine.acquire()
        answer = got[0]
        if answer == "ready":
            return Batch(self, *got[1:])
        if answer == "finished":
            raise StopIteration
        if answer == "held":
            raise RingFullError(
                f"all {self.prefetch + 1} batches are in use; release one before asking for the next, or raise prefetch"
            )
        if answer == "fault":
            number, row, reason = got[1:]
            if row >= 0:
                raise not_finite(self.stores[number], row, self.horizon or 0)
            raise StoreError(f"episode store {self.stores[number].path}: {reason}")
        raise RuntimeError("the scheduler is closed; make another one")

    def _give_back(self, slot: int, copied: "torch.cuda.Event | None") -> None:
        if copied is None or copied.query():
            self._engine.release(slot)
        else:
            self._copying.append((copied, slot))

    def _settle(self, wait: bool) -> None:
        """Releases the slots whose copies to the device have ended; with `wait`, all."""
        if not self._copying:
            return
        still = []
        for copied, slot in self._copying:
            if wait:
                copied.synchronize()
            if copied.query():
                self._engine.release(slot)
            else:
                still.append((copied, slot))
        self._copying = still

    def close(self) -> None:
        """Ends the workers. Batches in use stay readable; closing twice is harmless."""
        self._engine.close()

    def __enter__(self) -> "RolloutScheduler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _arrays(ring: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: column.numpy() for name, column in ring.items()}


_open: "weakref.WeakSet[RolloutScheduler]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Workers read memory maps, which the ending interpreter unmaps."""
    for scheduler in list(_open):
        scheduler.close()
