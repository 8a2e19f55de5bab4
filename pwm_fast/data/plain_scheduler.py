"""The definition of what the native scheduler (`csrc/scheduler.cpp`) does, and what runs without it: no threads, a
batch is gathered when it is asked for."""

import os
from typing import Any, NamedTuple

import numpy as np

from pwm_fast.data.sampling import WindowSampler
from pwm_fast.data.task_table import fitted


class _Policy(NamedTuple):
    id: int
    seed: int
    step: int
    end: int
    sampler: WindowSampler
    store: int


class PlainScheduler:
    """The interface of `pwm_fast._native.RolloutScheduler`; `files` are those of each store."""

    def __init__(
        self,
        capacity: int,
        batch: int,
        horizon: int | None,
        files: list[list[tuple[str, int]]],
        ring: dict[str, np.ndarray],
    ) -> None:
        self._capacity, self._batch, self._horizon, self._files = capacity, batch, horizon, files
        self._policies: list[_Policy] = []
        self._held: set[int] = set()
        self._ring, self._closed = ring, False

    def admit(self, policies: list[tuple[int, int, int, int, WindowSampler, int]]) -> None:
        self._require_open()
        admitted = list(self._policies)
        for policy in map(_Policy._make, policies):
            if any(policy.id == other.id for other in admitted):
                raise ValueError(f"policy {policy.id} is admitted already; retire it first, or choose another id")
            admitted.append(policy._replace(sampler=policy.sampler.with_seed(policy.seed)))
        self._policies = admitted

    def retire(self, policy: int) -> None:
        self._require_open()
        if all(admitted.id != policy for admitted in self._policies):
            raise ValueError(f"policy {policy} is not here; it was never admitted, has had all its steps or is retired")
        self._policies = [admitted for admitted in self._policies if admitted.id != policy]

    def seek(self, step: int) -> None:
        self._require_open()
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        self._policies = [policy._replace(step=step) for policy in self._policies if step < policy.end]

    def policies(self) -> list[tuple[int, int, int, int]]:
        return [admitted[:4] for admitted in self._policies]

    def acquire(self) -> tuple[Any, ...]:
        if self._closed:
            return ("closed",)
        if not self._policies:
            return ("finished",)
        free = [slot for slot in range(len(self._ring["obs"])) if slot not in self._held]
        if not free:
            return ("held",)
        slot, rows = free[0], self._policies[: self._capacity]
        for store in dict.fromkeys(policy.store for policy in rows):
            for path, size in self._files[store]:
                there = os.stat(path).st_size
                if there < size:
                    reason = f"it has {there} bytes, but its committed rows need {size}; restore the file"
                    return "fault", store, -1, f"{path} was truncated while in use: {reason} or collect the data again"
        for p, policy in enumerate(rows):
            if self._horizon is None:
                drawn = {"obs": policy.sampler.start_states(policy.step, self._batch)[None]}
            else:
                drawn = policy.sampler.windows(policy.step, self._batch)
            for name, column in self._ring.items():
                wide, own = column[slot, p], drawn[name]
                wide[...] = fitted(own, wide.shape[-1]) if name in ("obs", "action") else own
        self._held.add(slot)
        moved = [policy._replace(step=policy.step + 1) for policy in rows]
        self._policies = [p for p in (*moved, *self._policies[len(rows) :]) if p.step < p.end]
        return "ready", slot, tuple(policy.id for policy in rows), tuple(policy.step for policy in rows)

    def release(self, slot: int) -> None:
        if slot not in self._held:
            raise ValueError(f"slot {slot} is not held")
        self._held.remove(slot)

    def resize(self, ring: dict[str, np.ndarray], threads: int) -> None:
        self._require_open()
        if self._held:
            raise ValueError(f"{len(self._held)} batches are in use; release them before resizing")
        self._ring = ring

    def waited(self) -> float:
        return 0.0

    def ready(self) -> int:
        return 0

    def close(self) -> None:
        self._closed = True

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the scheduler is closed")
