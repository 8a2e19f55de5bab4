"""Actors of a population, and one finished policy: the world model's encoder and an actor, in two files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pwm_fast import backend
from pwm_fast.kernels.gemm import gemm_for, huge_copy
from pwm_fast.kernels.row_network import RowLayer, RowNetwork
from pwm_fast.models.frozen import FrozenNetwork
from pwm_fast.models.population_mlp import Activations, PopulationMLP
from pwm_fast.models.workspace import Workspace
from pwm_fast.models.world_model import FrozenLayer
from pwm_fast.state_files import read_json, replacing, write_json

FORMAT = "pwm_fast.policy.1"
UNITS = (400, 200, 100)
INITIAL_LOG_STD = -1.0
WEIGHTS_FILE, DESCRIPTION_FILE = "policy.safetensors", "policy.json"


class ActionSample(NamedTuple):
    """What the actor's backward pass needs beside the noise."""

    action: Tensor  # [P, R, A]
    activations: Activations


class Actor:
    """P Gaussian actors squashed by tanh: a = tanh(mu(z) + exp(log_std) eps).

    Parameters are those of `PopulationMLP` and `log_std` [P, A].
    """

    def __init__(
        self,
        seeds: list[int],
        latent_dim: int,
        action_dim: int,
        units: tuple[int, ...] = UNITS,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self.policies = len(seeds)
        self.mlp = PopulationMLP(
            self.policies, (latent_dim, *units, action_dim), {"log_std": (action_dim,)}, dtype, device
        )
        self.parameters = self.mlp.parameters
        self.parameters["log_std"].fill_(INITIAL_LOG_STD)
        self.mask: Tensor | None = None  # [P, 1, A]
        for policy, seed in enumerate(seeds):
            self._initialise(policy, seed)

    def _initialise(self, policy: int, seed: int) -> None:
        """torch's default for Linear: weights and biases uniform in +-1/sqrt(inputs)."""
        generator = torch.Generator().manual_seed(seed)
        for i in range(self.mlp.depth):
            bound = self.mlp.widths[i] ** -0.5
            for name in (f"{i}.weight", f"{i}.bias"):
                value = self.parameters[name][policy]
                start = torch.empty(value.shape, dtype=torch.float64)
                value.copy_(start.uniform_(-bound, bound, generator=generator))

    def restrict(self, action_dims: Sequence[int]) -> None:
        """Let actor p use its first `action_dims[p]` actions only: the others are 0 without noise, and stay so.

        TD-MPC2's action mask (Hansen et al. 2024, section 3.2): tasks of one world model differ in their actions.
        """
        last = self.mlp.depth - 1
        numbers = torch.arange(self.mlp.widths[-1], device=self.parameters.flat.device)
        dims = torch.as_tensor(list(action_dims), device=numbers.device)
        self.mask = (numbers < dims[:, None])[:, None].to(self.parameters.flat.dtype)
        self.parameters[f"{last}.weight"].mul_(self.mask.mT)
        self.parameters[f"{last}.bias"].mul_(self.mask[:, 0])

    def clamp_log_std(self, minimum: float) -> None:
        """Raise log_std to at least `minimum`, in the parameter itself."""
        self.parameters["log_std"].clamp_(min=minimum)

    def mean(self, z: Tensor) -> Tensor:
        """Deterministic actions tanh(mu(z)) [P, R, A] in latents [P, R, Z]."""
        return torch.tanh(self.mlp.forward(z)[0])

    def forward(self, z: Tensor, noise: Tensor, workspace: Workspace | None = None) -> ActionSample:
        """Actions in latents [P, R, Z] with standard normal noise [P, R, A] (all of it in `workspace`, if given)."""
        w = workspace or Workspace()
        mu, activations = self.mlp.forward(z, w)
        std = self.parameters["log_std"].exp()[:, None]
        return ActionSample(
            torch.tanh(torch.addcmul(mu, std, noise), out=w.tensor("action", mu, *mu.shape)), activations
        )

    def explain(self, z: Tensor, action: Tensor) -> tuple[ActionSample, Tensor]:
        """The sample that gives `action` [P, R, A] in latents z [P, R, Z], and its noise [P, R, A]."""
        mu, activations = self.mlp.forward(z)
        inside = 1 - 1e-6  # actions on the edge stand for all beyond it
        before_tanh = torch.atanh(action.clamp(-inside, inside))
        return ActionSample(action, activations), (before_tanh - mu) / self.parameters["log_std"].exp()[:, None]

    def backward(
        self, daction: Tensor, noise: Tensor, sample: ActionSample, workspace: Workspace | None = None
    ) -> None:
        """Overwrite the parameters' gradients with those of sum(daction * action). All [P, R, .]."""
        dmu = self._before_tanh(daction, sample)
        std = self.parameters["log_std"].exp()
        torch.mul((dmu * noise).sum(1), std, out=self.parameters.grads["log_std"])
        self.mlp.backward(dmu, sample.activations, workspace)

    def input_gradient(self, daction: Tensor, sample: ActionSample) -> Tensor:
        """Gradient [P, R, Z] with respect to the latents."""
        return self.mlp.input_gradient(self._before_tanh(daction, sample), sample.activations)

    def _before_tanh(self, daction: Tensor, sample: ActionSample) -> Tensor:
        dmu = daction * (1 - sample.action.square())
        return dmu if self.mask is None else dmu * self.mask


class Policy:
    """One policy: raw observations in, actions in [-1, 1] out. Made by extraction, or read by `Policy.load`."""

    def __init__(self, encoder: list[FrozenLayer], actor: Actor, description: dict[str, Any]):
        self._encoder_layers, self._actor, self.description = encoder, actor, description
        self._encoder = FrozenNetwork(encoder, description["simnorm_dim"])
        self._network = _native_network(encoder, actor, description["simnorm_dim"])

    @property
    def task(self) -> str:
        return self.description["task"]

    @property
    def obs_dim(self) -> int:
        return self.description["obs_dim"]

    @property
    def action_dim(self) -> int:
        return self.description["action_dim"]

    def to(self, device: str | torch.device) -> Policy:
        """A copy on another device."""
        return Policy.from_tensors({k: v.to(device) for k, v in self.tensors().items()}, self.description)

    def act(
        self, obs: Tensor | np.ndarray, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        """Actions [..., A] for raw observations [..., S]; numpy in, numpy out.

        `deterministic` takes the mean, else one sample per row (from `generator`). Raises ValueError on another
        observation size.
        """
        shape = tuple(np.shape(obs))
        if not shape or shape[-1] != self.obs_dim:
            raise ValueError(f"observations must have {self.obs_dim} entries ({self.task}), got {shape}")
        flat = self._actor.parameters.flat
        if deterministic and isinstance(obs, np.ndarray) and (network := self._native(flat)) is not None:
            action = network.forward_array(obs)
            torch.from_numpy(action).tanh_()
            return action
        x = torch.as_tensor(obs).to(flat.device, flat.dtype)
        mean = self._mean(x.reshape(-1, self.obs_dim), 0)
        if not deterministic:
            noise = torch.randn(mean.shape, generator=generator, dtype=flat.dtype, device=flat.device)
            mean = torch.addcmul(mean, self._actor.parameters["log_std"].exp(), noise)
        action = mean.tanh_().view(*shape[:-1], self.action_dim)
        return action.cpu().numpy() if isinstance(obs, np.ndarray) else action

    def act_latent(self, z: Tensor) -> Tensor:
        """Mean actions [..., A] in latent states z [..., Z]."""
        mean = self._mean(z.reshape(-1, z.shape[-1]), len(self._encoder_layers))
        return mean.tanh_().view(*z.shape[:-1], self.action_dim)

    def _native(self, x: Tensor) -> RowNetwork | None:
        """All layers in one native call, if it can take `x`: calls layer by layer cost several times a small policy's
        layers. Both ways give the same bits."""
        return self._network if self._network is not None and gemm_for(None, x) is not None else None

    @torch.no_grad()
    def _mean(self, x: Tensor, first: int) -> Tensor:
        """Actions before tanh [R, A] of inputs [R, .] of layer `first`, the encoder's or the actor's first one."""
        if (network := self._native(x)) is not None:
            return network.forward(x, first)
        z = x[None] if first else self._encoder.forward(x[None])[0]
        return self._actor.mlp.forward(z)[0][0]

    def tensors(self) -> dict[str, Tensor]:
        """All parameters by name: `encoder.{i}...` (observation statistics folded into layer 0) and `actor...`."""
        out: dict[str, Any] = {f"actor.{name}": value for name, value in self._actor.parameters.tensors(0).items()}
        for i, layer in enumerate(self._encoder_layers):
            out[f"encoder.{i}.weight"], out[f"encoder.{i}.bias"] = layer.weight, layer.bias[0]
            if layer.ln_weight is not None:
                out[f"encoder.{i}.ln.weight"], out[f"encoder.{i}.ln.bias"] = layer.ln_weight, layer.ln_bias
        return {name: value.detach().clone().contiguous() for name, value in out.items()}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], description: dict[str, Any]) -> Policy:
        """The inverse of `tensors`; raises ValueError on missing, unknown or wrongly shaped ones."""
        widths = [description["obs_dim"], *description["encoder_units"], description["latent_dim"]]
        normed = description.get("latent", "simnorm") == "simnorm"
        vectors = ("bias", "ln.weight", "ln.bias") if normed else ("bias",)
        expected: dict[str, tuple[int, ...]] = {}
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            expected[f"encoder.{i}.weight"] = (outputs, inputs)
            expected |= {f"encoder.{i}.{name}": (outputs,) for name in vectors}
        for name, shape in expected.items():
            if name not in tensors:
                raise ValueError(f"missing parameters: {name}")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}")
        rest = {name: value for name, value in tensors.items() if name not in expected}
        if strange := sorted(name for name in rest if not name.startswith("actor.")):
            raise ValueError(f"unknown parameters: {', '.join(strange)}")
        layers = []
        for i in range(len(widths) - 1):
            weight, bias, *ln = (huge_copy(tensors[f"encoder.{i}.{name}"]) for name in ("weight", *vectors))
            last = i == len(widths) - 2
            activation = ("simnorm" if last else "mish") if normed else "none"
            layers.append(FrozenLayer(weight, bias[None], activation, *ln))
        first = layers[0].weight
        units = tuple(description["actor_units"])
        actor = Actor([0], description["latent_dim"], description["action_dim"], units, first.dtype, first.device)
        actor.parameters.load(0, {name.removeprefix("actor."): value for name, value in rest.items()})
        return Policy(layers, actor, description)

    def save(self, directory: str | Path) -> Path:
        """Write `policy.safetensors` and `policy.json` into `directory` (made if missing); each is whole or absent.

        Raises OSError that names path, reason and mend when the disk refuses.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS_FILE) as part:
            save_file(self.tensors(), part, metadata={"format": FORMAT})
        write_json(directory / DESCRIPTION_FILE, self.description)
        return directory / WEIGHTS_FILE

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> Policy:
        """Read a policy from its folder, or from the path of either file in it.

        Raises FileNotFoundError, or ValueError that says what is wrong with the files.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        weights, description_path = folder / WEIGHTS_FILE, folder / DESCRIPTION_FILE
        for file in (weights, description_path):
            if not file.is_file():
                raise FileNotFoundError(f"{path} holds no policy: {file} does not exist")
        description = read_json(description_path)
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            found = description.get("format") if isinstance(description, dict) else type(description).__name__
            raise ValueError(
                f"{description_path} describes no policy of this version: format {found!r}, not {FORMAT!r}"
            )
        try:
            with safe_open(weights, "pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{weights} is damaged: {error}") from error
        if broken := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
            raise ValueError(f"{weights} holds NaN or infinite numbers in {', '.join(broken)}")
        try:
            return Policy.from_tensors(tensors, description)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{weights} does not fit {description_path}: {error}") from error


def _native_network(encoder: list[FrozenLayer], actor: Actor, simnorm_dim: int) -> RowNetwork | None:
    """Encoder and actor as one native network on the weights where they lie; None where it cannot run them."""
    p = actor.parameters
    if (
        backend.native is None
        or not p.flat.is_cpu
        or not all(t.dtype is torch.float32 for t in (p.flat, *(s.weight for s in encoder)))
    ):
        return None
    if simnorm_dim != 8 and any(s.activation == "simnorm" for s in encoder):
        return None
    kernels = {"none": "none", "mish": "layernorm_mish", "simnorm": "layernorm_simnorm"}
    layers = [RowLayer(kernels[s.activation], s.weight, s.bias[0], s.ln_weight, s.ln_bias) for s in encoder]
    names = ("weight", "bias", "ln.weight", "ln.bias")
    for i in range(actor.mlp.depth - 1):
        layers.append(RowLayer("mish_layernorm", *(p[f"{i}.{name}"][0] for name in names)))
    last = actor.mlp.depth - 1
    return RowNetwork([*layers, RowLayer("none", p[f"{last}.weight"][0], p[f"{last}.bias"][0])])
