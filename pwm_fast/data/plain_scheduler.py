"""The definition of what the native scheduler (`csrc/scheduler.cpp`) does, and what runs without it: no threads, a
batch is gathered when it is asked for."""

import os
from typing import Any

import numpy as np

from pwm_fast.data.sampling import WindowSampler


class PlainScheduler:
    """The interface of `pwm_fast._native.RolloutScheduler`; policies are (id, seed, step, end, sampler)."""

    def __init__(
        self, capacity: int, batch: int, horizon: int | None, files: list[tuple[str, int]], ring: dict[str, np.ndarray]
    ) -> None:
        self._capacity, self._batch, self._horizon, self._files = capacity, batch, horizon, files
        self._policies: list[tuple[int, int, int, int, WindowSampler]] = []
        self._held: set[int] = set()
        self._ring, self._closed = ring, False

    def admit(self, policy: int, seed: int, step: int, end: int, sampler: WindowSampler) -> None:
        self._require_open()
        if any(admitted[0] == policy for admitted in self._policies):
            raise ValueError(f"policy {policy} is admitted already; retire it first, or choose another id")
        self._policies.append((policy, seed, step, end, sampler.with_seed(seed)))

    def retire(self, policy: int) -> None:
        self._require_open()
        if all(admitted[0] != policy for admitted in self._policies):
            raise ValueError(f"policy {policy} is not here; it was never admitted, has had all its steps or is retired")
        self._policies = [admitted for admitted in self._policies if admitted[0] != policy]

    def seek(self, step: int) -> None:
        self._require_open()
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        self._policies = [(p, seed, step, end, s) for p, seed, _, end, s in self._policies if step < end]

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
        for path, size in self._files:
            there = os.stat(path).st_size
            if there < size:
                reason = f"it has {there} bytes, but its committed rows need {size}; restore the file"
                return "fault", -1, f"{path} was truncated while in use: {reason} or collect the data again"
        slot, rows = free[0], self._policies[: self._capacity]
        for p, (_, _, step, _, sampler) in enumerate(rows):
            out = {name: column[slot, p] for name, column in self._ring.items()}
            if self._horizon is None:
                sampler.start_states(step, self._batch, out["obs"][0])
            else:
                drawn = sampler.windows(step, self._batch, dict(out))
                if "valid" in out:
                    out["valid"][:] = drawn["valid"]
        self._held.add(slot)
        moved = [(p, seed, step + 1, end, s) for p, seed, step, end, s in rows]
        self._policies = [p for p in (*moved, *self._policies[len(rows) :]) if p[2] < p[3]]
        return "ready", slot, tuple(row[0] for row in rows), tuple(row[2] for row in rows)

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
