"""Extraction in rounds: imagine, look at reality, learn from it (PWM appendix C.4, the collect-and-retrain loop).

A round is a number of extraction steps, real episodes of every policy (the mean action for selection, sampled actions
for exploration), and, unless the world model stays frozen, model steps half on those episodes and half on the given
data. The best policy by real return is kept, and imagined reward is compared with real reward on the same start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast.baselines.cloning import clone
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, WindowSampler
from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import Episode, evaluate
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.pretraining import PRESETS, Pretraining, Windows
from pwm_fast.models.policy import Policy
from pwm_fast.models.world_model import WorldModel

GAUGE_STEPS = 200
MOST_EPISODES = 256  # environments per policy


@dataclass(frozen=True)
class RoundConfig:
    """What one round does. `model_steps` = 0 keeps the world model frozen."""

    extraction_steps: int = 40
    model_steps: int = 60
    model_batch_size: int | None = None  # windows; None: as in pre-training
    model_lr: float = 3e-4
    encoder_lr_scale: float = 0.0  # a still encoder keeps latents, so actors and critics, valid
    evaluation_episodes: int = 16
    exploration_transitions: int = 8192  # with sampled actions, so that short episodes come in greater number
    new_windows: float = 0.5  # share of the model's windows that come from the rounds' own episodes
    new_starts: float = 0.75  # share of start states
    recent_rounds: int = 8  # whose episodes count as new
    rollback: float = 0.5  # a policy below this share of its best real return goes back to that best

    def __post_init__(self) -> None:
        for name, least in (("extraction_steps", 1), ("model_steps", 0), ("evaluation_episodes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")


class ExtractionRounds:
    """The loop's state: world model, its optimiser, the policies, their real episodes and the best of them.

    `data` gives start states and old windows; real episodes go to the store `replay` (a path that does not exist yet,
    or one that this loop wrote before). Everything is a function of the seeds and the number of rounds done.
    """

    def __init__(
        self,
        task: str,
        world_model: WorldModel,
        extraction: Extraction,
        data: EpisodeStore,
        replay: Path,
        config: RoundConfig,
        seed: int = 0,
        threads: int | None = None,
    ):
        self.task = registry.get(task)
        self.world_model, self.extraction, self.config = world_model, extraction, config
        self.replay_path, self.seed, self.threads = replay, seed, threads
        self.rounds_done = 0
        self.cloned = False  # whether the actors were, in this process
        self.real_length = 50.0  # of the last round's episodes; a guess before the first
        self.best_return = np.full(len(extraction.seeds), -np.inf)
        self.best_policy: list[dict[str, Tensor]] = [p.tensors() for p in extraction.policies()]
        self._best_state: list[dict[str, dict[str, Tensor]]] = [{} for _ in extraction.seeds]
        self.rollbacks = np.zeros(len(extraction.seeds), np.int64)
        self._data = data
        self._starts = [WindowSampler(data, 1, seed=s) for s in extraction.seeds]
        self._fresh_starts: list[WindowSampler] = []
        self._fresh: WindowSampler | None = None
        self._kept: list[list[int]] = []  # by round: episodes of the replay store that this run wrote
        usual = PRESETS[world_model.config.latent]
        self._model = Pretraining(
            world_model,
            replace(
                usual,
                steps=10**9,
                batch_size=config.model_batch_size or usual.batch_size,
                learning_rate=config.model_lr,
                encoder_lr_scale=config.encoder_lr_scale,
            ),
            self._model_batch,
        )
        self._old = WindowSampler(data, usual.horizon, seed=seed, partial=True)

    def start_from_clones(self) -> None:
        """Set the actors to imitate the best of the data, before the first round."""
        clone(self.extraction, self.world_model, self._data)
        self.cloned = True

    def fit_critics(self, episodes: list[list[Episode]]) -> None:
        """Start the critics from the real discounted returns of each policy's own episodes [P][n]."""
        gamma = self.extraction.config.gamma
        obs = [torch.from_numpy(np.concatenate([e.obs[:-1] for e in found])) for found in episodes]
        target = [torch.from_numpy(np.concatenate([returns_to_go(e, gamma) for e in found])) for found in episodes]
        self.extraction.fit_critics(obs, target)

    # one round -----------------------------------------------------------------------------------------------------

    def extract(self, most: int | None = None, stop: Callable[[], bool] = lambda: False) -> dict[str, np.ndarray]:
        """The round's extraction steps, at most `most`; returns the mean of each metric [P] over them."""
        total: dict[str, Tensor] = {}
        steps = 0
        for _ in range(min(self.config.extraction_steps, most or self.config.extraction_steps)):
            metrics = self.extraction.step(self._start_states(int(self.extraction.iteration)))
            total = {k: total[k] + v if total else v.clone() for k, v in metrics.items()}
            steps += 1
            if stop():
                break
        return {k: (v / steps).cpu().numpy() for k, v in total.items()}

    def _exploration_episodes(self) -> int:
        """Per policy, for about `exploration_transitions` at the last round's episode length."""
        c = self.config
        wanted = c.exploration_transitions if c.model_steps else 0
        return int(min(np.ceil(wanted / self.real_length), MOST_EPISODES))

    def look_at_reality(self) -> dict[str, np.ndarray]:
        """Real episodes of every policy, kept for the model; returns [P] arrays, and updates the best policies.

        `real_return`, `real_length`: mean of the episodes with mean actions. `imagined_over_real`: imagined over real
        reward in the first steps of the same episodes; far above 1 is the sign of an exploited model.
        """
        c = self.config
        policies = self.extraction.policies()
        episodes = real_episodes(
            self.task.name, policies, c.evaluation_episodes, self._exploration_episodes(), self.seed + 1,
            self.rounds_done, self.threads,
        )  # fmt: skip
        means, lengths, gauges = [], [], []
        for i, (policy, found) in enumerate(zip(policies, episodes, strict=True)):
            judged = found[: c.evaluation_episodes]
            means.append(float(np.mean([e.reward.sum() for e in judged])))
            lengths.append(float(np.mean([len(e.reward) for e in judged])))
            gauges.append(imagined_over_real(self.world_model, policy, judged, self._task_id(i)))
            self._keep_best(i, means[-1], policy)
        self.real_length = max(float(np.mean(lengths)), 1.0)
        if self.rounds_done == 0 and self.cloned:
            self.fit_critics(episodes)
        if c.model_steps:
            self._keep([e for found in episodes for e in found])
        return {
            "real_return": np.array(means),
            "real_length": np.array(lengths),
            "imagined_over_real": np.array(gauges),
            "rollbacks": self.rollbacks.copy(),
        }

    def _keep_best(self, i: int, real: float, policy: Policy) -> None:
        """Note a new best policy; take one that has lost its way back to it.

        Such a policy exploits an error of the world model. Its episodes are what cures the error, and from the best
        policy the next attempt starts on the cured model.
        """
        learner = self.extraction
        if real > self.best_return[i]:
            self.best_return[i], self.best_policy[i] = real, policy.tensors()
            self._best_state[i] = {"actor": learner.actor_adam.snapshot(i), "critic": learner.critic_adam.snapshot(i)}
        elif self.best_return[i] > 0 and real < self.config.rollback * self.best_return[i]:
            learner.actor_adam.restore(i, self._best_state[i]["actor"])
            learner.critic_adam.restore(i, self._best_state[i]["critic"])
            self.rollbacks[i] += 1

    def learn_model(self, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """The round's model steps; the policies go on with the new model. Returns the mean loss terms."""
        rows = []
        for _ in range(self.config.model_steps):
            rows.append(self._model.step())
            if stop():
                break
        if rows:
            self.extraction.set_world_model(self.world_model)
        return {f"model_{k}": float(np.mean([row[k] for row in rows])) for k in rows[0]} if rows else {}

    def diverged(self) -> np.ndarray:
        """[P]: which policies were stopped because their numbers stopped being finite."""
        return self.extraction.diverged.cpu().numpy()

    def finish_round(self) -> None:
        self.rounds_done += 1

    def best(self) -> list[Policy]:
        """The best policy of each seed by real return so far."""
        now = self.extraction.policies()
        return [Policy.from_tensors(t, p.description) for t, p in zip(self.best_policy, now, strict=True)]

    # data ----------------------------------------------------------------------------------------------------------

    def _task_id(self, policy: int) -> Tensor | None:
        ids = self.extraction.task_ids
        return None if ids is None else ids[policy]

    def _start_states(self, step: int) -> np.ndarray:
        """[P, B, S]: from the data and, once there are any, the policies' own episodes."""
        batch = self.extraction.config.batch_size
        new = int(batch * self.config.new_starts) if self._fresh_starts else 0
        rows = []
        for i, sampler in enumerate(self._starts):
            parts = [sampler.start_states(step, batch - new)]
            if new:
                parts.append(self._fresh_starts[i].start_states(step, new))
            rows.append(np.concatenate(parts))
        return np.stack(rows)

    def _model_batch(self, step: int) -> Windows:
        batch = self._model.config.batch_size
        new = int(batch * self.config.new_windows) if self._fresh is not None else 0
        parts = [self._old.windows(step, batch - new)] if batch > new else []
        if self._fresh is not None and new:
            parts.append(self._fresh.windows(step, new))
        joined = {k: np.concatenate([p[k] for p in parts], axis=0 if k == "task" else 1) for k in parts[0]}
        return Windows.of(joined, self.world_model.config.num_tasks > 0)

    def _keep(self, episodes: list[Episode]) -> None:
        """Append to the replay store. A killed run may have left episodes behind there, so the own ones are counted."""
        w, exists = self.world_model.config, self.replay_path.exists()
        before = EpisodeStore.open(self.replay_path).num_episodes if exists else 0
        with EpisodeWriter(
            self.replay_path, w.obs_dim, w.action_dim, task_names=[self.task.name], append=exists
        ) as writer:
            for e in episodes:
                writer.add(e.obs, e.action, e.reward, e.terminated)
        self._kept.append(list(range(before, before + len(episodes))))
        self._open_replay()

    def _open_replay(self) -> None:
        store = EpisodeStore.open(self.replay_path)
        recent = [i for kept in self._kept[-self.config.recent_rounds :] for i in kept]
        horizon = self._model.config.horizon
        self._fresh_starts = [WindowSampler(store, 1, recent, seed=s + 1) for s in self.extraction.seeds]
        if store.num_rows > horizon:
            self._fresh = WindowSampler(store, horizon, recent, seed=self.seed + 1, partial=True)

    # resume --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the replay store, whose own episodes are noted."""
        return {
            "rounds_done": self.rounds_done,
            "extraction": self.extraction.state_dict(),
            "model": self._model.state_dict(),
            "best_return": self.best_return,
            "best_policy": list(self.best_policy),
            "best_state": list(self._best_state),
            "rollbacks": self.rollbacks,
            "kept": [list(kept) for kept in self._kept],
            "real_length": self.real_length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds_done = int(state["rounds_done"])
        self._model.load_state_dict(state["model"])
        self.extraction.set_world_model(self.world_model)
        self.extraction.load_state_dict(state["extraction"])
        self.best_return = np.asarray(state["best_return"], np.float64)
        self.best_policy = list(state["best_policy"])
        self._best_state = list(state["best_state"])
        self.rollbacks = np.asarray(state["rollbacks"], np.int64)
        self._kept = [[int(i) for i in kept] for kept in state["kept"]]
        self.real_length = float(state["real_length"])
        if self._kept:
            self._open_replay()


def returns_to_go(episode: Episode, gamma: float) -> np.ndarray:
    """Discounted return from every step [T], float32. An episode cut by the time limit is taken to go on as it was."""
    value = 0.0 if episode.terminated else float(episode.reward[-100:].mean()) / (1.0 - gamma)
    out = np.empty(len(episode.reward), np.float32)
    for t in reversed(range(len(out))):
        out[t] = value = float(episode.reward[t]) + gamma * value
    return out


def real_episodes(
    task: str,
    policies: list[Policy],
    judged: int,
    explored: int,
    seed: int,
    draw: int,
    threads: int | None,
) -> list[list[Episode]]:
    """For every policy `judged` episodes with mean actions, then `explored` with sampled ones, all side by side."""
    each = judged + explored
    generators = [torch.Generator().manual_seed(1_000_003 * (seed + 1) + 1009 * draw + i) for i in range(len(policies))]

    def act(obs: np.ndarray) -> np.ndarray:
        out = []
        for i, policy in enumerate(policies):
            rows = torch.as_tensor(obs[i * each : (i + 1) * each])
            out.append(policy.act(rows[:judged]))
            if explored:
                out.append(policy.act(rows[judged:], deterministic=False, generator=generators[i]))
        return torch.cat(out).numpy()

    results = evaluate(task, act, each * len(policies), seed, record=True, threads=threads)
    assert results.episodes is not None
    return [results.episodes[i * each : (i + 1) * each] for i in range(len(policies))]


@torch.no_grad()
def imagined_over_real(model: WorldModel, policy: Policy, episodes: list[Episode], task: Tensor | None) -> float:
    """Imagined over real reward of the first `GAUGE_STEPS` steps of some episodes, both with mean actions."""
    obs = torch.as_tensor(np.stack([e.obs[0] for e in episodes]))
    steps = min(GAUGE_STEPS, max(len(e.reward) for e in episodes))
    z, alive, imagined = model.encode(obs, task), torch.ones(len(obs)), 0.0
    for _ in range(steps):
        action = policy.act_latent(z)
        imagined += float((alive * model.reward(z, action, task)).mean())
        z = model.next(z, action, task)
        if model.has_termination:
            alive = alive * torch.sigmoid(-model.termination_logit(z, task))
    real = float(np.mean([e.reward[:steps].sum() for e in episodes]))
    return imagined / real if abs(real) > 1e-6 else float("nan")
