"""TD-MPC2's planning for a task of the registry, out of files: a world model, and what guides the search in it.

The guide is, in this order: a run of extraction (`guide=`; its critics are in its checkpoint), a saved policy (without
critics the end of a plan is worth nothing), or the policy and Q functions in a checkpoint of TD-MPC2 itself. Without
any of them plans are longer, for they see no value beyond their end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pwm_fast.baselines.guides import ActorGuide, Guide, load_q_guide
from pwm_fast.baselines.mppi import MPPIConfig
from pwm_fast.baselines.tdmpc2_planning import TDMPC2Planner, WorldModelDynamics, published_discount
from pwm_fast.data.collect import RandomActions, Source, check_noise_levels, derived_seed, noise_level, noise_phase
from pwm_fast.data.task_table import fitted
from pwm_fast.data.torch_files import is_torch_file
from pwm_fast.envs.evaluation import Episode, evaluate
from pwm_fast.envs.registry import Task
from pwm_fast.learning.members import task_number
from pwm_fast.models.critic import Critic
from pwm_fast.models.policy import Actor, Policy
from pwm_fast.models.world_model import WorldModel
from pwm_fast.state_files import load_state

UNGUIDED_HORIZON = 16
MakeGuide = Callable[[Tensor | None, Tensor | None], Guide | None]
"""(the world model's task index [1] or None, action mask [1, A] or None) -> the guide."""


def default_planning(task: Task, guided: bool) -> MPPIConfig:
    """TD-MPC2's settings; without a guide, a longer horizon and no trajectories of a policy."""
    config = MPPIConfig.published(task.action_dim)
    return config if guided else replace(config, horizon=UNGUIDED_HORIZON, policy_trajectories=0)


class ModelPlanner:
    """Raw observations [N, s] of a task in, actions [N, a] out; the plan of each row goes on from its last one.

    Raises ValueError as `task_number` does.
    """

    def __init__(
        self, task: Task, model: WorldModel, make_guide: MakeGuide | None = None, config: MPPIConfig | None = None,
        seed: int = 0,
    ):  # fmt: skip
        number = task_number(model, task)
        index = None if number is None else torch.tensor([number])
        c, self._task, self._seed = model.config, task, seed
        mask = (torch.arange(c.action_dim) < task.action_dim).to(model.obs_mean)[None]
        self._mask = None if task.action_dim == c.action_dim else mask
        self._guide = None if make_guide is None else make_guide(index, self._mask)
        self._config = config or default_planning(task, self._guide is not None)
        self._dynamics, self._obs_dim = WorldModelDynamics(model, index), c.obs_dim
        self._action_dim, self._dtype = c.action_dim, model.obs_mean.dtype
        self._planner: TDMPC2Planner | None = None

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        if self._planner is None or self._planner.num_envs != len(obs):
            discount = published_discount(self._task.episode_length)
            self._planner = TDMPC2Planner(
                self._dynamics, self._action_dim, len(obs), self._guide, self._config, discount, self._mask,
                self._seed, self._dtype,
            )  # fmt: skip
        return self._planner(fitted(obs, self._obs_dim))[:, : self._task.action_dim]


def find_guide(world_model: str | Path, model: WorldModel, guide: str | Path | None = None) -> MakeGuide | None:
    """How to make the guide that the files hold (see above); None where there is none.

    Raises FileNotFoundError, and ValueError for a guide that was not made on this world model.
    """
    if guide is not None:
        found = _from_run(Path(guide), model)
        return lambda index, mask: found
    if not is_torch_file(world_model):
        return None
    return lambda index, mask: load_q_guide(world_model, model, index, mask)


def _from_run(folder: Path, model: WorldModel) -> ActorGuide:
    policy = Policy.load(folder)
    c = model.config
    if (policy.description["latent_dim"], policy.action_dim) != (c.latent_dim, c.action_dim):
        raise ValueError(
            f"{folder} holds a policy of {policy.description['latent_dim']} latents and {policy.action_dim} actions; "
            f"the world model has {c.latent_dim} and {c.action_dim}: give a policy extracted from it"
        )
    if not (folder / "checkpoint.safetensors").is_file():
        return ActorGuide.of_policy(policy)
    state = load_state(folder / "checkpoint.safetensors")["rounds"]
    chosen = int(np.nan_to_num(np.asarray(state["best_return"], float), nan=-np.inf).argmax())
    state = state["extraction"]
    settings, count = state["config"], state["config"]["num_critics"]
    actor = Actor([0], c.latent_dim, c.action_dim, tuple(settings["actor_units"]))
    actor.parameters.flat.copy_(state["actor"][chosen : chosen + 1])
    critic = Critic([0], c.latent_dim, count, tuple(settings["critic_units"]))
    critic.parameters.flat.copy_(state["critic"][chosen * count : (chosen + 1) * count])
    return ActorGuide(actor, critic)


def model_source(
    task: Task,
    model: WorldModel,
    seed: int,
    levels: Sequence[float],
    make_guide: MakeGuide | None = None,
    config: MPPIConfig | None = None,
    threads: int | None = None,
) -> Source:
    """Episodes of planning in a world model at each of the noise levels in turn.

    Raises ValueError as `task_number` does, and for levels outside [0, 1].
    """
    check_noise_levels(levels)
    task_number(model, task)
    title = "planning in the world model"

    def batch(first: int, count: int) -> Iterator[tuple[str, Episode]]:
        mine = [noise_level(levels, number) for number in range(first, first + count)]
        level = np.array(mine)[:, None]
        planner = ModelPlanner(task, model, make_guide, config, derived_seed(seed, first, 1))
        random = RandomActions(task.action_dim, derived_seed(seed, first, 2))

        def policy(obs: np.ndarray) -> np.ndarray:
            return (1.0 - level) * planner(obs) + level * random(obs)

        results = evaluate(task, policy, count, derived_seed(seed, first), record=True, threads=threads)
        return ((noise_phase(title, level), episode) for level, episode in zip(mine, results.episodes or []))

    return Source(task, title, batch)
