"""What a planner knows beyond a world model's rewards: a policy prior and a value. From a checkpoint of TD-MPC2, which
brings both (a policy and Q functions), or from an extraction (actors and critics).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pwm_fast.data.stored_zip import ForeignFileError
from pwm_fast.data.torch_files import StoredTensor, open_torch_file
from pwm_fast.kernels import two_hot
from pwm_fast.learning.extraction import Extraction
from pwm_fast.models.critic import Critic
from pwm_fast.models.frozen import FrozenNetwork
from pwm_fast.models.policy import Actor, Policy
from pwm_fast.models.workspace import Workspace
from pwm_fast.models.world_model import FrozenLayer, FrozenWorldModel, NormedLinear, WorldModel

LOG_STD_RANGE = (-10.0, 2.0)  # of TD-MPC2's policies; newer checkpoints repeat it
# The order in which the first release lists an ensemble's parameters, which it does not name
OLD_NAMES = [f"{i}.{name}" for i in range(2) for name in ("weight", "bias", "ln.weight", "ln.bias")]
OLD_NAMES += ["2.weight", "2.bias"]


class Guide(Protocol):
    """Prior and value in latents z [N, K, Z]; random numbers come from the planner's generator."""

    def action(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """A sample [N, K, A] of the policy prior."""

    def value(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Values [N, K] of latent states under the prior."""


class ActorGuide:
    """A policy and, where there are any, its critics: the value is the mean of two drawn at random, else 0."""

    def __init__(self, actor: Actor, critic: Critic | None = None):
        self._actor, self._critic = actor, critic

    @staticmethod
    def of_policy(policy: Policy) -> ActorGuide:
        """A saved policy has no critics: the end of a plan is worth nothing, so the horizon should be long."""
        return ActorGuide(policy._actor)

    @staticmethod
    def of_extraction(extraction: Extraction, policy: int = 0) -> ActorGuide:
        """A copy of one policy of a population, with its critics."""
        actors, critics = extraction.actor, extraction.critic
        like = {"dtype": actors.parameters.flat.dtype, "device": actors.parameters.flat.device}
        widths, seed, count = actors.mlp.widths, [extraction.seeds[policy]], critics.num_critics
        actor = Actor(seed, widths[0], widths[-1], widths[1:-1], **like)  # type: ignore[arg-type]
        actor.parameters.load(0, actors.parameters.tensors(policy))
        critic = Critic(seed, widths[0], count, critics.mlp.widths[1:-1], **like)  # type: ignore[arg-type]
        for k in range(count):
            critic.parameters.load(k, critics.parameters.tensors(policy * count + k))
        return ActorGuide(actor, critic)

    def action(self, z: Tensor, generator: torch.Generator) -> Tensor:
        rows = z.reshape(1, -1, z.shape[-1])
        shape = (1, rows.shape[1], self._actor.mlp.widths[-1])
        noise = torch.randn(shape, generator=generator, dtype=z.dtype, device=z.device)
        return self._actor.forward(rows, noise).action.view(*z.shape[:-1], -1)

    def value(self, z: Tensor, generator: torch.Generator) -> Tensor:
        if self._critic is None:
            return torch.zeros(z.shape[:-1], dtype=z.dtype, device=z.device)
        values = self._critic.forward(z.reshape(1, -1, z.shape[-1]))[0][0]  # [K critics, R]
        return values[_two(len(values), generator)].mean(0).view(z.shape[:-1])


class QGuide:
    """A policy and Q functions as TD-MPC2 trains them: tanh of a normal, and the mean of two Q functions drawn at
    random. `value_of` reads a Q function's outputs [..., bins]; `action_mask` is [N or 1, A]."""

    def __init__(
        self,
        prior: list[FrozenLayer],
        q_functions: Sequence[list[FrozenLayer]],
        value_of: Callable[[Tensor], Tensor],
        action_mask: Tensor | None = None,
        log_std_range: tuple[float, float] = LOG_STD_RANGE,
    ):
        self._prior = FrozenNetwork(prior)
        self._q = [FrozenNetwork(layers, packed=True) for layers in q_functions]
        self._value_of, self._workspace = value_of, Workspace()
        self._log_std_range = log_std_range
        self._mask = None if action_mask is None else action_mask[:, None]

    def action(self, z: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_std = self._prior.forward(z)[0].chunk(2, -1)
        low, high = self._log_std_range
        log_std = low + 0.5 * (high - low) * (torch.tanh(log_std) + 1.0)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        action = torch.tanh(torch.addcmul(mean, log_std.exp(), noise))
        return action if self._mask is None else action * self._mask

    def value(self, z: Tensor, generator: torch.Generator) -> Tensor:
        inputs = torch.cat([z, self.action(z, generator)], -1)
        chosen = _two(len(self._q), generator).tolist()
        w = self._workspace  # one for all: what is read from it is a copy
        return torch.stack([self._value_of(self._q[i].forward(inputs, w)[0]) for i in chosen]).mean(0)


def _two(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device)[:2]


def load_q_guide(
    path: str | os.PathLike[str], model: WorldModel, tasks: Tensor | None = None, action_mask: Tensor | None = None
) -> QGuide:
    """Policy and Q functions of the TD-MPC2 checkpoint that `model` was read from, for tasks [N or 1].

    Raises FileNotFoundError, and ForeignFileError where the file holds none, or none that fit the model.
    """
    tree = open_torch_file(path)
    state = tree.get("model", tree) if isinstance(tree, dict) else {}
    heads = {name: value for name, value in _heads(state).items() if isinstance(value, StoredTensor)}
    if not any(name.startswith("q.") for name in heads) or not any(name.startswith("pi.") for name in heads):
        raise ForeignFileError(
            f"{path} holds no policy and Q functions of TD-MPC2; plan with the checkpoint itself, or guide the planner "
            "by an extraction from this world model"
        )
    tensors = {name: value.torch().to(model.obs_mean) for name, value in heads.items()}
    c = model.config
    members = len(tensors.get("q.2.bias", ()))
    step_input = c.latent_dim + c.task_dim
    pi = _layers(path, "pi", tensors, step_input, c.mlp_dim, 2 * c.action_dim)
    q = [
        _layers(path, "q", {k: v[i] for k, v in tensors.items() if k.startswith("q.")}, step_input + c.action_dim,
                c.mlp_dim, c.num_bins)
        for i in range(members)
    ]  # fmt: skip
    with torch.no_grad():
        e = None if tasks is None else model.task_embedding(tasks)
        folded = [FrozenWorldModel._fold(layers, c.latent_dim, e) for layers in (pi, *q)]

    def value_of(logits: Tensor) -> Tensor:
        v = logits.squeeze(-1).clone() if c.num_bins == 1 else two_hot.expectation(logits, c.vmin, c.vmax)
        return two_hot.symexp(v) if c.reward_symlog else v

    return QGuide(folded[0], folded[1:], value_of, action_mask)


def _heads(state: dict) -> dict[str, object]:
    """The ensemble's parameters as q.{layer name} [members, ...] and the policy's as pi.{layer name}, of any layout."""
    found: dict[str, object] = {}
    for key, value in state.items():
        if match := re.fullmatch(r"_pi\.(\d\..*)", str(key)):
            found[f"pi.{match[1]}"] = value
        elif match := re.fullmatch(r"_Qs\.params\.(\d\.[a-z.]+)", str(key)):
            found[f"q.{match[1]}"] = value
        elif (match := re.fullmatch(r"_Qs\.params\.(\d)", str(key))) and int(match[1]) < len(OLD_NAMES):
            found[f"q.{OLD_NAMES[int(match[1])]}"] = value
    return found


def _layers(
    path: object, head: str, tensors: dict[str, Tensor], inputs: int, hidden: int, outputs: int
) -> nn.ModuleList:
    with torch.device("meta"):
        layers = nn.ModuleList([NormedLinear(inputs, hidden), NormedLinear(hidden, hidden), nn.Linear(hidden, outputs)])
    mine = {name.removeprefix(f"{head}."): value for name, value in tensors.items() if name.startswith(f"{head}.")}
    try:
        layers.load_state_dict(mine, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ForeignFileError(f"{path}: its {head} functions do not fit its world model: {reason}") from error
    if broken := [name for name, value in mine.items() if not torch.isfinite(value).all()]:
        raise ForeignFileError(f"{path} holds NaN or infinite numbers in {head}.{broken[0]}")
    return layers
