"""A policy that is one actor on raw observations, without a world model's encoder: what SHAC leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pwm_fast.learning.normalisation import RunningNormalisation
from pwm_fast.models.policy import Actor
from pwm_fast.state_files import read_json, replacing, write_json

FORMAT = "pwm_fast.actor_policy.1"
WEIGHTS_FILE, DESCRIPTION_FILE = "policy.safetensors", "policy.json"


class ActorPolicy:
    """Raw observations [..., S] in, actions [..., A] in [-1, 1] out. `description` goes to policy.json.

    Used as `pwm_fast.models.policy.Policy` is: `act`, `save`, `load`, `task`, `obs_dim`, `action_dim`.
    """

    def __init__(self, actor: Actor, description: dict[str, Any]):
        self._actor, self.description = actor, description

    @property
    def task(self) -> str:
        return self.description["task"]

    @property
    def obs_dim(self) -> int:
        return self.description["obs_dim"]

    @property
    def action_dim(self) -> int:
        return self.description["action_dim"]

    @staticmethod
    def fold(actor: Actor, normalisation: RunningNormalisation, task: str, ignored: int = 0) -> ActorPolicy:
        """A copy of a population's only actor with the normalisation folded into its first layer.

        The last `ignored` entries of the observation get weight 0: the actor was trained with zeros there.
        """
        tensors = actor.parameters.tensors(0)
        obs_dim, action_dim = actor.mlp.widths[0], actor.mlp.widths[-1]
        weight = tensors["0.weight"].double() * normalisation.scale.double()
        weight[:, obs_dim - ignored :] = 0.0
        tensors["0.bias"] = (tensors["0.bias"].double() - weight @ normalisation.mean.double()).float()
        tensors["0.weight"] = weight.float()
        description = {
            "format": FORMAT,
            "task": task,
            "obs_dim": obs_dim,
            "action_dim": action_dim,
            "actor_units": list(actor.mlp.widths[1:-1]),
        }
        return ActorPolicy.from_tensors(tensors, description)

    @torch.no_grad()
    def act(
        self, obs: Tensor | np.ndarray, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        """Actions for observations; numpy in, numpy out. `deterministic` takes the mean, else one sample per row.

        Raises ValueError on another observation size.
        """
        x = torch.as_tensor(obs).float()
        if x.dim() == 0 or x.shape[-1] != self.obs_dim:
            raise ValueError(f"observations must have {self.obs_dim} entries ({self.task}), got {tuple(x.shape)}")
        rows = x.reshape(1, -1, self.obs_dim)
        if deterministic:
            action = self._actor.mean(rows)
        else:
            noise = torch.randn(1, rows.shape[1], self.action_dim, generator=generator)
            action = self._actor.forward(rows, noise).action
        action = action.reshape(*x.shape[:-1], self.action_dim)
        return action.numpy() if isinstance(obs, np.ndarray) else action

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return self._actor.parameters.tensors(0)

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], description: dict[str, Any]) -> ActorPolicy:
        """The inverse of `tensors`; raises ValueError on missing, unknown or wrongly shaped ones."""
        units = tuple(description["actor_units"])
        actor = Actor([0], description["obs_dim"], description["action_dim"], units)
        actor.parameters.load(0, tensors)
        return ActorPolicy(actor, dict(description))

    def save(self, directory: str | Path) -> Path:
        """Write `policy.safetensors` and `policy.json` into `directory`; each is whole or absent. Raises OSError."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS_FILE) as part:
            save_file({k: v.contiguous() for k, v in self.tensors().items()}, part, metadata={"format": FORMAT})
        write_json(directory / DESCRIPTION_FILE, self.description)
        return directory / WEIGHTS_FILE

    @staticmethod
    def load(path: str | Path) -> ActorPolicy:
        """Read the policy in a folder, or beside either of its files. Raises FileNotFoundError or ValueError."""
        folder = policy_folder(path)
        description = read_json(folder / DESCRIPTION_FILE)
        try:
            tensors = load_file(folder / WEIGHTS_FILE)
            if broken := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
                raise ValueError(f"NaN or infinite numbers in {', '.join(broken)}")
            return ActorPolicy.from_tensors(tensors, description)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the policy in {folder} is damaged: {error}") from error


def policy_folder(path: str | Path) -> Path:
    """The folder of a policy's two files; raises FileNotFoundError where one is missing."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    for name in (WEIGHTS_FILE, DESCRIPTION_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path} holds no policy: {folder / name} does not exist")
    return folder


def load_policy(path: str | Path) -> Any:
    """Any saved policy: SHAC's (`ActorPolicy`) or an extracted one (`pwm_fast.models.policy.Policy`)."""
    folder = policy_folder(path)
    description = read_json(folder / DESCRIPTION_FILE)
    if isinstance(description, dict) and description.get("format") == FORMAT:
        return ActorPolicy.load(folder)
    from pwm_fast.models.policy import Policy

    return Policy.load(folder)
