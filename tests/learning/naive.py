"""The definition of extraction: one policy, plain autograd through H steps, everything as the published code does it.

The critic is evaluated at every step (though only the last value counts), gradients flow through the unfrozen world
model, the critics are an ensemble under vmap, Adam is torch's, norms are checked on the host. Tests compare the
explicit step with it in float64; `bench/test_extraction.py` takes it as the baseline.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwm_fast.learning.extraction import Extraction, ExtractionConfig
from pwm_fast.models.world_model import WorldModel


def mlp(widths: list[int]) -> nn.Sequential:
    """(Linear -> Mish -> LayerNorm) x hidden, Linear."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.Mish(), nn.LayerNorm(outputs)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def named(network: nn.Sequential) -> dict[str, nn.Parameter]:
    """Parameters of an `mlp` under the names of `PopulationMLP`."""
    out = {}
    for i, layer in enumerate(network):
        prefix = f"{i // 3}.ln" if i % 3 == 2 else f"{i // 3}"
        out |= {f"{prefix}.{name}": p for name, p in layer.named_parameters()}
    return out


class NaiveWorldModel:
    """A WorldModel's functions in elementary operations, differentiable in its weights too."""

    def __init__(self, model: WorldModel, task: int | None):
        self.model, self.config = model, model.config
        self.task = None if task is None else torch.tensor(task, device=model.obs_mean.device)

    def _input(self, first: Tensor, *rest: Tensor) -> Tensor:
        if self.task is None:
            return torch.cat([first, *rest], -1)
        e = self.model.task_embedding(self.task).expand(len(first), -1)
        return torch.cat([first, e, *rest], -1)

    def _run(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in layers:
            x = F.linear(x, layer.weight, layer.bias)
            if hasattr(layer, "ln"):
                x = F.layer_norm(x, x.shape[-1:], layer.ln.weight, layer.ln.bias)
                groups = layer.simnorm_dim
                x = x.unflatten(-1, (-1, groups)).softmax(-1).flatten(-2) if groups else F.mish(x)
        return x

    def encode(self, obs: Tensor) -> Tensor:
        x = (obs - self.model.obs_mean) / self.model.obs_std
        return x if self.config.residual else self._run(self.model._encoder, self._input(x))

    def next(self, z: Tensor, action: Tensor) -> Tensor:
        x = self._run(self.model._dynamics, self._input(z, action))
        return z + self.model.step_mean + self.model.step_std * x if self.config.residual else x

    def reward(self, z: Tensor, action: Tensor) -> Tensor:
        c = self.config
        x = self._run(self.model._reward, self._input(z, action))
        if c.num_bins == 1:
            x = x.squeeze(-1)
        else:
            x = (x.softmax(-1) * torch.linspace(c.vmin, c.vmax, c.num_bins, dtype=x.dtype, device=x.device)).sum(-1)
        return self.model.reward_scale * (x.sign() * torch.expm1(x.abs()) if c.reward_symlog else x)

    def continues(self, z: Tensor) -> Tensor:
        return 1 - torch.sigmoid(self._run(self.model._termination, self._input(z)).squeeze(-1))


class NaiveExtraction:
    """One policy, extracted by autograd. Weights start as those of policy `index` of an Extraction."""

    def __init__(self, world_model: WorldModel, extraction: Extraction, index: int = 0):
        self.config: ExtractionConfig = extraction.config
        c, w, p = self.config, world_model.config, index
        self.task = None if extraction.task_ids is None else int(extraction.task_ids[p])
        self.world = NaiveWorldModel(copy.deepcopy(world_model).requires_grad_(True), self.task)
        like = next(world_model.parameters())
        self.actor = mlp([w.latent_dim, *c.actor_units, w.action_dim]).to(like)
        self.log_std = nn.Parameter(extraction.actor.parameters["log_std"][p].clone())
        critics = [mlp([w.latent_dim, *c.critic_units, 1]).to(like) for _ in range(c.num_critics)]
        with torch.no_grad():
            for name, value in named(self.actor).items():
                value.copy_(extraction.actor.parameters[name][p])
            for k, critic in enumerate(critics):
                for name, value in named(critic).items():
                    value.copy_(extraction.critic.parameters[name][p * c.num_critics + k])
        self.critic_form = copy.deepcopy(critics[0]).to("meta")
        self.critics = torch.func.stack_module_state(critics)[0]
        self.actor_parameters = [*self.actor.parameters(), self.log_std]
        self.actor_adam = torch.optim.Adam(self.actor_parameters, c.actor_lr, c.betas)
        self.critic_adam = torch.optim.Adam(list(self.critics.values()), c.critic_lr, c.betas)
        self.mean, self.variance, self.count = 0.0, 1.0, 1e-4
        self.total_steps, self.steps = extraction.total_steps, 0

    def values(self, z: Tensor) -> Tensor:
        """[K, ...] values of every critic."""

        def one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self.critic_form, parameters, (x,)).squeeze(-1)

        return torch.func.vmap(one, (0, None))(self.critics, z)

    def actor_loss(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Mean loss over start states obs [B, S] with noise [H, B, A]; keeps what the critic needs."""
        c = self.config
        z = self.world.encode(obs)
        total, discount = torch.zeros_like(z[:, 0]), torch.ones_like(z[:, 0])
        self.latents, self.rewards, self.next_values, self.continues = [z.detach()], [], [], []
        for h in range(c.horizon):
            mu = self.actor(z.detach() if c.detach_actor_input else z)
            action = torch.tanh(mu + self.log_std.exp() * noise[h])
            reward = self.world.reward(z, action)
            z = self.world.next(z, action)
            value = self.values(z).min(0).values
            total = total + discount * reward
            continues = self.world.continues(z) if c.terminations else torch.ones_like(reward)
            discount = discount * c.gamma * continues
            is_last = float(h == c.horizon - 1)
            total = total + is_last * c.gamma**c.terminal_discount_offset * discount * value
            self.latents.append(z.detach())
            self.rewards.append(reward.detach())
            self.next_values.append(value.detach())
            self.continues.append(continues.detach())
        loss = -total
        if not c.return_normalisation:
            return loss.mean() / c.horizon
        self._see(loss.detach())
        return loss.mean() / (self.variance + 1e-5) ** 0.5

    def _see(self, sample: Tensor) -> None:
        number, mean, variance = len(sample), sample.mean(), sample.var(correction=0)
        total, delta = self.count + number, mean - self.mean
        squares = self.variance * self.count + variance * number + delta**2 * self.count * number / total
        self.mean, self.variance, self.count = self.mean + delta * number / total, squares / total, total

    def targets(self) -> Tensor:
        """TD(lambda) targets [H, B]."""
        c, out, following = self.config, [], self.next_values[-1]
        for h in reversed(range(c.horizon)):
            bootstrap = (1 - c.td_lambda) * self.next_values[h] + c.td_lambda * following
            following = self.rewards[h] + c.gamma * self.continues[h] * bootstrap
            out.append(following)
        return torch.stack(out[::-1])

    def step(self, obs: Tensor, noise: Tensor, orders: list[Tensor] | None = None) -> dict[str, float]:
        """One gradient step. `orders`: row order of the flattened batch for each epoch (None: as they come)."""
        c = self.config
        progress = self.steps / self.total_steps
        for adam, lr in ((self.actor_adam, c.actor_lr), (self.critic_adam, c.critic_lr)):
            for group in adam.param_groups:
                group["lr"] = lr + (c.final_lr - lr) * progress
        with torch.no_grad():
            self.log_std.clamp_(min=c.min_log_std)
        self.actor_adam.zero_grad()
        loss = self.actor_loss(obs, noise)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.actor_parameters, c.actor_max_norm)
        if torch.isnan(norm):
            raise ArithmeticError("the actor's gradient is NaN")
        self.actor_adam.step()

        x, y = torch.cat(self.latents[:-1]), self.targets().flatten()
        rows, losses = torch.arange(len(x), device=x.device), []
        for epoch in range(c.critic_epochs):
            order = rows if orders is None else orders[epoch]
            for index in order.tensor_split(c.critic_minibatches):
                self.critic_adam.zero_grad()
                critic_loss = (self.values(x[index]) - y[index]).square().mean()
                critic_loss.backward()
                for value in self.critics.values():
                    value.grad.nan_to_num_(nan=0.0)
                nn.utils.clip_grad_norm_(list(self.critics.values()), c.critic_max_norm)
                self.critic_adam.step()
                losses.append(critic_loss.item())
        self.steps += 1
        return {"actor_loss": loss.item(), "actor_grad_norm": norm.item(), "critic_loss": sum(losses) / len(losses)}

    def actor_tensors(self) -> dict[str, Tensor]:
        """The actor's parameters under the names of `Actor`."""
        return {**named(self.actor), "log_std": self.log_std}

    def critic_tensors(self) -> dict[str, Tensor]:
        """The critics' parameters [K, ...] under the names of `Critic`."""
        names = {id(p): name for name, p in named(self.critic_form).items()}
        form = dict(self.critic_form.named_parameters())
        return {names[id(form[key])]: value for key, value in self.critics.items()}
