"""How well a world model predicts what happened, open loop, on windows it has not learned from."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.learning.pretraining import Windows
from pwm_fast.models.world_model import WorldModel


def rollout(model: WorldModel, windows: Windows) -> Tensor:
    """Open-loop latents z [H+1, B, Z] from the first observation under the recorded actions."""
    z = [model.encode(windows.obs[0], windows.task)]
    for action in windows.action:
        z.append(model.next(z[-1], action, windows.task))
    return torch.stack(z)


@torch.no_grad()
def validate(model: WorldModel, batches: list[Windows], endings: list[Windows]) -> dict[str, float]:
    """Open-loop quality on held-out windows: `batches` are whole, `endings` may meet their episodes' ends.

    `latent_error`: mean squared error of z_H over the variance of the encodings (0 is perfect, 1 is the mean's);
    `return_r2`: R^2 of the summed H-step reward; `reward_mae` per step; `termination_auc` where there is a head.
    """
    errors, encodings, predicted, actual, step_error, logits, ended = [], [], [], [], [], [], []
    for w in batches:
        z, goal = rollout(model, w), model.encode(w.obs[-1], w.task)
        errors.append((z[-1] - goal).square().mean(0))
        encodings.append(goal)
        reward = model.reward(z[:-1], w.action, w.task)
        predicted.append(reward.sum(0))
        actual.append(w.reward.sum(0))
        step_error.append((reward - w.reward).abs().mean())
    for w in endings if model.has_termination else []:
        logit = model.termination_logit(rollout(model, w)[1:], w.task)
        valid = torch.ones_like(logit) if w.valid is None else w.valid
        logits.append(logit[valid > 0])
        ended.append(w.terminated[valid > 0])
    variance = torch.cat(encodings).var(0, unbiased=False)
    p, a = torch.cat(predicted), torch.cat(actual)
    out = {
        "latent_error": (torch.stack(errors).mean(0).sum() / variance.sum()).item(),
        "return_r2": (1.0 - (p - a).square().mean() / a.var(unbiased=False).clamp(min=1e-12)).item(),
        "reward_mae": torch.stack(step_error).mean().item(),
    }
    if logits and 0 < torch.cat(ended).sum() < torch.cat(ended).numel():
        out["termination_auc"] = _auc(torch.cat(logits), torch.cat(ended))
    return out


def _auc(score: Tensor, label: Tensor) -> float:
    """Area under the ROC curve, from ranks."""
    rank = torch.empty_like(score)
    rank[score.argsort()] = torch.arange(1, len(score) + 1, dtype=score.dtype)
    positives = label.sum()
    area = rank[label > 0].sum() - positives * (positives + 1) / 2
    return (area / (positives * (len(label) - positives))).item()
