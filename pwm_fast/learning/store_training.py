"""A pre-training run on episode stores: split, normalisation, batches, validation; of one task or of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.learning.model_validation import validate
from pwm_fast.learning.pretraining import Pretraining, PretrainingConfig, Windows
from pwm_fast.learning.task_windows import SAMPLED, TaskData, TaskWindows, pooled_statistics
from pwm_fast.models.world_model import WorldModel

VALIDATION_BATCH = 256


def fit_normalisation(model: WorldModel, statistics: dict[str, Any]) -> None:
    """Set observation mean and deviation, and the reward scale, from a store's statistics.

    Constant observation entries get deviation 1. A linear two-hot head clamps to [vmin, vmax], so 98% of the rewards
    fill half of that range and a policy better than the data still has room; symlog heads keep scale 1.
    """
    std = torch.as_tensor(statistics["obs_std"], dtype=torch.float32)
    model.obs_mean.copy_(torch.as_tensor(statistics["obs_mean"], dtype=torch.float32))
    model.obs_std.copy_(torch.where(std > 1e-4, std, torch.ones_like(std)))
    if not model.config.reward_symlog:
        quantiles = statistics["reward_quantiles"]
        largest = max(abs(quantiles["0.01"]), abs(quantiles["0.99"]), 1e-6)
        model.reward_scale.fill_(largest / (0.5 * model.config.vmax if model.config.num_bins > 1 else 1.0))


@torch.no_grad()
def fit_steps(model: WorldModel, windows: Windows) -> None:
    """Set mean and deviation of a step's change of the latent state, where the model predicts that."""
    if model.config.residual:
        z = model.encode(windows.obs, windows.task)
        change = (z[1:] - z[:-1]).flatten(0, 1)
        model.step_mean.copy_(change.mean(0))
        model.step_std.copy_(change.std(0).clamp(min=1e-4))


class StoreTraining:
    """Everything of a pre-training run on the episodes of one task or many: normalisation, batches, validation.

    `data`: a store, whose tasks have its own numbers where the model has task embeddings, or a `TaskData`. A part of
    each task's episodes is held out; validation windows are the same at every call and `validation_horizon` steps
    long, whatever the training's. Raises ValueError where data and model differ in widths or number of tasks.
    """

    def __init__(
        self,
        data: EpisodeStore | TaskData,
        model: WorldModel,
        config: PretrainingConfig,
        seed: int = 0,
        validation_batches: int = 4,
        validation_horizon: int = 16,
    ):
        c = model.config
        if isinstance(data, EpisodeStore):
            data = TaskData.of_store(data, c.num_tasks > 0, seed=seed)
        self.data, space = data, data.space
        if (space.obs_dim, space.action_dim) != (c.obs_dim, c.action_dim):
            raise ValueError(
                f"the data has {space.obs_dim} observations and {space.action_dim} actions, the world model "
                f"{c.obs_dim} and {c.action_dim}"
            )
        if len(space.names) != max(c.num_tasks, 1):
            raise ValueError(f"the data has {len(space.names)} tasks, the world model {c.num_tasks}")
        self.statistics = pooled_statistics(data, seed)
        fit_normalisation(model, self.statistics)
        with_task, device = c.num_tasks > 0, model.obs_mean.device

        def windows(batches: TaskWindows) -> Callable[[int], Windows]:
            return lambda step: Windows.of(batches(step), with_task, device)

        fit_steps(model, windows(TaskWindows(data, 1, SAMPLED, seed, partial=False))(0))
        training = TaskWindows(data, config.horizon, config.batch_size, seed, prefetch=True)
        # left on the host: a captured step takes them to the device without waiting
        self.pretraining = Pretraining(model, config, lambda step: Windows.of(training(step), with_task))
        self._looks: dict[str, list[list[Windows]]] = {}  # by task: whole windows, and any
        for task in data.tasks:
            self._looks[space.names[task]] = [
                [batch(i) for i in range(validation_batches)]
                for partial in (False, True)
                for batch in [windows(TaskWindows(data.only(task), validation_horizon, VALIDATION_BATCH, seed + 1,
                                                  partial=partial, held_out=True))]
            ]  # fmt: skip

    def validate(self) -> dict[str, float]:
        """The numbers of `model_validation.validate`; of many tasks their means, and each one's as "TASK/NAME"."""
        each = {task: validate(self.pretraining.model, *looks) for task, looks in self._looks.items()}
        if len(each) == 1:
            return next(iter(each.values()))
        names = {name: None for found in each.values() for name in found}
        means = {name: float(np.mean([found[name] for found in each.values() if name in found])) for name in names}
        return means | {f"{task}/{name}": value for task, found in each.items() for name, value in found.items()}
