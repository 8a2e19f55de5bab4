"""Our world models as checkpoints that TD-MPC2's own code loads, so that it can plan with them.

The file is {"model": state dict} in TD-MPC2's present layout, plain tensors that `torch.load(weights_only=True)` takes.
Encoder, dynamics, reward and task embedding are ours, with observation statistics and the reward's scale folded in.
What we do not have, the Q functions and the policy prior, is initialised as TD-MPC2's classes would: until they are
trained, planning sees the model's rewards over its horizon and a value of zero after it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pwm_fast.models.world_model import WorldModel
from pwm_fast.state_files import atomic_file

LAYOUTS = ("0.8", "0.14")  # tensordict's versions: what lies beside the Q functions differs
LOG_STD_MIN, LOG_STD_MAX = -10, 2  # TD-MPC2's default settings, which the state dict repeats
INITIAL_STD = 0.02


def export_checkpoint(
    model: WorldModel,
    path: str | os.PathLike[str],
    *,
    action_dims: list[int] | None = None,
    num_q: int = 5,
    tensordict: str = "0.8",
    seed: int = 0,
) -> dict[str, Any]:
    """Write `model` to `path` atomically; returns the TD-MPC2 settings under which it loads, and notes on what differs.

    `action_dims`: of each task, for the action masks (default: all actions of all tasks). `tensordict`: "0.8", the
    version that TD-MPC2 pins, or "0.14". `seed`: of the random initialisation.
    Raises ValueError for a model that TD-MPC2 cannot express, and OSError when the file cannot be written.
    """
    c = model.config
    if c.residual:
        raise ValueError("TD-MPC2 has no residual dynamics: export a model of latent 'simnorm', got 'observation'")
    if tensordict not in LAYOUTS:
        raise ValueError(f"tensordict must be one of {', '.join(LAYOUTS)}, got {tensordict!r}")
    if num_q < 2:
        raise ValueError(f"num_q must be >= 2 (TD-MPC2 takes the mean of two), got {num_q}")
    action_dims = action_dims or [c.action_dim] * c.num_tasks
    if len(action_dims) != c.num_tasks or not all(1 <= dim <= c.action_dim for dim in action_dims):
        raise ValueError(f"action_dims must be {c.num_tasks} numbers from 1 to {c.action_dim}, got {action_dims}")
    state, notes, num_bins = _world_model(model)
    if c.num_tasks:
        masks = torch.arange(c.action_dim) < torch.tensor(action_dims)[:, None]
        state["_action_masks"] = masks.float()
    state["log_std_min"] = torch.tensor(LOG_STD_MIN)
    state["log_std_dif"] = torch.tensor(LOG_STD_MAX - LOG_STD_MIN)
    generator = torch.Generator().manual_seed(seed)
    prior = _mlp(c.latent_dim + c.task_dim, c.mlp_dim, 2 * c.action_dim, None, generator)
    state.update({f"_pi.{name}": value for name, value in prior.items()})
    state.update(_q_functions(_mlp(c.latent_dim + c.task_dim + c.action_dim, c.mlp_dim, max(num_bins, 1), num_q,
                                   generator), num_q, tensordict))  # fmt: skip
    notes.append("Q functions and policy prior are untrained, as TD-MPC2 initialises them")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(path)) as file:
        try:
            torch.save({"model": state}, file)
        except RuntimeError as error:  # torch's own words for what the file system refused
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    settings = {
        "obs_dim": c.obs_dim, "action_dim": c.action_dim, "num_enc_layers": c.encoder_layers, "enc_dim": c.encoder_dim,
        "mlp_dim": c.mlp_dim, "latent_dim": c.latent_dim, "task_dim": c.task_dim, "num_tasks": c.num_tasks,
        "simnorm_dim": c.simnorm_dim, "num_bins": num_bins, "vmin": c.vmin, "vmax": c.vmax, "num_q": num_q,
        "episodic": "_termination.0.weight" in state, "log_std_min": LOG_STD_MIN, "log_std_max": LOG_STD_MAX,
    }  # fmt: skip
    return {"settings": settings, "notes": notes}


def _world_model(model: WorldModel) -> tuple[dict[str, Any], list[str], int]:
    """Our part of the state dict, notes on what it cannot say, and TD-MPC2's `num_bins` (0: a plain scalar)."""
    c, notes = model.config, []
    kept = {name: value.detach().cpu().float().clone() for name, value in model.named_parameters()}
    scale, mean, std = (getattr(model, name).cpu().float() for name in ("reward_scale", "obs_mean", "obs_std"))
    first = kept["_encoder.0.weight"]
    kept["_encoder.0.bias"] -= first[:, : c.obs_dim] @ (mean / std)
    first[:, : c.obs_dim] /= std
    num_bins = c.num_bins
    if c.num_bins == 1:
        num_bins = 1 if c.reward_symlog else 0
    if num_bins == 0:
        kept["_reward.2.weight"] *= scale
        kept["_reward.2.bias"] *= scale
    elif float(scale) != 1.0:
        notes.append(f"TD-MPC2 has no reward scale: its rewards are this model's divided by {float(scale):g}")
    if num_bins > 1 and not c.reward_symlog:
        notes.append("rewards pass through symexp in TD-MPC2, which this model was not trained for: large rewards "
                     "weigh more than they should")  # fmt: skip
    if c.termination_dim and (c.num_tasks or c.termination_dim != c.mlp_dim):
        kept = {name: value for name, value in kept.items() if not name.startswith("_termination.")}
        notes.append("the termination head is left out: TD-MPC2 has one for single tasks, as wide as its other heads")
    return {name.replace("_encoder.", "_encoder.state."): value for name, value in kept.items()}, notes, num_bins


def _mlp(inputs: int, hidden: int, outputs: int, members: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """A head's parameters, with a leading axis of `members`: truncated normal weights, everything else neutral."""
    lead = () if members is None else (members,)
    made = {}
    for i, (width, out) in enumerate(((inputs, hidden), (hidden, hidden), (hidden, outputs))):
        weight = torch.empty(*lead, out, width)
        made[f"{i}.weight"] = nn.init.trunc_normal_(weight, std=INITIAL_STD, generator=generator)
        made[f"{i}.bias"] = torch.zeros(*lead, out)
        if i < 2:
            made[f"{i}.ln.weight"], made[f"{i}.ln.bias"] = torch.ones(*lead, out), torch.zeros(*lead, out)
    return made


def _q_functions(q: dict[str, Tensor], num_q: int, tensordict: str) -> dict[str, Any]:
    """The ensemble, its detached alias and its target, as each version of tensordict lists them."""
    q["2.weight"].zero_()
    names = ("_Qs.params", "_detach_Qs_params", "_target_Qs_params")
    made: dict[str, Any] = {}
    for name in names:  # the detached parameters are the ensemble's own, the targets a copy
        values = {k: v.clone() for k, v in q.items()} if name.startswith("_target") else q
        made.update({f"{name}.{key}": value for key, value in values.items()})
        if tensordict == "0.8":
            made.update({f"{name}.__batch_size": torch.Size([num_q]), f"{name}.__device": None})
    if tensordict == "0.14":
        for name, single in (("_Qs", True), ("_detach_Qs", False), ("_target_Qs", False)):
            for key, value in q.items():
                made[f"{name}.module.{key}"] = torch.empty(value.shape[1:] if single else value.shape, device="meta")
    return made
