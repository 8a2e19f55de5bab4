"""Environments in worker processes: each worker runs one task's environments at a time and waits for their actions.

A worker is a Gymnasium AsyncVectorEnv of one process. Its only "environment" is a whole batch of them: one message to
and fro per batch and step, and observations through shared memory. Workers answer independently of each other: while
one waits for its policy, the others step.
"""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from pwm_fast.envs.registry import Task


class TaskBatch(gymnasium.Env):
    """Lives in a worker: up to N environments of one task, padded to [N, S] and [N, A]; `reset` says which.

    Everything but the observations travels in the info: reward, terminated, truncated [n], and success [n] where the
    task tells it.
    """

    def __init__(self, num_envs: int, obs_dim: int, action_dim: int):
        self.observation_space = Box(-np.inf, np.inf, (num_envs, obs_dim), np.float32)
        self.action_space = Box(-1.0, 1.0, (num_envs, action_dim), np.float32)
        self._envs: Any = None
        self._made: tuple | None = None
        if multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Options: `task`, `num_envs`, and `seed` as the task's VectorEnv takes it."""
        assert options is not None
        wanted = (options["task"], options["num_envs"])
        if self._made != wanted:
            self.close()
            self._envs, self._made = options["task"].make_vector(options["num_envs"], threads=1), wanted
        obs, _ = self._envs.reset(seed=options["seed"])
        return self._padded(obs), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        count, width = self._envs.action_space.shape
        obs, reward, terminated, truncated, info = self._envs.step(action[:count, :width])
        told = {"reward": reward, "terminated": terminated, "truncated": truncated}
        if "success" in info:
            told["success"] = info["success"]
        return self._padded(obs), 0.0, False, False, told

    def _padded(self, obs: np.ndarray) -> np.ndarray:
        padded = np.zeros(self.observation_space.shape or (), np.float32)
        padded[: obs.shape[0], : obs.shape[1]] = obs
        return padded

    def close(self) -> None:
        if self._envs is not None:
            self._envs.close()
        self._envs = self._made = None


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` worker processes for environments of at most these sizes, started by `with` and ended with it.

    They are spawned, so a script that uses them needs the usual `if __name__ == "__main__":`. Whatever ends the block,
    an exception or Ctrl-C included, no process is left; should this process be killed, they end by themselves.
    """

    def __init__(self, count: int, num_envs: int, obs_dim: int, action_dim: int):
        self._count, self._batch = count, partial(TaskBatch, num_envs, obs_dim, action_dim)
        self._shape = (num_envs, action_dim)
        self._workers: list[AsyncVectorEnv] = []

    def __enter__(self) -> "Workers":
        try:
            with ThreadPoolExecutor(self._count) as starting:  # each waits for its process to have imported everything
                for started in [starting.submit(self._start) for _ in range(self._count)]:
                    started.result()
        except BaseException as error:
            self._end()
            if isinstance(error, (EOFError, ConnectionError)):
                raise RuntimeError(
                    "an environment process could not start; what it printed says why (most often: a script that "
                    "starts processes needs to be a file, with its work under `if __name__ == '__main__':`)"
                ) from error
            raise
        return self

    def _start(self) -> None:
        worker = AsyncVectorEnv([self._batch], copy=False, context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        self._workers.append(worker)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        # not VectorEnv.close(): it would wait for an answer that is under way, and raise what it says
        for worker in self._workers:
            for process in worker.processes:
                process.terminate()
            for process in worker.processes:
                process.join()
            for pipe in worker.parent_pipes:
                if pipe is not None:
                    pipe.close()
            worker.closed = True
        self._workers.clear()

    def begin(self, worker: int, task: Task, num_envs: int, seed: int | list[int]) -> None:
        """Have a worker start episodes of a task."""
        self._call(worker, "reset_async", options={"task": task, "num_envs": num_envs, "seed": seed})

    def act(self, worker: int, action: np.ndarray) -> None:
        """Have a worker's environments take a step: action [n, a]."""
        padded = np.zeros((1, *self._shape), np.float32)
        padded[0, : action.shape[0], : action.shape[1]] = action
        self._call(worker, "step_async", padded)

    def ready(self, waiting: Sequence[int]) -> list[int]:
        """Those of the workers that have answered; waits for the first."""
        pipes: dict[Any, int] = {self._workers[index].parent_pipes[0]: index for index in waiting}
        return sorted(pipes[pipe] for pipe in wait(list(pipes)))

    def first_obs(self, worker: int) -> np.ndarray:
        """The answer to `begin`: obs [N, S], valid until the worker's next step."""
        return self._call(worker, "reset_wait")[0][0]

    def stepped(self, worker: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The answer to `act`: obs [N, S], valid until the worker's next step, and the info of TaskBatch."""
        obs, *_, info = self._call(worker, "step_wait")
        return obs[0], {name: value[0] for name, value in info.items() if not name.startswith("_")}

    def _call(self, worker: int, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return getattr(self._workers[worker], method)(*arguments, **options)
        except (EOFError, ConnectionError) as error:
            self._workers[worker].processes[0].join()
            code = self._workers[worker].processes[0].exitcode
            raise RuntimeError(
                f"an environment process ended with exit code {code} (a negative one is the signal that killed it; "
                "-9 is often a lack of memory: use fewer processes)"
            ) from error
