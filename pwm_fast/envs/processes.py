"""Environments in worker processes: each worker runs one task's environments at a time and waits for their actions.

A worker is a Gymnasium AsyncVectorEnv of one process. Its only "environment" is a whole batch of them: one message to
and fro per batch and step, and observations through shared memory. Workers answer independently of each other: while
one waits for its policy, the others step.
"""

import multiprocessing
import os
import selectors
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from pwm_fast.envs.registry import Task

_TOLD = ("reward", "terminated", "truncated", "success")  # the first columns of an answer; success: NaN if not told


class TaskBatch(gymnasium.Env):
    """Lives in a worker: up to N environments of one task, padded to [N, S] and [N, A]; `reset` says which.

    Its "observations" are all that a step gives: rows of reward, terminated, truncated, success and the observation,
    [N, 4 + S] float64, which holds float32 exactly. Its actions are the bytes of [n, a] float32. Infos and arrays,
    pickled and put together for each step, would cost several times as much.
    """

    def __init__(self, num_envs: int, obs_dim: int, action_dim: int):
        self.observation_space = Box(-np.inf, np.inf, (num_envs, len(_TOLD) + obs_dim), np.float64)
        self.action_space = Box(-1.0, 1.0, (num_envs, action_dim), np.float32)
        self._answer = np.zeros((num_envs, len(_TOLD) + obs_dim))
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
        return self._answered(obs), {}

    def step(self, action: bytes) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        actions = np.frombuffer(action, np.float32).reshape(self._envs.action_space.shape)
        obs, reward, terminated, truncated, info = self._envs.step(actions)
        return self._answered(obs, reward, terminated, truncated, info.get("success", np.nan)), 0.0, False, False, {}

    def _answered(self, obs: np.ndarray, *told: Any) -> np.ndarray:
        for column, values in enumerate(told):
            self._answer[: len(obs), column] = values
        self._answer[: len(obs), len(_TOLD) : len(_TOLD) + obs.shape[1]] = obs
        return self._answer

    def close(self) -> None:
        if self._envs is not None:
            self._envs.close()
        self._envs = self._made = None


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker(AsyncVectorEnv):
    """One process with one environment: Gymnasium's messages without its work for many environments and infos."""

    def ask(self, command: str, argument: Any) -> None:
        self.parent_pipes[0].send((command, argument))

    def answer(self) -> np.ndarray:
        """The environment's observation, valid until the next question. Raises what it raised."""
        _, fine = self.parent_pipes[0].recv()
        self._raise_if_errors([fine])
        return self.observations[0]


class Workers:
    """`count` worker processes for environments of at most these sizes, started by `with` and ended with it.

    They are spawned, so a script that uses them needs the usual `if __name__ == "__main__":`. Whatever ends the block,
    an exception or Ctrl-C included, no process is left; should this process be killed, they end by themselves.
    """

    def __init__(self, count: int, num_envs: int, obs_dim: int, action_dim: int):
        self._count, self._batch = count, partial(TaskBatch, num_envs, obs_dim, action_dim)
        self._workers: list[_Worker] = []
        self._answers = selectors.DefaultSelector()
        self._sizes: dict[int, tuple[int, int]] = {}  # worker -> environments and entries of an observation

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
        for index, worker in enumerate(self._workers):
            self._answers.register(worker.parent_pipes[0], selectors.EVENT_READ, index)
        return self

    def _start(self) -> None:
        worker = _Worker([self._batch], copy=False, context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        self._workers.append(worker)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._answers.close()
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
        self._sizes[worker] = (num_envs, task.obs_dim)
        options = {"task": task, "num_envs": num_envs, "seed": seed}
        self._talk(worker, "ask", "reset", {"seed": None, "options": options})

    def act(self, worker: int, action: np.ndarray) -> None:
        """Have a worker's environments take a step: action [n, a] float32."""
        self._talk(worker, "ask", "step", action.tobytes())

    def ready(self, waiting: Sequence[int]) -> list[int]:
        """Those of the workers that have answered; waits for the first."""
        while True:
            found = [key for key, _ in self._answers.select()]
            for key in found:
                if key.data not in waiting:  # it ended, as nobody asked it
                    self._answers.unregister(key.fileobj)
            answered = sorted(key.data for key in found if key.data in waiting)
            if answered:
                return answered

    def first_obs(self, worker: int) -> np.ndarray:
        """The answer to `begin`: obs [n, s] float32."""
        return self._read(worker)[1]

    def stepped(self, worker: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The answer to `act`: obs [n, s] float32; reward, terminated, truncated [n], and success [n] where the task
        tells it."""
        (reward, *rest), obs = self._read(worker)
        told = {"reward": reward, **{name: values != 0 for name, values in zip(_TOLD[1:], rest)}}
        if np.isnan(rest[-1][0]):
            del told["success"]
        return obs, told

    def _read(self, worker: int) -> tuple[np.ndarray, np.ndarray]:
        """[4, n] as `_TOLD` names them, and obs [n, s]."""
        count, width = self._sizes[worker]
        rows = self._talk(worker, "answer")[:count]
        return rows[:, : len(_TOLD)].T.copy(), rows[:, len(_TOLD) : len(_TOLD) + width].astype(np.float32)

    def _talk(self, worker: int, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._workers[worker], method)(*arguments)
        except (EOFError, ConnectionError) as error:
            self._workers[worker].processes[0].join()
            code = self._workers[worker].processes[0].exitcode
            raise RuntimeError(
                f"an environment process ended with exit code {code} (a negative one is the signal that killed it; "
                "-9 is often a lack of memory: use fewer processes)"
            ) from error
