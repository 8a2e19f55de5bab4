"""TD-MPC2's world model (Hansen et al. 2024, section 3): encoder, latent dynamics, reward and termination heads.

Every hidden layer is Linear -> LayerNorm -> Mish; encoder and dynamics end in Linear -> LayerNorm -> SimNorm. Inputs
are concatenated as [obs, e], [z, e, a] and [z, e] with e the task embedding. Parameter names are TD-MPC2's without its
`state.` level, so its state dicts load by renaming.

A second kind of latent state, `latent="observation"`, is the normalised observation itself, with no encoder to learn;
the dynamics predict its change. Where observations are compact states, as in the dflex tasks, that is learned in a
small part of the time, derivatives included: see `bench/test_gradients.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pwm_fast.data.torch_files import is_torch_file
from pwm_fast.kernels import layernorm_mish, layernorm_simnorm, two_hot
from pwm_fast.models.sizes import size as size_row
from pwm_fast.state_files import replacing

FORMAT = "pwm_fast.world_model.1"
LATENTS = ("simnorm", "observation")


@dataclass(frozen=True)
class WorldModelConfig:
    """Shapes and conventions of one world model.

    `num_bins` = 1 gives a scalar reward head. The reward is `reward_scale * g(softmax(logits) . linspace(vmin, vmax))`
    with g the identity, or symexp where `reward_symlog` is set. `termination_dim` is the width of the termination
    head, 0 for none; `num_tasks` = 0 means a single task without embedding. `latent` is "simnorm" (TD-MPC2's), or
    "observation": z is the normalised observation and z' = z + step_mean + step_std * dynamics(z, a).
    """

    obs_dim: int
    action_dim: int
    latent_dim: int
    mlp_dim: int
    encoder_dim: int
    encoder_layers: int
    num_tasks: int = 0
    task_dim: int = 0
    num_bins: int = 101
    vmin: float = -10.0
    vmax: float = 10.0
    simnorm_dim: int = 8
    reward_symlog: bool = False
    termination_dim: int = 0
    latent: str = "simnorm"

    def __post_init__(self) -> None:
        if self.latent not in LATENTS:
            raise ValueError(f"latent must be one of {', '.join(LATENTS)}, got {self.latent!r}")
        encoder = () if self.residual else ("encoder_dim", "encoder_layers")
        for name in ("obs_dim", "action_dim", "latent_dim", "mlp_dim", "num_bins", *encoder):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.residual and (self.latent_dim, self.encoder_layers) != (self.obs_dim, 0):
            raise ValueError(
                f"latent 'observation' needs latent_dim = obs_dim = {self.obs_dim} and no encoder layers, got "
                f"{self.latent_dim} and {self.encoder_layers}"
            )
        if not self.residual and self.latent_dim % self.simnorm_dim:
            raise ValueError(f"latent_dim must be a multiple of simnorm_dim {self.simnorm_dim}, got {self.latent_dim}")
        if bool(self.num_tasks) != bool(self.task_dim):
            raise ValueError(f"num_tasks {self.num_tasks} and task_dim {self.task_dim} must both be 0 or both be > 0")

    @property
    def residual(self) -> bool:
        """Whether the dynamics predict the change of the latent state."""
        return self.latent == "observation"

    @staticmethod
    def of_size(name: str, obs_dim: int, action_dim: int, latent: str = "simnorm", **options: Any) -> WorldModelConfig:
        """The configuration of a named size (`pwm_fast.models.sizes`).

        Of an "observation" model the size gives the heads' width; its reward head is scalar, for two-hot bins are made
        for rewards of unknown scale.
        """
        row = size_row(name)
        if latent == "observation":
            options = {"num_bins": 1, **options}
            return WorldModelConfig(obs_dim, action_dim, obs_dim, row.mlp_dim, 0, 0, latent=latent, **options)
        return WorldModelConfig(
            obs_dim, action_dim, row.latent_dim, row.mlp_dim, row.encoder_dim, row.encoder_layers, **options
        )


class NormedLinear(nn.Linear):
    """Linear -> LayerNorm -> Mish, or SimNorm in place of Mish where `simnorm_dim` is given."""

    def __init__(self, inputs: int, outputs: int, simnorm_dim: int = 0):
        super().__init__(inputs, outputs)
        self.ln = nn.LayerNorm(outputs)
        self.simnorm_dim = simnorm_dim

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        # under autocast y is bfloat16: one type goes into a kernel
        rows = y.reshape(1, -1, y.shape[-1])
        weight, bias = self.ln.weight.to(y.dtype)[None], self.ln.bias.to(y.dtype)[None]
        if self.simnorm_dim:
            return layernorm_simnorm.apply(rows, weight, bias, self.simnorm_dim).view_as(y)
        return layernorm_mish.apply(rows, weight, bias).view_as(y)


def _head(inputs: int, hidden: int, outputs: int) -> nn.ModuleList:
    return nn.ModuleList([NormedLinear(inputs, hidden), NormedLinear(hidden, hidden), nn.Linear(hidden, outputs)])


class WorldModel(nn.Module):
    """A differentiable simulator in latent space.

    Shapes: obs [..., S], latent z [..., Z], action [..., A], task [...] integer indices (only with task embeddings).
    Observation statistics live inside: `encode` takes raw observations.
    """

    obs_mean: Tensor
    obs_std: Tensor
    reward_scale: Tensor
    step_mean: Tensor  # of residual dynamics: mean and deviation of a step's change of z
    step_std: Tensor

    def __init__(self, config: WorldModelConfig, provenance: dict[str, Any] | None = None):
        super().__init__()
        c = self.config = config
        self.provenance = dict(provenance or {})
        widths = []
        if not c.residual:
            widths = [c.obs_dim + c.task_dim] + [c.encoder_dim] * max(c.encoder_layers - 1, 1) + [c.latent_dim]
        last = len(widths) - 2
        self._encoder = nn.ModuleList(
            NormedLinear(a, b, c.simnorm_dim if i == last else 0) for i, (a, b) in enumerate(pairwise(widths))
        )
        step_input = c.latent_dim + c.task_dim + c.action_dim
        self._dynamics = nn.ModuleList(
            [
                NormedLinear(step_input, c.mlp_dim),
                NormedLinear(c.mlp_dim, c.mlp_dim),
                nn.Linear(c.mlp_dim, c.latent_dim)
                if c.residual
                else NormedLinear(c.mlp_dim, c.latent_dim, c.simnorm_dim),
            ]
        )
        self._reward = _head(step_input, c.mlp_dim, c.num_bins)
        self._termination = _head(c.latent_dim + c.task_dim, c.termination_dim, 1) if c.termination_dim else None
        # given its tensor, for its own first values, drawn in vain, take 2 s of imports on the meta device
        empty = torch.empty(c.num_tasks, c.task_dim)
        self._task_emb = nn.Embedding(c.num_tasks, c.task_dim, _weight=empty) if c.num_tasks else None
        self.register_buffer("obs_mean", torch.zeros(c.obs_dim))
        self.register_buffer("obs_std", torch.ones(c.obs_dim))
        self.register_buffer("reward_scale", torch.ones(()))
        if c.residual:
            self.register_buffer("step_mean", torch.zeros(c.latent_dim))
            self.register_buffer("step_std", torch.ones(c.latent_dim))
        self._initialise()

    def _initialise(self) -> None:
        """Truncated normal (0.02) weights, zero biases, zero reward head, uniform (0.02) embedding."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.uniform_(module.weight, -0.02, 0.02)
        for head in (self._reward, self._termination):
            if head is not None:
                nn.init.zeros_(head[-1].get_parameter("weight"))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def has_termination(self) -> bool:
        return self._termination is not None

    def task_embedding(self, task: Tensor) -> Tensor:
        """Rows [..., E] of the embedding, those longer than 1 scaled back to norm 1 (torch's max_norm rule)."""
        assert self._task_emb is not None
        e = self._task_emb(task)
        return e * (1.0 / (e.norm(dim=-1, keepdim=True) + 1e-7)).clamp(max=1.0)

    def _join(self, parts: list[Tensor], task: Tensor | None) -> Tensor:
        """[first, e, rest] along the last axis."""
        if self._task_emb is not None:
            if task is None:
                raise ValueError(f"this world model knows {self.config.num_tasks} tasks: pass `task` indices")
            e = self.task_embedding(task).expand(*parts[0].shape[:-1], -1)
            parts = [parts[0], e, *parts[1:]]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def encode(self, obs: Tensor, task: Tensor | None = None) -> Tensor:
        """z [..., Z] of raw observations [..., S]."""
        x = (obs - self.obs_mean) / self.obs_std
        if self.config.residual:
            return x
        x = self._join([x], task)
        for layer in self._encoder:
            x = layer(x)
        return x

    def next(self, z: Tensor, action: Tensor, task: Tensor | None = None) -> Tensor:
        """The latent state after `action`."""
        x = self._join([z, action], task)
        for layer in self._dynamics:
            x = layer(x)
        return z + self.step_mean + self.step_std * x if self.config.residual else x

    def reward_logits(self, z: Tensor, action: Tensor, task: Tensor | None = None) -> Tensor:
        """[..., num_bins] logits over the reward bins (the scaled reward itself where num_bins = 1)."""
        x = self._join([z, action], task)
        for layer in self._reward:
            x = layer(x)
        return x

    def reward(self, z: Tensor, action: Tensor, task: Tensor | None = None) -> Tensor:
        """Expected reward [...] of taking `action` in z."""
        return self.expected_reward(self.reward_logits(z, action, task))

    def expected_reward(self, logits: Tensor) -> Tensor:
        """Reward [...] of head outputs [..., num_bins]."""
        c = self.config
        r = logits.squeeze(-1) if c.num_bins == 1 else two_hot.expectation(logits, c.vmin, c.vmax)
        return self.reward_scale * (two_hot.symexp(r) if c.reward_symlog else r)

    def reward_target(self, reward: Tensor) -> Tensor:
        """What the head regresses on: the reward in units of the bins."""
        r = reward / self.reward_scale
        return two_hot.symlog(r) if self.config.reward_symlog else r

    def termination_logit(self, z: Tensor, task: Tensor | None = None) -> Tensor:
        """Logit [...] that the episode has ended in z (Dreamer's continue head, negated)."""
        if self._termination is None:
            raise ValueError("this world model has no termination head")
        x = self._join([z], task)
        for layer in self._termination:
            x = layer(x)
        return x.squeeze(-1)

    def frozen(self, task: Tensor | None = None) -> FrozenWorldModel:
        """Weights for extraction: no gradients, the tasks [P] folded into biases (None: no embedding, P = 1)."""
        return FrozenWorldModel(self, task)

    def copy(self) -> WorldModel:
        """An independent copy."""
        other = WorldModel(self.config, self.provenance).to(self.obs_mean)
        other.load_state_dict(self.state_dict())
        return other

    def save(self, path: str | Path, half: bool = False) -> None:
        """One safetensors file; configuration and provenance as JSON in its header. Written atomically.

        `half` stores float16, for half the size; `load` always returns float32.
        """
        header = {
            "format": FORMAT,
            "config": json.dumps(asdict(self.config)),
            "provenance": json.dumps(self.provenance),
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            tensors = {k: (v.half() if half else v).contiguous() for k, v in self.state_dict().items()}
            save_file(tensors, part, metadata=header)

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> WorldModel:
        """Read a file written by `save`, or a checkpoint of TD-MPC2 or PWM (`tdmpc2_checkpoints.py`).

        Raises FileNotFoundError, or ValueError that says what is wrong with it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"world model {path} does not exist; `python -m pwm_fast.pretrain` makes one")
        if is_torch_file(path):
            from pwm_fast.models.tdmpc2_checkpoints import load_checkpoint  # which imports this module

            return load_checkpoint(path).to(device)
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"{path} is no pwm_fast world model (format {header.get('format')!r})")
                model = WorldModel(WorldModelConfig(**json.loads(header["config"])), json.loads(header["provenance"]))
                model.load_state_dict({k: file.get_tensor(k) for k in file.keys()})
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"world model {path} is damaged or of another version: {error}") from error
        for name, value in model.state_dict().items():
            if not torch.isfinite(value).all():
                raise ValueError(f"world model {path} holds NaN or infinite numbers in {name}")
        return model.to(device)


@dataclass(frozen=True)
class FrozenLayer:
    """One layer with everything constant folded in. activation: "mish", "simnorm" or "none" (plain linear)."""

    weight: Tensor  # [out, in]
    bias: Tensor  # [P or 1, out]
    activation: str
    ln_weight: Tensor | None = None  # [out]
    ln_bias: Tensor | None = None


class FrozenWorldModel:
    """The world model as extraction uses it: four lists of `FrozenLayer`, inputs [obs], [z, a], [z, a] and [z].

    For a fixed task W_e e + b is a constant, so the embedding becomes a bias per policy; observation statistics fold
    into the first encoder layer (W / std, b - W mean / std). Residual dynamics (`config.residual`) give z's change.
    """

    def __init__(self, model: WorldModel, task: Tensor | None = None):
        c = self.config = model.config
        if (task is None) != (model._task_emb is None):
            raise ValueError(f"task indices needed: {model._task_emb is not None}, given: {task is not None}")
        with torch.no_grad():
            e = None if task is None else model.task_embedding(task)  # [P, E]
            self.dynamics = self._fold(model._dynamics, c.latent_dim, e)
            if c.residual:
                scale = 1 / model.obs_std
                self.encoder = [FrozenLayer(torch.diag(scale), -(model.obs_mean * scale)[None], "none")]
                last, std = self.dynamics[-1], model.step_std
                self.dynamics[-1] = FrozenLayer(last.weight * std[:, None], last.bias * std + model.step_mean, "none")
            else:
                self.encoder = self._fold(model._encoder, c.obs_dim, e)
                first = self.encoder[0]
                weight = first.weight / model.obs_std
                shift = weight @ model.obs_mean
                self.encoder[0] = FrozenLayer(weight, first.bias - shift, "mish", first.ln_weight, first.ln_bias)
                if len(self.encoder) == 1:
                    raise ValueError("an encoder needs at least 2 layers")
            self.reward = self._fold(model._reward, c.latent_dim, e)
            self.termination = None if model._termination is None else self._fold(model._termination, c.latent_dim, e)
            self.reward_scale = model.reward_scale.detach().clone()

    @staticmethod
    def _fold(layers: nn.ModuleList, state_dim: int, embedding: Tensor | None) -> list[FrozenLayer]:
        out = []
        for i, layer in enumerate(layers):
            assert isinstance(layer, nn.Linear)
            weight, bias = layer.weight.detach(), layer.bias.detach()[None]
            if i == 0 and embedding is not None:
                end = state_dim + embedding.shape[1]
                bias = bias + embedding @ weight[:, state_dim:end].T
                weight = torch.cat([weight[:, :state_dim], weight[:, end:]], 1)
            if isinstance(layer, NormedLinear):
                kind = "simnorm" if layer.simnorm_dim else "mish"
                ln = (layer.ln.weight.detach().clone(), layer.ln.bias.detach().clone())
                out.append(FrozenLayer(weight.clone(), bias.clone(), kind, *ln))
            else:
                out.append(FrozenLayer(weight.clone(), bias.clone(), "none"))
        return out
