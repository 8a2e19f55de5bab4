"""Extraction in rounds: practise, learn the model, extract, and now and then look at reality.

A round is a number of cycles (PWM appendix C.4: the collect-and-retrain loop, turned fast). In a cycle the policies act
for a while in the real environment, the world model learns from that and from the given data, and the policies take
extraction steps: along the real trajectories, where the model supplies the derivatives, or from real states on in
imagination. After a round, whole episodes with mean actions judge the policies, and the best of each seed is kept. With
a frozen model a cycle is extraction steps from the data alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast.baselines.cloning import clone
from pwm_fast.data.episodes import EpisodeStore, WindowSampler
from pwm_fast.data.start_states import StartStates
from pwm_fast.data.task_table import fitted
from pwm_fast.envs import registry
from pwm_fast.learning.captured import StepGraph
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.experience import Experience
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.members import Source, find_source
from pwm_fast.learning.pretraining import PRESETS, Pretraining, Windows
from pwm_fast.learning.reality import Look, imagined_over_real, real_episodes, returns_to_go
from pwm_fast.learning.step_inputs import StagedStates, StagedTrajectories, StartTable, start_rows
from pwm_fast.models.policy import Policy
from pwm_fast.models.world_model import WorldModel

TABLE_BYTES = 4 * 10**9  # start states that take more stay on the host
Timed = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class RoundConfig:
    """What one round does. `model_steps` = 0 keeps the world model frozen, and the policies out of the environment."""

    cycles: int = 20
    extraction_steps: int = 1  # a cycle
    model_steps: int = 8  # a cycle
    practice_steps: int = 32  # a cycle, in each environment
    practice_envs: int = 64  # per policy
    practice_length: int = 200  # steps of a practice episode: beginnings, where most falls are, come often
    warm_up_steps: int = 640  # of practice before the first cycle
    capacity: int = 65_536  # transitions of practice that are kept
    grounded: bool = True  # extract along real trajectories, else in imagination from real states
    model_batch_size: int | None = None  # windows; None: as in pre-training
    model_lr: float = 5e-4
    encoder_lr_scale: float = 0.0  # a still encoder keeps latents, so actors and critics, valid
    new_windows: float = 0.5  # share of the model's windows that come from practice
    evaluation_episodes: int = 64
    critic_episodes: int = 48  # with sampled actions: what a clone's critics start from
    rollback: float = 0.97  # a clone below this share of its best real return goes back to that best

    def __post_init__(self) -> None:
        least = {"cycles": 1, "extraction_steps": 1, "model_steps": 0, "practice_steps": 1, "practice_envs": 1}
        least |= {"practice_length": 1, "evaluation_episodes": 1, "critic_episodes": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be >= {smallest}, got {getattr(self, name)}")


def default_rounds(tasks: Sequence[str]) -> RoundConfig:
    """Rounds for tasks: where a simulator takes one environment at a time, real episodes are few."""
    if all(registry.get(task).suite == "dflex" for task in tasks):
        return RoundConfig()
    return RoundConfig(cycles=50, practice_envs=16, practice_steps=16, evaluation_episodes=16, critic_episodes=16)


class ExtractionRounds:
    """The loop's state: world model, its optimiser, the policies, their practice and the best of them.

    Each policy learns the task that the extraction names for it; fine-tuning is for one task. `data` gives old windows,
    and start states where the model is frozen. Everything is a function of the seeds and the number of rounds done.
    With `execution` steps run over static memory (`StepGraph`), to the same numbers.
    """

    def __init__(
        self,
        world_model: WorldModel,
        extraction: Extraction,
        data: Sequence[EpisodeStore],
        config: RoundConfig,
        seed: int = 0,
        threads: int | None = None,
        execution: ExecutionConfig | None = None,
    ):
        self.tasks = [registry.get(name) for name in extraction.tasks]
        self.execution = execution
        self._graph: StepGraph | None = None
        self.world_model, self.extraction, self.config = world_model, extraction, config
        self.seed, self.threads = seed, threads
        self.rounds_done = 0
        self.cloned = False  # whether the actors began as clones
        self.stretch = 1  # times the cycles of a round with a frozen model: more where looks cost more than steps
        population = len(extraction.seeds)
        self.best_return = np.full(population, -np.inf)  # of the policies of highest merit
        self._best_merit = np.full(population, -np.inf)
        self.best_policy: list[dict[str, Tensor]] = [p.tensors() for p in extraction.policies()]
        self._best_actor: list[dict[str, Tensor]] = [{} for _ in extraction.seeds]
        self.rollbacks = np.zeros(population, np.int64)
        self._sources = {task.name: find_source(data, task) for task in self.tasks}
        drawn = {name: WindowSampler(source.store, 1, tasks=source.task) for name, source in self._sources.items()}
        samplers = [drawn[t.name].with_seed(seed) for t, seed in zip(self.tasks, extraction.seeds, strict=True)]
        self._starts = StartStates(samplers, extraction.config.batch_size, world_model.config.obs_dim)
        usual = PRESETS[world_model.config.latent]
        self._longest = max(usual.horizon, extraction.config.horizon, config.practice_steps)  # window of practice
        self.experience: Experience | None = None
        if config.model_steps:
            if len(self._sources) > 1:
                raise ValueError(
                    f"fine-tuning learns one task at a time, got {', '.join(self._sources)}: use --no-finetune"
                )
            least = population * config.practice_envs * self._longest
            self.experience = Experience(
                self.tasks[0], population, config.practice_envs, max(config.capacity, least), seed + 1, threads,
                config.practice_length,
            )  # fmt: skip
        old = self._own_sources()[0]
        self._old = WindowSampler(old.store, usual.horizon, seed=seed, partial=True, tasks=old.task)
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

    def start_from_clones(self) -> None:
        """Set the actors to imitate the best of the data, before the first round."""
        clone(self.extraction, self.world_model, [(s.store, s.episodes) for s in self._own_sources()])
        self.extraction.average.copy_(self.extraction.actor.parameters.flat)
        self.cloned = True

    def fit_critics(self, looks: list[Look]) -> None:
        """Start the critics from the real discounted returns of each policy's own episodes [P]."""
        gamma, episodes = self.extraction.config.gamma, [look.judged + look.explored for look in looks]
        obs = [torch.from_numpy(self._wide(np.concatenate([e.obs[:-1] for e in own]))) for own in episodes]
        target = [torch.from_numpy(np.concatenate([returns_to_go(e, gamma) for e in own])) for own in episodes]
        self.extraction.fit_critics(obs, target)

    # one round -----------------------------------------------------------------------------------------------------

    def learn(
        self,
        most: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        timed: Timed = lambda name: nullcontext(),
    ) -> dict[str, Any]:
        """The round's cycles, with at most `most` extraction steps; the mean of each metric (of the policies [P])."""
        totals: dict[str, Any] = {}
        left, cycles, config = most or 10**9, 0, self.config
        if self.experience is None:
            config = replace(config, cycles=config.cycles * self.stretch)
            if self.execution is not None:  # nothing comes between a round's steps
                config = replace(config, cycles=1, extraction_steps=config.cycles * config.extraction_steps)
        with self._starts:  # its workers end with the round, however that ends
            while cycles < config.cycles and left > 0:
                metrics: dict[str, Any] = {}
                if self.experience is not None:
                    with timed("practice"):
                        self._practise(self.experience)
                    with timed("model learning"):
                        metrics |= self._learn_model()
                with timed("extraction"):
                    steps = min(config.extraction_steps, left)
                    metrics |= self._extract(steps)
                totals = {k: totals.get(k, 0.0) + v for k, v in metrics.items()}
                left, cycles = left - steps, cycles + 1
                if stop():
                    break
        return {k: (v.cpu().numpy() if isinstance(v, Tensor) else v) / cycles for k, v in totals.items()}

    def _practise(self, experience: Experience) -> None:
        c = self.config
        steps = c.practice_steps if experience.steps else max(c.warm_up_steps, self._longest)
        experience.practise(self._policies_here(), steps)

    def _learn_model(self) -> dict[str, float]:
        """Model steps; the policies go on with the new model. The mean loss terms."""
        rows = [self._model.step() for _ in range(self.config.model_steps)]
        self.extraction.set_world_model(self.world_model)
        return {f"model_{k}": float(np.mean([row[k] for row in rows])) for k in rows[0]}

    def _extract(self, steps: int) -> dict[str, Tensor]:
        """Extraction steps; the mean of each metric [P] over them."""
        if self.execution is not None:
            return self._replay(steps)
        rows = []
        for _ in range(steps):
            step = int(self.extraction.iteration)
            if self.experience is None:
                with self._starts.at(step) as batch:
                    rows.append(self.extraction.step(batch["obs"]))
            elif self.config.grounded:
                rows.append(self.extraction.step_along(**self._trajectories(self.experience, step)))
            else:
                rows.append(self.extraction.step(self._practised_states(self.experience, step)))
        return {k: torch.stack([row[k] for row in rows]).mean(0) for k in rows[0]}

    def _replay(self, steps: int) -> dict[str, Tensor]:
        """`_extract` over static memory."""
        begun, learner, experience = int(self.extraction.iteration), self.extraction, self.experience
        if self._graph is None:
            self._graph = self._make_graph()
        if isinstance(self._graph.inputs, StagedTrajectories):
            assert experience is not None
            rows = self._graph.run(steps, lambda i: self._trajectories(experience, begun + i))
        elif isinstance(self._graph.inputs, StagedStates):
            feed = self._starts.at if experience is None else partial(self._practised_states, experience)
            rows = self._graph.run(steps, lambda i: feed(begun + i))
        else:
            rows = self._graph.run(steps)
        return {name: value.mean(0).to(learner.iteration.device) for name, value in rows.items()}

    def _make_graph(self) -> StepGraph:
        learner, execution = self.extraction, self.execution
        assert execution is not None
        if self.experience is not None and self.config.grounded:
            return StepGraph(learner, StagedTrajectories(learner), replace(execution, overlap=False))
        rows = sum(int(s.store.lengths[s.episodes].sum()) for s in self._sources.values())
        if self.experience is not None or 4 * self.world_model.config.obs_dim * rows > TABLE_BYTES:
            return StepGraph(learner, StagedStates(learner), execution)
        tables = {name: self._wide(start_rows(s.store, s.episodes)) for name, s in self._sources.items()}
        return StepGraph(learner, StartTable.of_tasks(learner, tables), execution)

    def look_at_reality(self) -> dict[str, np.ndarray]:
        """Real episodes of every policy with mean actions; returns [P] arrays, and updates the best policies.

        `real_return`, `real_length`, `success` (where tasks tell): their means. `imagined_over_real`: imagined over
        real reward in the first steps of the same episodes; far above 1 is the sign of an exploited model.
        """
        c = self.config
        policies = self._policies_here(averaged=True)
        explored = c.critic_episodes if self.cloned and self.rounds_done == 0 else 0
        looks = real_episodes(
            [task.name for task in self.tasks], policies, c.evaluation_episodes, explored, self.seed + 1,
            self.rounds_done, self.threads,
        )  # fmt: skip
        gauges = []
        for i, (policy, look) in enumerate(zip(policies, looks, strict=True)):
            there = policy.to(self.world_model.obs_mean.device)
            gauges.append(imagined_over_real(self.world_model, there, look.judged, self._task_id(i)))
            self._keep_best(i, look, policy)
        if explored:
            self.fit_critics(looks)
        found = {
            "real_return": np.array([look.real_return for look in looks]),
            "real_length": np.array([look.length for look in looks]),
            "imagined_over_real": np.array(gauges),
            "rollbacks": self.rollbacks.copy(),
        }
        if any(look.successes is not None for look in looks):
            found["success"] = np.array([np.nan if k.successes is None else np.mean(k.successes) for k in looks])
        return found

    def _keep_best(self, i: int, look: Look, policy: Policy) -> None:
        """Note a new best policy; take a clone that has lost its way back to it.

        What it did on the way has taught the model and the critics, so the next attempt is another one.
        """
        learner, best = self.extraction, self._best_merit[i]
        if look.merit > self._best_merit[i]:
            self._best_merit[i], self.best_return[i] = look.merit, look.real_return
            self.best_policy[i] = policy.tensors()
            self._best_actor[i] = learner.actor_adam.snapshot(i) | {"value": learner.average[i].clone()}
        elif self.cloned and look.merit < best - (1 - self.config.rollback) * abs(best):
            learner.actor_adam.restore(i, self._best_actor[i])
            learner.average[i] = self._best_actor[i]["value"]
            self.rollbacks[i] += 1

    def _policies_here(self, averaged: bool = False) -> list[Policy]:
        """The policies on the CPU, where the simulators are."""
        policies = self.extraction.policies(averaged)
        return [p.to("cpu") for p in policies] if self.extraction.iteration.is_cuda else policies

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

    def _own_sources(self) -> list[Source]:
        """[P]: where each policy's task's episodes are."""
        return [self._sources[task.name] for task in self.tasks]

    def _task_id(self, policy: int) -> Tensor | None:
        ids = self.extraction.task_ids
        return None if ids is None else ids[policy]

    def _practised_states(self, experience: Experience, step: int) -> np.ndarray:
        """[P, B, S]: from the policies' own practice."""
        batch = self.extraction.config.batch_size
        return self._wide(np.stack([experience.start_states(i, step, batch) for i in range(experience.policies)]))

    def _trajectories(self, experience: Experience, step: int) -> dict[str, Tensor]:
        """Windows of each policy's last practice: obs [H+1, P, B, S], action [H, P, B, A], ..."""
        c = self.extraction.config
        recent = max(self.config.practice_steps, c.horizon)
        each = [
            experience.windows(step, c.batch_size, c.horizon, policy=i, recent=recent, cuts=False)
            for i in range(experience.policies)
        ]
        names = ("obs", "action", "reward", "terminated", "valid")
        joined = {name: np.stack([w[name] for w in each], 1) for name in names}
        return {name: torch.from_numpy(value) for name, value in self._fitted(joined).items()}

    def _wide(self, obs: np.ndarray) -> np.ndarray:
        """Observations of a task as the world model takes them."""
        return fitted(obs, self.world_model.config.obs_dim)

    def _fitted(self, windows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Windows of a task as the world model takes them."""
        action = fitted(windows["action"], self.world_model.config.action_dim)
        return {**windows, "obs": self._wide(windows["obs"]), "action": action}

    def _model_batch(self, step: int) -> Windows:
        batch = self._model.config.batch_size
        new = int(batch * self.config.new_windows)
        assert self.experience is not None, "a frozen model learns nothing"
        parts = [self.experience.windows(step, new, self._model.config.horizon)] if new else []
        parts += [self._old.windows(step, batch - new)] if batch > new else []
        parts = [self._fitted(part) for part in parts]
        for part in parts:  # a store's own number of the task may be another
            part["task"][:] = 0 if self.extraction.task_ids is None else int(self.extraction.task_ids[0])
        joined = {k: np.concatenate([p[k] for p in parts], axis=0 if k == "task" else 1) for k in parts[0]}
        return Windows.of(joined, self.world_model.config.num_tasks > 0, self.world_model.obs_mean.device)

    # resume --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "rounds_done": self.rounds_done,
            "cloned": self.cloned,
            "stretch": self.stretch,
            "extraction": self.extraction.state_dict(),
            "model": self._model.state_dict(),
            "experience": None if self.experience is None else self.experience.state_dict(),
            "best_return": self.best_return,
            "best_merit": self._best_merit,
            "best_policy": list(self.best_policy),
            "best_actor": list(self._best_actor),
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds_done, self.cloned = int(state["rounds_done"]), bool(state["cloned"])
        self.stretch = int(state["stretch"])
        self._model.load_state_dict(state["model"])
        self.extraction.set_world_model(self.world_model)
        self.extraction.load_state_dict(state["extraction"])
        if self.experience is not None:
            self.experience.load_state_dict(state["experience"])
        self.best_return = np.asarray(state["best_return"], np.float64)
        self._best_merit = np.asarray(state["best_merit"], np.float64)
        self.best_policy = list(state["best_policy"])
        self._best_actor = list(state["best_actor"])
        self.rollbacks = np.asarray(state["rollbacks"], np.int64)
