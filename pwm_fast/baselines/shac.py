"""Short-Horizon Actor-Critic (Xu et al. 2022, arXiv 2204.07137): gradients through the simulator, a critic beyond.

One iteration, with N environments and a window of H steps:

1. the stochastic policy acts for H steps in the differentiable simulator, whose graph is kept;
2. actor: one step on sum_h gamma^h r_h + gamma^H V(s_H), restarted where episodes end (eq. 5);
3. critic: regress TD(lambda) targets of the target critic (eq. 6, 7) in shuffled minibatches; the target follows;
4. the statistics that normalise observations are updated.

Autograd runs through the simulator only. Actor and critic are those of extraction, with explicit gradients: the actor's
weights get theirs in one batch over the window. The critic's regression needs nothing of the next window, and the next
window needs nothing of it before its end: the two run side by side, with the results of running one after the other.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pwm_fast.baselines.actor_policy import ActorPolicy
from pwm_fast.kernels import td_lambda
from pwm_fast.learning.normalisation import RunningNormalisation
from pwm_fast.learning.optim import Adam
from pwm_fast.models.critic import Critic
from pwm_fast.models.parameters import FlatParameters
from pwm_fast.models.policy import ActionSample, Actor
from pwm_fast.models.population_mlp import Activations


@dataclass(frozen=True)
class SHACConfig:
    """Settings that work for the dflex tasks. Learning rates fall linearly to `final_rate` of their start."""

    num_envs: int = 64
    horizon: int = 32
    gamma: float = 0.99
    td_lambda: float = 0.95
    actor_units: tuple[int, ...] = (400, 200, 100)
    critic_units: tuple[int, ...] = (400, 200)
    actor_learning_rate: float = 2e-3
    critic_learning_rate: float = 5e-4
    final_rate: float = 0.005
    adam_betas: tuple[float, float] = (0.7, 0.95)
    max_gradient_norm: float = 1.0
    critic_epochs: int = 16
    critic_minibatches: int = 4
    target_momentum: float = 0.2  # target <- momentum * target + (1 - momentum) * critic
    state_gradient_limit: float = 20_000.0  # of d(an environment's return in the window)/dq and /dqd, at each step
    initial_log_std: float = -1.0

    def __post_init__(self) -> None:
        for name in ("num_envs", "horizon", "critic_epochs", "critic_minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    @staticmethod
    def from_json(fields: dict[str, Any]) -> SHACConfig:
        """From what `asdict` and JSON made of one; fields unknown to this version are dropped, missing ones default."""
        known: dict[str, Any] = {}
        for name in SHACConfig.__dataclass_fields__:
            if name in fields:
                known[name] = tuple(fields[name]) if isinstance(fields[name], list) else fields[name]
        return SHACConfig(**known)


@dataclass
class Rollout:
    """H steps in N environments. `obs` is before the step, `final_obs` after it and before any reset."""

    obs: Tensor  # [H, N, S]
    action: Tensor  # [H, N, A]
    reward: Tensor  # [H, N]
    terminated: Tensor  # [H, N] bool
    truncated: Tensor  # [H, N] bool
    final_obs: Tensor  # [H, N, S]

    @property
    def done(self) -> Tensor:
        return self.terminated | self.truncated

    def detach(self) -> Rollout:
        return Rollout(*(value.detach() for value in vars(self).values()))


@dataclass(frozen=True)
class IterationMetrics:
    """What one iteration did. A gradient norm that is not finite means that the actor skipped its step; the critic's
    loss is that of the last regression that has ended."""

    actor_gradient_norm: float
    critic_loss: float
    mean_reward: float


@dataclass
class _Tape:
    """What the actor's weight gradient needs from each step of a window."""

    noise: list[Tensor]
    samples: list[ActionSample]
    d_action: list[Tensor]


class _Act(torch.autograd.Function):
    """The actor as a node of the simulator's graph: backward notes the action's gradient and hands on the input's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: Tensor, actor: Actor, tape: _Tape) -> Tensor:
        sample = actor.forward(x.detach()[None], noise[None])
        ctx.actor, ctx.tape, ctx.step = actor, tape, len(tape.samples)
        tape.noise.append(noise[None])
        tape.samples.append(sample)
        tape.d_action.append(torch.zeros_like(sample.action))
        return sample.action[0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_action: Tensor) -> tuple[Tensor | None, ...]:
        d_action = d_action.nan_to_num(0.0, 0.0, 0.0)[None]
        ctx.tape.d_action[ctx.step] = d_action
        return ctx.actor.input_gradient(d_action, ctx.tape.samples[ctx.step])[0], None, None, None


def limited(state: Tensor, limit: float) -> Tensor:
    """The state itself; backward shortens each environment's gradient to norm `limit`.

    A few environments in stiff contact have gradients a hundred times the others', and the window's mean would be
    theirs. With the limit both seeds of the humanoid took off within 0.3M steps; one run without it did not in 1.1M.
    """
    if not limit or not state.requires_grad:
        return state
    state = state.view_as(state)
    state.register_hook(lambda g: g * (limit / (g.norm(dim=-1, keepdim=True) + 1e-12)).clamp(max=1.0))
    return state


class SHAC:
    """The algorithm's whole state on one `DifferentiableEnv`; `iteration` advances it by H * N environment steps.

    The environment has `action_in_obs=False`: the policy does not see its last action.
    All randomness comes from the generators here and the environment's own, so that `state_dict` resumes exactly.
    `overlap` lets the critic learn on a thread of its own while the next window is simulated; it changes no result.
    """

    def __init__(self, env: Any, config: SHACConfig = SHACConfig(), seed: int = 0, overlap: bool = True):
        if env.num_envs != config.num_envs:
            raise ValueError(f"num_envs must be {config.num_envs} as configured, got {env.num_envs} environments")
        self.env, self.config, self.iterations = env, config, 0
        self.generator, self.critic_generator = (torch.Generator().manual_seed(seed) for _ in range(2))
        self.actor = Actor([seed], env.obs_dim, env.action_dim, config.actor_units)
        self.actor.parameters["log_std"].fill_(config.initial_log_std)
        self.critic, self.target_critic = (Critic([seed], env.obs_dim, 1, config.critic_units) for _ in range(2))
        self.normalisation = RunningNormalisation(env.obs_dim)
        self.actor_optimizer = Adam(self.actor.parameters, 1, config.adam_betas)
        self.critic_optimizer = Adam(self.critic.parameters, 1, config.adam_betas)
        self._active = torch.ones(1, dtype=torch.bool)
        self._worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) if overlap else None
        self._regression: Future[float] | None = None
        self.critic_loss = float("nan")  # of the last regression that has ended
        env.reset()

    @property
    def env_steps(self) -> int:
        return self.iterations * self.config.horizon * self.config.num_envs

    def iteration(self, progress: float) -> tuple[Rollout, IterationMetrics]:
        """`progress` in [0, 1] is the share of the training budget that is used up; it sets the learning rates."""
        decay = max(1.0 - progress, self.config.final_rate)
        rollout, tape = self._act()
        self.finish_regression()
        norm = self._update_actor(rollout, tape, self.config.actor_learning_rate * decay)
        rollout = rollout.detach()
        self._begin_regression(rollout, self.config.critic_learning_rate * decay)
        self.normalisation.update(rollout.obs.flatten(0, 1))
        self.iterations += 1
        return rollout, IterationMetrics(norm, self.critic_loss, rollout.reward.mean().item())

    def _begin_regression(self, rollout: Rollout, learning_rate: float) -> None:
        targets, inputs = self.targets(rollout).flatten(), self.normalisation(rollout.obs).flatten(0, 1)
        if self._worker is None:
            self.critic_loss = self._update_critic(inputs, targets, learning_rate)
        else:
            self._regression = self._worker.submit(self._update_critic, inputs, targets, learning_rate)

    def finish_regression(self) -> None:
        """Wait until the critic has learned from all windows so far; raises what went wrong there."""
        if self._regression is not None:
            pending, self._regression = self._regression, None
            self.critic_loss = pending.result()

    def _act(self) -> tuple[Rollout, _Tape]:
        """H steps; the rollout's rewards and final observations carry the simulator's graph."""
        env, tape, columns = self.env, _Tape([], [], []), []
        # the objective is the mean of returns per step
        limit = self.config.state_gradient_limit / (self.config.num_envs * self.config.horizon)
        obs = env.initialize_trajectory().detach().requires_grad_()
        for _ in range(self.config.horizon):
            noise = torch.randn(env.num_envs, env.action_dim, generator=self.generator)
            action = _Act.apply(self.normalisation(obs), noise, self.actor, tape)
            env.q, env.qd = limited(env.q, limit), limited(env.qd, limit)
            next_obs, reward, terminated, truncated, info = env.step(action)
            columns.append((obs, action, reward, terminated, truncated, info["final_obs"]))
            obs = next_obs
        return Rollout(*map(torch.stack, zip(*columns))), tape

    @torch.no_grad()
    def _update_actor(self, rollout: Rollout, tape: _Tape, learning_rate: float) -> float:
        """Ascend the window's return (eq. 5); the norm of its gradient before clipping."""
        gamma, horizon = self.config.gamma, self.config.horizon
        done = rollout.done
        discount = torch.ones_like(rollout.reward)  # gamma^(steps since the window or the episode began)
        for h in range(1, horizon):
            discount[h] = torch.where(done[h - 1], 1.0, discount[h - 1] * gamma)
        ends = done.clone()
        ends[-1] = True
        ends &= ~rollout.terminated  # a terminal state is worth 0
        scale = -1.0 / discount.numel()
        d_final_obs = torch.zeros_like(rollout.final_obs)
        _, saved = self.target_critic.forward(self.normalisation(rollout.final_obs.detach()[ends])[None])
        d_value = (scale * gamma * discount[ends])[None, None]
        d_final_obs[ends] = self.target_critic.input_gradient(d_value, saved)[0] * self.normalisation.scale
        torch.autograd.backward([rollout.reward, rollout.final_obs], [scale * discount, d_final_obs])
        action = torch.cat([sample.action for sample in tape.samples], 1)
        sample = ActionSample(action, Activations.join([sample.activations for sample in tape.samples]))
        self.actor.backward(torch.cat(tape.d_action, 1), torch.cat(tape.noise, 1), sample)
        return self._step(self.actor_optimizer, learning_rate)

    def _step(self, optimizer: Adam, learning_rate: float) -> float:
        return optimizer.step(torch.tensor([learning_rate]), self.config.max_gradient_norm, self._active).item()

    @torch.no_grad()
    def targets(self, rollout: Rollout) -> Tensor:
        """TD(lambda) targets [H, N], cut at episode ends: a terminal state is worth 0, a truncated one its value."""
        c, done = self.config, rollout.done
        final_obs = self.normalisation(rollout.final_obs).flatten(0, 1)
        next_value = self.target_critic.forward(final_obs[None])[0].view_as(rollout.reward)
        next_value = next_value.masked_fill(rollout.terminated, 0.0)
        reward = rollout.reward + c.gamma * next_value * done  # at a cut all that follows is in the reward
        return td_lambda.returns(reward, next_value, (~done).float(), c.gamma, c.td_lambda)

    @torch.no_grad()
    def _update_critic(self, inputs: Tensor, targets: Tensor, learning_rate: float) -> float:
        """Regress targets [R] on inputs [R, S], move the target critic; the mean squared error over the last epoch."""
        c = self.config
        squares = torch.zeros(())
        for epoch in range(c.critic_epochs):
            for batch in torch.randperm(len(inputs), generator=self.critic_generator).chunk(c.critic_minibatches):
                value, saved = self.critic.forward(inputs[batch][None])
                error = value - targets[batch]
                self.critic.backward(error * (2.0 / len(batch)), saved)
                self._step(self.critic_optimizer, learning_rate)
                if epoch == c.critic_epochs - 1:
                    squares += error.square().sum()
        self.target_critic.parameters.flat.lerp_(self.critic.parameters.flat, 1.0 - c.target_momentum)
        return squares.item() / len(inputs)

    def policy(self) -> ActorPolicy:
        """The policy as it is now, for raw observations."""
        return ActorPolicy.fold(self.actor, self.normalisation, self.env.task.name, self.env.task.action_obs)

    def _networks(self) -> dict[str, FlatParameters]:
        return {
            "actor": self.actor.parameters,
            "critic": self.critic.parameters,
            "target_critic": self.target_critic.parameters,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything, the environment included; tensors are copies."""
        self.finish_regression()
        return {
            "iterations": self.iterations,
            "critic_loss": self.critic_loss,
            "networks": {name: parameters.flat.clone() for name, parameters in self._networks().items()},
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "normalisation": self.normalisation.state_dict(),
            "generator": self.generator.get_state(),
            "critic_generator": self.critic_generator.get_state(),
            "env": self.env.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError or RuntimeError where the state is that of another task or of other settings."""
        self.finish_regression()
        self.iterations, self.critic_loss = state["iterations"], state["critic_loss"]
        for name, parameters in self._networks().items():
            parameters.flat.copy_(state["networks"][name])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.normalisation.load_state_dict(state["normalisation"])
        self.generator.set_state(state["generator"])
        self.critic_generator.set_state(state["critic_generator"])
        self.env.load_state_dict(state["env"])
