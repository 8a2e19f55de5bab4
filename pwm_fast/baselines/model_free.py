"""SAC of Stable-Baselines3 on any task with a Gymnasium environment, an episode at a time, exactly resumable.

SAC explores by noise alone, so it needs rewards that guide it: on sparse ones (pendulum-swingup, or
cartpole-swingup-sparse) 20,000 steps end where they began. Take demonstrations or planning there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch

from pwm_fast.data.collect import derived_seed
from pwm_fast.data.recording import EpisodeAssembler
from pwm_fast.envs.evaluation import Episode
from pwm_fast.envs.extras import import_extra
from pwm_fast.envs.registry import Task
from pwm_fast.errors import positive


@dataclass(frozen=True)
class SACConfig:
    """Stable-Baselines3's defaults, but more random steps. `update_every`: environment steps per gradient step."""

    units: tuple[int, ...] = (256, 256)
    batch_size: int = 256
    learning_rate: float = 3e-4
    gamma: float = 0.99
    random_steps: int = 1000
    update_every: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "random_steps", "update_every"):
            positive(name, getattr(self, name))
        if not self.units or min(self.units) < 1 or not 0 < self.gamma < 1:
            raise ValueError(f"units must be >= 1 and gamma in (0, 1), got {self.units} and {self.gamma}")


class RecordedEpisodes(gymnasium.Wrapper):
    """Episode number n begins with a seed of its own; `take` gives what the environment showed and was given."""

    def __init__(self, env: gymnasium.Env, seed: int):
        super().__init__(env)
        self._seed, self.number = seed, 0
        self._assembler, self._ended = EpisodeAssembler(1), list[Episode]()
        self._obs: np.ndarray

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        obs, info = self.env.reset(seed=derived_seed(self._seed, self.number), options=options)
        self.number += 1
        self._obs = np.array(obs, np.float32)
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        after = np.array(obs, np.float32)
        columns = (self._obs, np.array(action, np.float32), np.float32(reward), terminated, truncated, after)
        self._ended += self._assembler.add(*(np.asarray(column)[None, None] for column in columns))
        self._obs = after
        return obs, reward, terminated, truncated, info

    def take(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


class SACTraining:
    """One task's training, an episode at a time; a function of task, seed and configuration."""

    def __init__(self, task: Task, config: SACConfig, seed: int, buffer_size: int):
        baselines = import_extra("stable_baselines3", "baselines")
        self._frequency = import_extra("stable_baselines3.common.type_aliases", "baselines")
        self.task, self.config, self.seconds = task, config, 0.0
        self.env = RecordedEpisodes(task.make(), seed)
        self.model = baselines.SAC(
            "MlpPolicy",
            self.env,
            learning_rate=config.learning_rate,
            buffer_size=buffer_size,
            learning_starts=config.random_steps,
            batch_size=config.batch_size,
            gamma=config.gamma,
            train_freq=config.update_every,
            policy_kwargs={"net_arch": list(config.units)},
            seed=seed,
            device="cpu",
        )
        self._callback: Any = None

    @property
    def steps(self) -> int:
        return self.model.num_timesteps

    def episode(self) -> Episode:
        """Act and learn until an episode ends."""
        model, c, begun = self.model, self.config, time.monotonic()
        if self._callback is None:
            _, self._callback = model._setup_learn(1, None, reset_num_timesteps=self.steps == 0)
        every = self._frequency.TrainFreq(c.update_every, self._frequency.TrainFrequencyUnit.STEP)
        ended: list[Episode] = []
        while not ended:
            model.collect_rollouts(model.get_env(), self._callback, every, model.replay_buffer, None, c.random_steps)
            if self.steps > c.random_steps:
                model.train(1, c.batch_size)
            ended = self.env.take()
        self.seconds += time.monotonic() - begun
        return ended[0]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the replay buffer; between episodes only."""
        model = self.model
        name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (the buffer's)
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "episodes": self.env.number - 1,  # the next one has begun
            "updates": model._n_updates,
            "policy": dict(model.policy.state_dict()),
            "entropy": model.log_ent_coef.detach(),
            "optimizers": [
                {str(i): state for i, state in optimizer.state_dict()["state"].items()}
                for optimizer in self._optimizers()
            ],
            "torch": torch.get_rng_state(),
            "numpy": [name, np.asarray(keys), position, has_gauss, gauss],
            "random_actions": model.action_space.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any], episodes: Sequence[Episode]) -> None:
        """Go on where `state_dict` was taken; `episodes` are all that came before."""
        model = self.model
        model.num_timesteps, model._n_updates, self.seconds = state["steps"], state["updates"], state["seconds"]
        model._episode_num = self.env.number = state["episodes"]
        model.policy.load_state_dict(state["policy"])
        model.log_ent_coef.data.copy_(state["entropy"])
        for optimizer, saved in zip(self._optimizers(), state["optimizers"]):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": {int(i): s for i, s in saved.items()}, "param_groups": groups})
        for episode in episodes:
            self._remember(episode)
        model._setup_learn(0, None, reset_num_timesteps=False)  # begins the next episode
        torch.set_rng_state(state["torch"])
        np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
        model.action_space.np_random.bit_generator.state = state["random_actions"]

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.model.actor.optimizer, self.model.critic.optimizer, self.model.ent_coef_optimizer]

    def _remember(self, episode: Episode) -> None:
        """Into the replay buffer, as `collect_rollouts` puts it there."""
        last = len(episode.reward) - 1
        for t, (action, reward) in enumerate(zip(episode.action, episode.reward)):
            done, timeout = t == last, t == last and not episode.terminated
            row = (episode.obs[t], episode.obs[t + 1], action, reward, done)
            infos = [{"TimeLimit.truncated": timeout}]
            self.model.replay_buffer.add(*(np.asarray(value)[None] for value in row), infos)
