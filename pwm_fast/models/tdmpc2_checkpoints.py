"""World models out of TD-MPC2's and PWM's checkpoints, of any size and layout.

    {"model": state dict}                    TD-MPC2: encoder keys have a level `state.`; Q functions and policy beside
    {"world_model": state dict, "obs_rms": running statistics, ...}     PWM: no `state.`, and statistics may be None

Both compute what `WorldModel` computes, with the same parameter names otherwise; every size is inferred from the
tensors' shapes. They read the reward head differently: TD-MPC2 gives symexp of the bins' expectation, PWM's extraction
the expectation itself (with observations and rewards normalised by their running statistics, if there are any).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.data.safe_unpickling import Inert
from pwm_fast.data.stored_zip import ForeignFileError
from pwm_fast.data.torch_files import StoredTensor, open_torch_file
from pwm_fast.models.sizes import SIZES
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

REWARDS = ("symexp", "linear")
KEPT = ("_encoder.", "_dynamics.", "_reward.", "_termination.", "_task_emb.")
MAX_LAYERS = 64
STATISTICS_EPSILON = 1e-5  # under the root of PWM's running variances
VALUE_RANGE = 10.0  # the bins' ends of every published model; no file states them


class Statistics(NamedTuple):
    """PWM's running mean and variance."""

    mean: Tensor
    variance: Tensor

    @property
    def deviation(self) -> Tensor:
        return (self.variance + STATISTICS_EPSILON).sqrt()


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds of a world model: its tensors by our names, not yet read, and PWM's statistics."""

    path: Path
    layout: str  # "tdmpc2", "tdmpc2 (first release)" or "pwm"
    tensors: dict[str, StoredTensor]
    observations: Statistics | None = None
    rewards: Statistics | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def find_checkpoint(tree: Any, path: str | os.PathLike[str] = "") -> Checkpoint | None:
    """The world model in what `open_torch_file` gave for `path`, or None where there is none."""
    if not isinstance(tree, dict):
        return None
    pwm = isinstance(tree.get("world_model"), dict)
    state = tree["world_model"] if pwm else tree.get("model", tree)
    if not isinstance(state, dict) or not any(str(key).startswith("_dynamics.") for key in state):
        return None
    kept = {str(key).replace("_encoder.state.", "_encoder."): value for key, value in state.items()}
    kept = {name: value for name, value in kept.items() if name.startswith(KEPT)}
    for name, value in kept.items():
        if not isinstance(value, StoredTensor):
            raise ForeignFileError(f"{path}: {name} is no tensor")
    layout = "pwm" if pwm else "tdmpc2" if "_detach_Qs_params.0.weight" in state else "tdmpc2 (first release)"
    statistics = (_statistics(tree.get(name), name, path) if pwm else None for name in ("obs_rms", "rew_rms"))
    return Checkpoint(Path(path), layout, kept, *statistics)


def _statistics(value: Any, name: str, path: str | os.PathLike[str]) -> Statistics | None:
    if value is None:
        return None
    fields = value.state if isinstance(value, Inert) else value
    moments = [fields.get(key) for key in ("mean", "var")] if isinstance(fields, dict) else [None]
    if not all(isinstance(moment, StoredTensor) for moment in moments):
        raise ForeignFileError(f"{path}: {name} holds no running mean and variance")
    mean, variance = (moment.torch().float().flatten() for moment in moments)  # type: ignore[union-attr]
    if mean.shape != variance.shape or not torch.isfinite(mean).all() or not (variance >= 0).all():
        raise ForeignFileError(f"{path}: {name} is no mean and variance")
    return Statistics(mean, variance)


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> WorldModelConfig:
    """The configuration of a world model whose parameters (our names) have these shapes.

    Raises ForeignFileError that names what is missing or does not fit.
    """

    def shape(name: str, dims: int = 2) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != dims or not all(found):
            raise ForeignFileError(f"it needs a parameter {name} of {dims} dimensions, and has {found or 'none'}")
        return found

    if any(name.startswith("_encoder.rgb.") for name in shapes):
        raise ForeignFileError("it encodes images; only models of state observations are read")
    layers = {int(found[1]) for name in shapes if (found := re.fullmatch(r"_encoder\.(\d{1,4})\.weight", name))}
    if not 2 <= len(layers) <= MAX_LAYERS or layers != set(range(len(layers))):
        raise ForeignFileError(f"its encoder must have from 2 to {MAX_LAYERS} layers, and has {sorted(layers)[:5]}")
    num_tasks, task_dim = shape("_task_emb.weight") if "_task_emb.weight" in shapes else (0, 0)
    encoder_dim, encoder_input = shape("_encoder.0.weight")
    latent_dim = shape(f"_encoder.{len(layers) - 1}.weight")[0]
    mlp_dim, step_input = shape("_dynamics.0.weight")
    termination_dim = shape("_termination.0.weight")[0] if "_termination.0.weight" in shapes else 0
    try:
        config = WorldModelConfig(
            encoder_input - task_dim,
            step_input - latent_dim - task_dim,
            latent_dim,
            mlp_dim,
            encoder_dim,
            len(layers),
            num_tasks=num_tasks,
            task_dim=task_dim,
            num_bins=shape("_reward.2.weight")[0],
            vmin=-VALUE_RANGE,
            vmax=VALUE_RANGE,
            termination_dim=termination_dim,
        )
    except ValueError as error:
        raise ForeignFileError(f"its tensors fit no world model: {error}") from error
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in WorldModel(config).named_parameters()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            there, here = shapes.get(name, "is missing"), wanted.get(name, "is not wanted")
            raise ForeignFileError(f"its tensors fit no world model: {name} {there}, from the others {here}")
    return config


def size_name(config: WorldModelConfig) -> str | None:
    """The published size that a configuration has, if any (19M's latent is 512 wide for mt30)."""
    for name, row in SIZES.items():
        if (row.encoder_dim, row.encoder_layers, row.mlp_dim) == (
            config.encoder_dim, config.encoder_layers, config.mlp_dim,
        ) and (config.latent_dim == row.latent_dim or (name, config.latent_dim) == ("19M", 512)):  # fmt: skip
            return name
    return None


def load_checkpoint(
    path: str | os.PathLike[str], reward: str | None = None, verify: bool = True, tree: Any = None
) -> WorldModel:
    """The world model in a checkpoint of TD-MPC2 or PWM, float32, on the CPU.

    `reward` says how the reward head is read: "symexp" or "linear" (see above; default: as the file's own program
    does, and linear for a head without bins). `tree` is what `open_torch_file` gave, if that is known already.
    Raises FileNotFoundError, ValueError for an unknown `reward`, and ForeignFileError for a file that is damaged,
    would run code, or holds no such model.
    """
    if reward not in (None, *REWARDS):
        raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {reward!r}")
    tree = open_torch_file(path, verify) if tree is None else tree
    found = find_checkpoint(tree, path)
    if found is None:
        raise ForeignFileError(f"{path} holds no world model of TD-MPC2 or PWM")
    try:
        config = infer_config(found.shapes)
    except ForeignFileError as error:
        raise ForeignFileError(f"{path} holds no world model that can be read: {error}") from error
    if sum(tensor.nbytes for tensor in found.tensors.values()) > 2 * Path(path).stat().st_size:
        raise ForeignFileError(f"{path} is damaged: its tensors share storages, and would be larger than the file")
    if reward is None:
        reward = "linear" if found.layout == "pwm" or config.num_bins == 1 else "symexp"
    config = replace(config, reward_symlog=reward == "symexp")
    state = {name: tensor.torch() for name, tensor in found.tensors.items()}
    for name, value in state.items():
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise ForeignFileError(f"{path} holds NaN, infinite or whole numbers in {name}")
    state = {name: value.float() for name, value in state.items()}
    config = _normalise(config, state, found)
    provenance = {
        "source": {"file": found.path.name, "bytes": found.path.stat().st_size, "layout": found.layout},
        "size": size_name(config),
        "reward": reward,
    }
    with torch.device("meta"):
        model = WorldModel(config, provenance)
    model.load_state_dict(state, assign=True)
    return model


def _normalise(config: WorldModelConfig, state: dict[str, Tensor], found: Checkpoint) -> WorldModelConfig:
    """Add the model's buffers to `state`; PWM's head gives (reward - mean) / deviation, whose mean goes elsewhere."""
    state["obs_mean"], state["obs_std"] = torch.zeros(config.obs_dim), torch.ones(config.obs_dim)
    state["reward_scale"] = torch.ones(())
    if found.observations is not None:
        if found.observations.mean.numel() != config.obs_dim:
            raise ForeignFileError(
                f"{found.path}: obs_rms is of {found.observations.mean.numel()} observations, the encoder takes "
                f"{config.obs_dim}"
            )
        state["obs_mean"], state["obs_std"] = found.observations.mean, found.observations.deviation
    if found.rewards is None:
        return config
    if found.rewards.mean.numel() != 1 or config.reward_symlog:
        raise ForeignFileError(f"{found.path}: rew_rms must be of one number, and its rewards read as linear")
    scale = found.rewards.deviation.squeeze()
    shift = found.rewards.mean.squeeze() / scale
    state["reward_scale"] = scale
    if config.num_bins == 1:
        state["_reward.2.bias"] = state["_reward.2.bias"] + shift
        return config
    return replace(config, vmin=config.vmin + float(shift), vmax=config.vmax + float(shift))
