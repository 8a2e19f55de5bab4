"""The loss of world-model learning (PWM Eq. 10) and its gradient, written out.

Over windows of H + 1 observations: latent consistency against stop-gradient encodings, soft cross-entropy of two-hot
rewards, and binary cross-entropy of terminations where the model has that head; step h weighs rho^h. All H + 1
observations are encoded in one batch and the heads see all H steps in one; only the rollout goes step by step, and its
weight gradients are products over all steps again. Autograd's version is the definition, and lives in the tests; a step
takes it 1.1 (80 tasks) to 1.4 times as long on one thread (AVX2, Zen 3, bench/test_pretraining.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pwm_fast.kernels import two_hot
from pwm_fast.models.trained_network import TrainedNetwork
from pwm_fast.models.workspace import Workspace
from pwm_fast.models.world_model import WorldModel

if TYPE_CHECKING:
    from pwm_fast.learning.pretraining import PretrainingConfig, Windows

EMBEDDING_EPS = 1e-7  # torch's, of embeddings with a largest norm
LARGEST_ERROR = 8.0  # of a change of state, in standard deviations


class ModelGradient:
    """Calls give the loss terms of a batch and write their gradient into the parameters' `.grad`.

    `dtype`: what the networks are multiplied and kept in (default: the parameters' type, which latents, losses and
    gradients always have).
    """

    def __init__(self, model: WorldModel, dtype: torch.dtype | None = None):
        self.model, self._workspace = model, Workspace()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self._encoder = None if model.config.residual else TrainedNetwork(model._encoder, dtype)
        self._dynamics, self._reward = TrainedNetwork(model._dynamics, dtype), TrainedNetwork(model._reward, dtype)
        self._termination = None if model._termination is None else TrainedNetwork(model._termination, dtype)

    @torch.no_grad()
    def __call__(self, windows: Windows, config: PretrainingConfig) -> dict[str, Tensor]:
        """The weighted sum `total` and its unweighted parts `consistency`, `reward`, `termination` (scalars)."""
        weight = config.rho ** torch.arange(len(windows.action), device=windows.obs.device, dtype=windows.obs.dtype)
        weight = weight[:, None].expand_as(windows.reward) / windows.reward.numel()  # [H, B]
        if windows.valid is not None:
            weight = weight * windows.valid
        e = None if windows.task is None else self._embedding(windows.task)  # [B, E]
        encodings, steps, z = self._imagine(windows, e)
        terms, dz = {}, self._workspace.tensor("dz", encodings, *encodings.shape)
        de = None if e is None else torch.zeros_like(e)
        dz[0] = 0
        terms["consistency"] = self._consistency(z, encodings[1:], weight, config, dz[1:])
        terms["reward"] = self._rewards(windows, steps, weight, config, dz[:-1], de)
        if self._termination is not None:
            terms["termination"] = self._terminations(windows, z, e, weight, config, dz[1:], de)
        self._back_through_time(dz, de)
        if windows.task is not None and de is not None:
            self._back_to_embedding(windows.task, de)
        total = sum(getattr(config, f"{name}_coef") * value for name, value in terms.items())
        return {"total": total, **terms}

    def _embedding(self, task: Tensor) -> Tensor:
        """`WorldModel.task_embedding`, by operations that a device without data can trace."""
        rows = self._table().detach().index_select(0, task)
        return rows * (1.0 / (rows.norm(dim=-1, keepdim=True) + EMBEDDING_EPS)).clamp(max=1.0)

    def _back_to_embedding(self, task: Tensor, de: Tensor) -> None:
        """Through e = w s with s = 1 / (|w| + eps), where that is below 1: dw = s de - (s^2 / |w|) (w . de) w."""
        weight = self._table()
        # a product with one-hot rows adds up in one order on every device
        member = (task == torch.arange(len(weight), device=task.device)[:, None]).to(de.dtype)  # [T, B]
        de, w = member @ de, weight.detach()
        norm = w.norm(dim=1, keepdim=True)
        scale = 1.0 / (norm + EMBEDDING_EPS)
        along = scale.square() / norm * (w * de).sum(1, keepdim=True) * w
        assert weight.grad is not None
        weight.grad.copy_(torch.where(scale < 1.0, scale * de - along, de))

    def _table(self) -> Tensor:
        assert self.model._task_emb is not None
        return self.model._task_emb.weight

    def _imagine(self, windows: Windows, e: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Encodings [H+1, B, Z] of what was observed, the networks' inputs [z, e, a] of all steps [H, B, .], and the
        open-loop latents z_1 .. z_H [H, B, Z]."""
        m, c = self.model, self.model.config
        horizon, batch, latent = *windows.reward.shape, c.latent_dim
        x = (windows.obs - m.obs_mean) / m.obs_std
        if self._encoder is None:
            encodings = x
        else:
            inputs = self._joined("observations", [x], e)
            encodings = self._encoder.begin(inputs.flatten(0, 1), slice(c.obs_dim, None))
            encodings = encodings.view(horizon + 1, batch, latent)
            self._encoder.forward()
        steps = self._joined("steps", [encodings[:-1], windows.action], e)  # of z, only the first is right so far
        outputs = self._dynamics.begin(steps.flatten(0, 1), self._learned(e), horizon).view(horizon, batch, latent)
        z = outputs
        if c.residual or z.dtype is not x.dtype:
            z = self._workspace.tensor("z", x, horizon, batch, latent)
        for h in range(horizon):
            self._dynamics.forward(slice(h * batch, (h + 1) * batch))
            if c.residual:
                before = encodings[0] if h == 0 else z[h - 1]
                torch.addcmul(before + m.step_mean, outputs[h].to(x.dtype), m.step_std, out=z[h])
            elif z is not outputs:
                z[h] = outputs[h]
            if h + 1 < horizon:
                steps[h + 1, :, :latent] = z[h]
        return encodings.to(x.dtype), steps, z

    def _learned(self, e: Tensor | None) -> slice:
        """The columns of [z, e, a] that something is learned from."""
        return slice(self.model.config.latent_dim + (0 if e is None else e.shape[1]))

    def _joined(self, name: str, parts: list[Tensor], e: Tensor | None) -> Tensor:
        """[first, e, rest] [H, B, .] in the networks' type."""
        if e is not None:
            parts = [parts[0], e.expand(*parts[0].shape[:-1], -1), *parts[1:]]
        if len(parts) == 1 and parts[0].dtype is self._dynamics.dtype:
            return parts[0]
        like = parts[-1].new_empty(0, dtype=self._dynamics.dtype)
        out = self._workspace.tensor(name, like, *parts[0].shape[:-1], sum(p.shape[-1] for p in parts))
        for part, place in zip(parts, out.split([p.shape[-1] for p in parts], -1)):
            place.copy_(part)
        return out

    def _consistency(self, z: Tensor, target: Tensor, weight: Tensor, config: PretrainingConfig, dz: Tensor) -> Tensor:
        """Mean squared distance to the encodings; writes its gradient at z, [H, B, Z]."""
        error = torch.sub(z, target, out=dz)
        if (
            self.model.config.residual
        ):  # in units of a step's change; contacts are outliers that no gradient should follow
            error /= self.model.step_std
            outlier = error.abs() > LARGEST_ERROR
            error.clamp_(-LARGEST_ERROR, LARGEST_ERROR)
        consistency = (weight * torch.linalg.vector_norm(error, dim=2).square()).sum() / z.shape[2]
        error *= (2 * config.consistency_coef / z.shape[2] * weight)[..., None]
        if self.model.config.residual:
            error.masked_fill_(outlier, 0.0).div_(self.model.step_std)
        return consistency

    def _rewards(
        self, windows: Windows, steps: Tensor, weight: Tensor, config: PretrainingConfig, dz: Tensor, de: Tensor | None
    ) -> Tensor:
        """The rewards' loss; adds its gradients to those at z_0 .. z_{H-1} [H, B, Z] and at the embeddings."""
        c, net = self.model.config, self._reward
        goal = self.model.reward_target(windows.reward)
        net.begin(steps.flatten(0, 1), self._learned(de))
        output = net.forward().view(*goal.shape, -1).to(goal.dtype)  # [H, B, bins]
        slope = config.reward_coef * weight
        if c.num_bins == 1:
            error = output.squeeze(-1) - goal
            loss, d = error.square(), (2 * slope * error)[..., None]
        else:
            loss = two_hot.cross_entropy_forward(output, goal, c.vmin, c.vmax)
            d = two_hot.cross_entropy_backward(slope, output, goal, c.vmin, c.vmax)
        net.output_gradient.copy_(d.flatten(0, 1))
        net.backward()
        net.weight_gradients()
        first = 1 if c.residual and de is None else 0  # an observation has nothing to learn
        if first < len(steps):
            self._add_input_gradient(net, slice(first * goal.shape[1], None), dz[first:], de)
        return (weight * loss).sum()

    def _terminations(
        self,
        windows: Windows,
        z: Tensor,
        e: Tensor | None,
        weight: Tensor,
        config: PretrainingConfig,
        dz: Tensor,
        de: Tensor | None,
    ) -> Tensor:
        """The terminations' loss; adds its gradients to those at z_1 .. z_H [H, B, Z] and at the embeddings."""
        net = self._termination
        assert net is not None
        net.begin(self._joined("states", [z], e).flatten(0, 1))
        logit = net.forward().view_as(windows.terminated).to(z.dtype)
        loss = F.binary_cross_entropy_with_logits(logit, windows.terminated, reduction="none")
        d = config.termination_coef * weight * (torch.sigmoid(logit) - windows.terminated)
        net.output_gradient.copy_(d.flatten()[:, None])
        net.backward()
        net.weight_gradients()
        self._add_input_gradient(net, slice(None), dz, de)
        return (weight * loss).sum()

    def _add_input_gradient(self, net: TrainedNetwork, rows: slice, dz: Tensor, de: Tensor | None) -> None:
        """Adds the gradient at these rows' [z, e] to dz [n, B, Z] and, summed over steps, to de [B, E]."""
        latent = dz.shape[-1]
        d = net.input_gradient(rows).view(*dz.shape[:-1], -1)
        dz += d[..., :latent]
        if de is not None:
            de += d[..., latent:].sum(0, dtype=de.dtype)

    def _back_through_time(self, dz: Tensor, de: Tensor | None) -> None:
        """From the gradients at z_0 .. z_H [H+1, B, Z] to those of the dynamics and the encoder."""
        m, net, batch = self.model, self._dynamics, dz.shape[1]
        residual = m.config.residual
        for h in reversed(range(len(dz) - 1)):
            rows = slice(h * batch, (h + 1) * batch)
            net.output_gradient[rows] = dz[h + 1] * m.step_std if residual else dz[h + 1]
            net.backward(rows)
            if h or not residual or de is not None:
                self._add_input_gradient(net, rows, dz[h : h + 1], de)
            if residual and h:
                dz[h] += dz[h + 1]
        net.weight_gradients()
        if self._encoder is not None:
            rows = slice(batch)
            self._encoder.output_gradient[rows] = dz[0]
            self._encoder.backward(rows)
            self._encoder.weight_gradients(rows)
            if de is not None:
                de += self._encoder.input_gradient(rows)
