"""What policies did lately in the real environment: the last steps of environments that go on from cycle to cycle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pwm_fast.data.collect import derived_seed, one_torch_thread
from pwm_fast.envs.registry import Task
from pwm_fast.models.policy import Policy

WINDOWS, STARTS, ACTIONS, ENVIRONMENT = range(4)  # streams of random numbers


class Experience:
    """A ring of the last `capacity` steps (all environments together) of P policies in `num_envs` environments each.

    The environments are a Gymnasium VectorEnv with next-step autoreset. Its step after an episode's end only resets: it
    is no transition and no window crosses it. `episode_length` cuts dflex episodes shorter than the task does. Random
    draws depend on (seed, step) alone. Raises ValueError for counts below 1.
    """

    def __init__(
        self,
        task: Task,
        policies: int,
        num_envs: int,
        capacity: int,
        seed: int = 0,
        threads: int | None = None,
        episode_length: int | None = None,
    ):
        for name, value in (("policies", policies), ("num_envs", num_envs), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.policies, self.num_envs, self.seed = policies, num_envs, seed
        width = policies * num_envs
        seed_of_env = derived_seed(seed, ENVIRONMENT)
        options = {"episode_length": episode_length} if task.suite == "dflex" else {}
        self.env = task.make_vector(width, seed=seed_of_env, threads=threads, **options)
        self.rows = (
            max(-(-capacity // width), 2) + 1
        )  # of the ring, which holds the observation after the last step too
        self.obs = np.zeros((self.rows, width, task.obs_dim), np.float32)
        self.action = np.zeros((self.rows, width, task.action_dim), np.float32)
        self.reward = np.zeros((self.rows, width), np.float32)
        self.terminated = np.zeros((self.rows, width), bool)
        self.ended = np.zeros((self.rows, width), bool)
        self.real = np.zeros((self.rows, width), bool)  # False: the step was a reset
        self.steps = 0
        self.obs[0], _ = self.env.reset()

    def __len__(self) -> int:
        """Steps kept per environment."""
        return min(self.steps, self.rows - 1)

    @one_torch_thread()
    def practise(self, policies: list[Policy], steps: int) -> float:
        """Let every policy act `steps` times in each of its environments, with sampled actions; mean reward."""
        total = 0.0
        for _ in range(steps):
            row, after = self.steps % self.rows, (self.steps + 1) % self.rows
            own = np.split(self.obs[row], self.policies)
            for i, (policy, obs) in enumerate(zip(policies, own, strict=True)):
                generator = torch.Generator().manual_seed(derived_seed(self.seed, ACTIONS, i, self.steps))
                # a copy, because products round differently in memory that is aligned differently
                action = policy.act(torch.tensor(obs), deterministic=False, generator=generator)
                self.action[row, i * self.num_envs : (i + 1) * self.num_envs] = action.numpy()
            self.real[row] = ~self.ended[row - 1] if self.steps else True
            self.obs[after], self.reward[row], fell, cut, _ = self.env.step(self.action[row])
            self.terminated[row], self.ended[row] = fell, fell | cut
            total += float(self.reward[row].mean())
            self.steps += 1
        return total / steps

    def _draw(
        self, horizon: int, stream: int, step: int, count: int, policy: int | None, recent: int | None, cuts: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Times and columns of `count` transitions that have `horizon` recorded steps from there on."""
        first = 0 if policy is None else policy * self.num_envs
        columns = slice(first, self.obs.shape[1] if policy is None else first + self.num_envs)
        times = np.arange(self.steps - min(len(self), recent or len(self)), self.steps - horizon + 1)
        if not len(times):
            raise ValueError(f"windows of {horizon} steps need as many recorded ones, got {len(self)}")
        good = self.real[times % self.rows, columns]
        if not cuts:
            rows = (times[0] + np.arange(len(times) + horizon - 1)) % self.rows
            cut = (self.ended & ~self.terminated)[rows, columns]
            good = good & ~np.lib.stride_tricks.sliding_window_view(cut, horizon, 0)[..., :-1].any(-1)
        there = np.flatnonzero(good)
        picked = there[np.random.default_rng((self.seed, stream, first, step)).integers(len(there), size=count)]
        width = columns.stop - first
        return times[picked // width], first + picked % width

    def windows(
        self,
        step: int,
        count: int,
        horizon: int,
        policy: int | None = None,
        recent: int | None = None,
        cuts: bool = True,
    ) -> dict[str, np.ndarray]:
        """As `WindowSampler.windows`: obs [H+1, B, S], action [H, B, A], reward, terminated, valid [H, B], task [B].

        Of one policy or all, of the last `recent` steps or all, and with `cuts` false without those that a time limit
        cuts short.
        """
        time, column = self._draw(horizon, WINDOWS, step, count, policy, recent, cuts)
        rows = (time + np.arange(horizon + 1)[:, None]) % self.rows
        steps = rows[:-1]
        going = ~np.logical_or.accumulate(self.ended[steps, column], 0)
        valid = np.concatenate([np.ones((1, count), bool), going[:-1]])
        return {
            "obs": self.obs[rows, column],
            "action": self.action[steps, column],
            "reward": self.reward[steps, column],
            "terminated": self.terminated[steps, column],
            "valid": valid,
            "task": np.zeros(count, np.int32),
        }

    def start_states(self, policy: int, step: int, count: int) -> np.ndarray:
        """Observations [count, S] of one policy's own."""
        time, column = self._draw(1, STARTS, step, count, policy, None, True)
        return self.obs[time % self.rows, column]

    _KEPT = ("obs", "action", "reward", "terminated", "ended", "real")

    def state_dict(self) -> dict[str, Any]:
        """Everything; of the environments, what they can tell (dflex: all)."""
        kept = {name: getattr(self, name).copy() for name in self._KEPT}
        env = self.env.state_dict() if hasattr(self.env, "state_dict") else None
        return {**kept, "steps": self.steps, "env": env}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; raises ValueError if it is of other sizes.

        Environments that could not tell their state begin new episodes, and the step before that counts as none.
        """
        for name in self._KEPT:
            mine, theirs = getattr(self, name), np.asarray(state[name])
            if mine.shape != theirs.shape:
                raise ValueError(f"the saved experience's {name} has shape {theirs.shape}, this run's {mine.shape}")
            mine[:] = theirs
        self.steps = int(state["steps"])
        if state["env"] is not None:
            self.env.load_state_dict(state["env"])
            return
        self.obs[self.steps % self.rows], _ = self.env.reset(seed=derived_seed(self.seed, ENVIRONMENT, self.steps))
        if self.steps:
            before = (self.steps - 1) % self.rows
            self.real[before], self.ended[before], self.terminated[before] = False, True, False
