"""Looks at reality: whole episodes of a population in the real environments, and what they say of the world model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pwm_fast.data.collect import derived_seed, one_torch_thread
from pwm_fast.data.task_table import fitted
from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import Episode, evaluate, evaluate_population
from pwm_fast.models.policy import Policy
from pwm_fast.models.world_model import WorldModel

GAUGE_STEPS = 200
SUCCESS_WORTH = 10_000.0  # in units of return: where tasks tell success, its rate ranks before the return


class Look(NamedTuple):
    """One policy's episodes: those with mean actions, which judge it, then those with sampled ones."""

    judged: list[Episode]
    explored: list[Episode]
    successes: np.ndarray | None  # [judged], where the task tells

    @property
    def real_return(self) -> float:
        return float(np.mean([e.reward.sum() for e in self.judged]))

    @property
    def length(self) -> float:
        return float(np.mean([len(e.reward) for e in self.judged]))

    @property
    def merit(self) -> float:
        """What policies of a task are ranked by."""
        success = 0.0 if self.successes is None else float(np.mean(self.successes))
        return self.real_return + SUCCESS_WORTH * success


@one_torch_thread()
def real_episodes(
    tasks: Sequence[str],
    policies: Sequence[Policy],
    judged: int,
    explored: int,
    seed: int,
    draw: int,
    threads: int | None,
) -> list[Look]:
    """For every policy, on its task, `judged` episodes with mean actions and `explored` with sampled ones.

    Those of one dflex task run side by side, others in worker processes (`threads` of them). Start states are new in
    every `draw`: the best of many looks at the same ones would be the luckiest there.
    """
    rows = [registry.get(task) for task in tasks]
    if any(row.suite != "dflex" for row in rows):
        return _in_processes(rows, policies, judged, explored, derived_seed(seed, draw), threads)
    found: dict[int, Look] = {}
    for task in dict.fromkeys(tasks):
        members = [i for i, name in enumerate(tasks) if name == task]
        act = _side_by_side([policies[i] for i in members], judged, explored, derived_seed(seed, draw))
        each = judged + explored
        results = evaluate(task, act, each * len(members), derived_seed(seed, draw), record=True, threads=threads)
        assert results.episodes is not None
        for n, i in enumerate(members):
            own = results.episodes[n * each : (n + 1) * each]
            found[i] = Look(own[:judged], own[judged:], None)
    return [found[i] for i in range(len(policies))]


def _in_processes(
    tasks: Sequence[registry.Task],
    policies: Sequence[Policy],
    judged: int,
    explored: int,
    seed: int,
    processes: int | None,
) -> list[Look]:
    """`real_episodes` where a simulator takes one environment at a time."""
    looks = []
    results = evaluate_population(tasks, [p.act for p in policies], judged, seed, record=True, processes=processes)
    for i, (task, policy, result) in enumerate(zip(tasks, policies, results, strict=True)):
        tried: list[Episode] | None = []
        if explored:
            act = _side_by_side([policy], 0, explored, derived_seed(seed, i))
            tried = evaluate(task, act, explored, derived_seed(seed, i), record=True).episodes
        assert result.episodes is not None and tried is not None
        looks.append(Look(result.episodes, tried, result.successes))
    return looks


def _side_by_side(
    policies: Sequence[Policy], judged: int, explored: int, seed: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Observations [n * (judged + explored), S] of n policies, one after the other, to their actions."""
    each = judged + explored
    generators = [torch.Generator().manual_seed(derived_seed(seed, i)) for i in range(len(policies))]

    def act(obs: np.ndarray) -> np.ndarray:
        out = []
        for i, policy in enumerate(policies):
            rows = torch.as_tensor(obs[i * each : (i + 1) * each])
            if judged:
                out.append(policy.act(rows[:judged]))
            if explored:
                out.append(policy.act(rows[judged:], deterministic=False, generator=generators[i]))
        return torch.cat(out).numpy()

    return act


def returns_to_go(episode: Episode, gamma: float) -> np.ndarray:
    """Discounted return from every step [T], float32. An episode cut by the time limit is taken to go on as it was."""
    value = 0.0 if episode.terminated else float(episode.reward[-100:].mean()) / (1.0 - gamma)
    out = np.empty(len(episode.reward), np.float32)
    for t in reversed(range(len(out))):
        out[t] = value = float(episode.reward[t]) + gamma * value
    return out


@torch.no_grad()
def imagined_over_real(
    model: WorldModel, policy: Policy, episodes: Sequence[Episode], task: Tensor | None = None
) -> float:
    """Imagined over real reward of the first `GAUGE_STEPS` steps of some episodes, both with mean actions."""
    device, c = model.obs_mean.device, model.config
    task = None if task is None else task.to(device)
    obs = torch.as_tensor(fitted(np.stack([e.obs[0] for e in episodes]), c.obs_dim)).to(device)
    steps = min(GAUGE_STEPS, max(len(e.reward) for e in episodes))
    z, alive, imagined = model.encode(obs, task), torch.ones(len(obs), device=device), 0.0
    for _ in range(steps):
        action = torch.nn.functional.pad(policy.act_latent(z), (0, c.action_dim - policy.action_dim))
        imagined += float((alive * model.reward(z, action, task)).mean())
        z = model.next(z, action, task)
        if model.has_termination:
            alive = alive * torch.sigmoid(-model.termination_logit(z, task))
    real = float(np.mean([e.reward[:steps].sum() for e in episodes]))
    return imagined / real if abs(real) > 1e-6 else float("nan")
