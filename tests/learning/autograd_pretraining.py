"""World-model learning by autograd: the definition of `model_gradient.py`, and what its speed is compared with.

Plain autograd through H steps makes H small weight-gradient products per layer; `latent_rollout` keeps the
pre-activation gradients of all steps and forms each weight gradient by one product over H*B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pwm_fast.kernels import layernorm_mish, layernorm_simnorm, two_hot
from pwm_fast.learning.model_gradient import LARGEST_ERROR
from pwm_fast.learning.pretraining import Pretraining, PretrainingConfig, Windows
from pwm_fast.models.matmul import fast_matmul
from pwm_fast.models.world_model import WorldModel


def plain_rollout(model: WorldModel, z: Tensor, windows: Windows) -> Tensor:
    """Latents [H+1, B, Z] from z [B, Z] under the recorded actions, step by step."""
    states = [z]
    for action in windows.action:
        states.append(model.next(states[-1], action, windows.task))
    return torch.stack(states)


def fused_rollout(model: WorldModel, z: Tensor, windows: Windows) -> Tensor:
    """The same by `latent_rollout`."""
    control = windows.action
    if windows.task is not None:
        e = model.task_embedding(windows.task)
        control = torch.cat([e.expand(*control.shape[:-1], -1), control], -1)
    return latent_rollout(model, z, control)


def loss_terms(
    model: WorldModel, windows: Windows, config: PretrainingConfig, rollout: Any = plain_rollout
) -> dict[str, Tensor]:
    """The weighted sum `total` and its unweighted parts `consistency`, `reward`, `termination` (scalars)."""
    horizon = len(windows.action)
    weight = config.rho ** torch.arange(horizon, device=windows.obs.device, dtype=windows.obs.dtype)
    weight = weight[:, None].expand_as(windows.reward) / windows.reward.numel()  # [H, B]
    if windows.valid is not None:
        weight = weight * windows.valid
    with torch.no_grad():
        target = model.encode(windows.obs[1:], windows.task)  # [H, B, Z]
    z = rollout(model, model.encode(windows.obs[0], windows.task), windows)
    error = z[1:] - target
    if model.config.residual:  # in units of a step's change; contacts are outliers that no gradient should follow
        error = (error / model.step_std).clamp(-LARGEST_ERROR, LARGEST_ERROR)
    consistency = (weight * error.square().mean(2)).sum()
    goal = model.reward_target(windows.reward)
    output = model.reward_logits(z[:-1], windows.action, windows.task).to(goal.dtype)  # [H, B, bins]
    if model.config.num_bins == 1:
        error = (output.squeeze(-1) - goal).square()
    else:
        error = two_hot.cross_entropy(output, goal, model.config.vmin, model.config.vmax)
    reward = (weight * error).sum()
    terms = {"consistency": consistency, "reward": reward}
    total = config.consistency_coef * consistency + config.reward_coef * reward
    if model.has_termination:
        logit = model.termination_logit(z[1:], windows.task).to(goal.dtype)
        ended = F.binary_cross_entropy_with_logits(logit, windows.terminated, reduction="none")
        terms["termination"] = (weight * ended).sum()
        total = total + config.termination_coef * terms["termination"]
    return {"total": total, **terms}


class AutogradPretraining:
    """`Pretraining` with autograd's gradients, clipped tensor by tensor, and torch's Adam."""

    learning_rate = Pretraining.learning_rate

    def __init__(self, model: WorldModel, config: PretrainingConfig, batch: Callable[[int], Windows]):
        self.model, self.config, self.batch, self.step_count = model, config, batch, 0
        encoder = list(model._encoder.parameters())
        known = {id(p) for p in encoder}
        self.parameters = encoder + [p for p in model.parameters() if id(p) not in known]
        groups = [
            {"params": encoder, "scale": config.encoder_lr_scale},
            {"params": self.parameters[len(encoder) :], "scale": 1.0},
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def step(self) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step_count) * group["scale"]
        self.optimizer.zero_grad(set_to_none=True)
        device = self.model.obs_mean.device
        with fast_matmul(torch.float32, device, tf32=self.config.precision != "fp32"):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                terms = loss_terms(self.model, self.batch(self.step_count), self.config, fused_rollout)
            terms["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip, foreach=True)
        self.optimizer.step()
        self.step_count += 1
        return {**{k: v.item() for k, v in terms.items()}, "grad_norm": norm.item()}


def latent_rollout(model: WorldModel, z: Tensor, control: Tensor) -> Tensor:
    """Latents [H+1, B, Z] from z [B, Z] under controls [H, B, E+A]; differentiable in z, control and the dynamics."""
    layers: nn.ModuleList = model._dynamics
    parameters: list[Tensor | None] = []
    for layer in layers:
        ln = getattr(layer, "ln", None)
        parameters += [layer.weight, layer.bias, *((None, None) if ln is None else (ln.weight, ln.bias))]
    step = (model.step_mean, model.step_std) if model.config.residual else (None, None)
    return _LatentRollout.apply(z, control, model.config.simnorm_dim, *step, *parameters)


class _LatentRollout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        control: Tensor,
        simnorm_dim: int,
        step_mean: Tensor | None,
        step_std: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        horizon, batch = control.shape[:2]
        depth = len(parameters) // 4
        own = parameters[0].dtype
        low = torch.get_autocast_dtype(z.device.type) if torch.is_autocast_enabled(z.device.type) else own
        parameters = tuple(p if p is None else p.to(low) for p in parameters)
        layers = [parameters[4 * i : 4 * i + 4] for i in range(depth)]
        inputs = [z.new_empty(horizon, batch, w.shape[1], dtype=low) for w, *_ in layers]
        linear = [z.new_empty(horizon, batch, w.shape[0], dtype=low) for w, *_ in layers]
        statistics = [z.new_empty(0) for _ in layers]
        out = z.new_empty(horizon + 1, batch, z.shape[1], dtype=own)
        out[0] = z
        inputs[0][..., z.shape[1] :] = control
        for h in range(horizon):
            x = out[h]
            for i, (weight, bias, ln_weight, ln_bias) in enumerate(layers):
                inputs[i][h, :, : x.shape[1]] = x
                torch.addmm(bias, inputs[i][h], weight.T, out=linear[i][h])
                if ln_weight is None:  # the residual step of normalised observations
                    x = torch.addcmul(out[h] + step_mean, linear[i][h].to(own), step_std)
                    continue
                rows, ln = linear[i][h][None], (ln_weight[None], ln_bias[None])
                if i + 1 < depth:
                    y, mean, rstd = layernorm_mish.forward(rows, *ln)
                else:
                    y, mean, rstd = layernorm_simnorm.forward(rows, *ln, simnorm_dim)
                if h == 0:  # in the kernel's precision
                    statistics[i] = mean.new_empty(2, horizon, batch)
                statistics[i][0, h], statistics[i][1, h] = mean[0], rstd[0]
                x = y[0]
            out[h + 1] = x
        ctx.simnorm_dim, ctx.depth = simnorm_dim, depth
        ctx.save_for_backward(out, step_std, *parameters, *inputs, *linear, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, step_std, *saved = ctx.saved_tensors
        depth = ctx.depth
        parameters, saved = saved[: 4 * depth], saved[4 * depth :]
        inputs, linear, statistics = saved[:depth], saved[depth : 2 * depth], saved[2 * depth :]
        horizon, latent = len(out) - 1, out.shape[2]
        d_linear = [torch.empty_like(x) for x in linear]
        d_norm = [
            [None if p is None else torch.zeros_like(p, dtype=out.dtype) for p in parameters[4 * i + 2 : 4 * i + 4]]
            for i in range(depth)
        ]
        d_control = grad.new_empty(horizon, out.shape[1], inputs[0].shape[2] - latent)
        dz = grad[horizon]
        for h in reversed(range(horizon)):
            dx = dz.to(inputs[0].dtype)
            for i in reversed(range(depth)):
                weight, _, ln_weight, ln_bias = parameters[4 * i : 4 * i + 4]
                if ln_weight is None:
                    d_linear[i][h] = dz * step_std
                    dx = d_linear[i][h] @ weight
                    continue
                rows, mean, rstd = linear[i][h][None], statistics[i][0, h][None], statistics[i][1, h][None]
                ln = (ln_weight[None], ln_bias[None])
                if i + 1 < depth:
                    d, dw, db = layernorm_mish.backward(dx[None], rows, mean, rstd, *ln, True)
                else:
                    y = out[h + 1][None].to(dx.dtype)
                    d, dw, db = layernorm_simnorm.backward(dx[None], y, rows, mean, rstd, *ln, True, ctx.simnorm_dim)
                d_linear[i][h] = d[0]
                d_norm[i][0] += dw[0]
                d_norm[i][1] += db[0]
                dx = d[0] @ weight
            d_control[h] = dx[:, latent:]
            dz = grad[h] + dx[:, :latent] if step_std is None else grad[h] + dx[:, :latent] + dz
        gradients: list[Tensor | None] = []
        for i in range(depth):
            rows = d_linear[i].flatten(0, 1)
            gradients += [rows.T @ inputs[i].flatten(0, 1), rows.sum(0), *d_norm[i]]
        return (dz, d_control, None, None, None, *gradients)  # autograd gives each its input's type
