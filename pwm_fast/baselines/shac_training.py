"""Training SHAC to a budget: schedule, evaluations that keep the best policy, exact resume; in short, `train_shac`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pwm_fast.baselines.actor_policy import ActorPolicy
from pwm_fast.baselines.shac import SHAC, IterationMetrics, Rollout, SHACConfig
from pwm_fast.data.collect import derived_seed, one_torch_thread
from pwm_fast.envs import registry
from pwm_fast.envs.dflex import DifferentiableEnv
from pwm_fast.envs.evaluation import Episode, evaluate
from pwm_fast.errors import positive

ENVIRONMENT_STREAM, EVALUATION_STREAM = 0, 1


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns of fresh episodes under the deterministic policy of a moment."""

    iteration: int
    env_steps: int
    seconds: float
    return_mean: float
    return_std: float
    length_mean: float


@dataclass(frozen=True)
class SHACResult:
    """The best policy found, the evaluation that chose it, and all others."""

    policy: ActorPolicy
    best: Evaluation
    evaluations: list[Evaluation]
    env_steps: int
    seconds: float


class SHACTraining:
    """A run of SHAC on a task until `steps` environment steps or `minutes` of work are used up, whichever comes first.

    Learning rates follow the share of `steps` used, or without `steps` that of `minutes`; with `steps` alone a run is a
    function of its seed. `minutes` counts evaluations and whatever the callbacks do. Raises ValueError for bad budgets
    and UnknownTask.
    """

    def __init__(
        self,
        task: str,
        *,
        minutes: float | None = None,
        steps: int | None = None,
        seed: int = 0,
        config: SHACConfig | None = None,
        threads: int | None = None,
        num_evaluations: int | None = None,
        evaluation_episodes: int = 64,
    ):
        if minutes is None and steps is None:
            raise ValueError("give minutes, steps or both: a run needs an end")
        for name, value in (("minutes", minutes), ("steps", steps), ("evaluation_episodes", evaluation_episodes)):
            if value is not None:
                positive(name, value)
        self.task, self.seed, self.threads = registry.get(task), seed, threads
        self.minutes, self.evaluation_episodes = minutes, evaluation_episodes
        # an evaluation is up to 64k steps, five times as cheap as those of training: let them take a tenth at most
        often = min(2.0 * (minutes or 1e9), (steps or 1e9) / 30_000)
        self.num_evaluations = num_evaluations or min(max(round(often), 4), 30)
        self.config = config or default_config(task)
        per_iteration = self.config.num_envs * self.config.horizon
        self.iterations = None if steps is None else -(-steps // per_iteration)
        num_envs, env_seed = self.config.num_envs, derived_seed(seed, ENVIRONMENT_STREAM)
        env = DifferentiableEnv(task, num_envs, seed=env_seed, threads=threads, action_in_obs=False)
        self.shac = SHAC(env, self.config, seed, overlap=threads != 1)
        self.seconds = 0.0
        self.evaluations: list[Evaluation] = []
        self._evaluations_due = 0
        self.best: Evaluation | None = None
        self.best_policy: ActorPolicy | None = None

    @property
    def progress(self) -> float:
        """Share of the budget that sets the schedule, 0 to 1."""
        if self.iterations is not None:
            return min(self.shac.iterations / self.iterations, 1.0)
        assert self.minutes is not None
        return min(self.seconds / (60.0 * self.minutes), 1.0)

    @property
    def finished(self) -> bool:
        out_of_time = self.minutes is not None and self.seconds >= 60.0 * self.minutes
        return out_of_time or self.progress >= 1.0

    def run(
        self,
        stop: Callable[[], object] = lambda: False,
        on_iteration: Callable[[Rollout, IterationMetrics], None] | None = None,
        on_evaluation: Callable[[Evaluation, list[Episode]], None] | None = None,
    ) -> None:
        """Train until the budget is used up or `stop()`. Both at the end and in `on_iteration`, `state_dict` is a valid
        place to resume from: an iteration's evaluation comes before its callback.

        The evaluations lie evenly over the run, the last at its end.
        """
        clock = time.monotonic()
        with one_torch_thread():
            while not self.finished and not stop():
                rollout, metrics = self.shac.iteration(self.progress)
                self.seconds, clock = self.seconds + time.monotonic() - clock, time.monotonic()
                due = int(self.progress * self.num_evaluations)
                if self.finished or due > self._evaluations_due:
                    self._evaluations_due = due
                    self._evaluate(on_evaluation)
                if on_iteration is not None:
                    on_iteration(rollout, metrics)
                self.seconds, clock = self.seconds + time.monotonic() - clock, time.monotonic()
            if self.finished and not self.evaluations:
                self._evaluate(on_evaluation)

    def _evaluate(self, on_evaluation: Callable[[Evaluation, list[Episode]], None] | None) -> None:
        policy = self.shac.policy()
        seed = derived_seed(self.seed, EVALUATION_STREAM, self.shac.iterations)
        record = on_evaluation is not None
        results = evaluate(self.task, policy.act, self.evaluation_episodes, seed, record=record, threads=self.threads)
        evaluation = Evaluation(
            self.shac.iterations,
            self.shac.env_steps,
            round(self.seconds, 3),
            results.mean,
            results.std,
            float(results.lengths.mean()),
        )
        self.evaluations.append(evaluation)
        if self.best is None or evaluation.return_mean > self.best.return_mean:
            self.best, self.best_policy = evaluation, policy
        if on_evaluation is not None:
            on_evaluation(evaluation, results.episodes or [])

    def result(self) -> SHACResult:
        """Raises RuntimeError before the first evaluation."""
        if self.best is None or self.best_policy is None:
            raise RuntimeError("the run was stopped before its first evaluation: there is no policy to choose yet")
        return SHACResult(self.best_policy, self.best, self.evaluations, self.shac.env_steps, self.seconds)

    def state_dict(self) -> dict[str, Any]:
        best = self.best_policy
        return {
            "shac": self.shac.state_dict(),
            "seconds": self.seconds,
            "evaluations_due": self._evaluations_due,
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "best": None if self.best is None else asdict(self.best),
            "best_policy": None if best is None else {"tensors": best.tensors(), "description": best.description},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shac.load_state_dict(state["shac"])
        self.seconds = state["seconds"]
        self.evaluations = [Evaluation(**row) for row in state["evaluations"]]
        # a larger budget than before moves the points where evaluations are due
        self._evaluations_due = min(state["evaluations_due"], int(self.progress * self.num_evaluations))
        self.best = None if state["best"] is None else Evaluation(**state["best"])
        policy = state["best_policy"]
        self.best_policy = None if policy is None else ActorPolicy.from_tensors(**policy)


def default_config(task: str, num_envs: int | None = None) -> SHACConfig:
    """The settings of a task, with another number of environments if wanted."""
    return SHACConfig() if num_envs is None else SHACConfig(num_envs=num_envs)


def train_shac(
    task: str,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    config: SHACConfig | None = None,
    threads: int | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> SHACResult:
    """Train SHAC on a task and return its best policy.

    >>> result = train_shac("hopper", minutes=5)
    >>> result.best.return_mean, result.policy.act(obs)
    """
    training = SHACTraining(task, minutes=minutes, steps=steps, seed=seed, config=config, threads=threads)
    training.run(on_evaluation=None if on_evaluation is None else lambda evaluation, _: on_evaluation(evaluation))
    return training.result()
