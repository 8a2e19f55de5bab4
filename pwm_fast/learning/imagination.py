"""H imagined steps through the frozen world model, and the gradient that comes back to the actors (PWM Eq. 6).

Only the recurrence z -> a -> z' is sequential. Rewards, terminations and values of all steps are one batch each, and so
is the actors' backward pass, because their input is detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pwm_fast.kernels import two_hot
from pwm_fast.learning.native_rollout import NativeRollout
from pwm_fast.models.frozen import FrozenNetwork, Saved
from pwm_fast.models.policy import ActionSample, Actor
from pwm_fast.models.population_mlp import Activations
from pwm_fast.models.workspace import Workspace
from pwm_fast.models.world_model import FrozenLayer, FrozenWorldModel
from pwm_fast.profiling import span


class Rollout(NamedTuple):
    """One imagined (or real) batch and what its backward pass needs.

    An imagined one lies in memory that the next rollout of these shapes overwrites, so that a captured step finds it
    in the same place every time; of a real one that holds for what the frozen networks keep.
    """

    inputs: Tensor  # [H + 1, P, B, Z + A]: z_h and a_h side by side, as the networks read them (a_H is unused)
    latents: Tensor  # [P, H + 1, B, Z]: the same z_h, one policy's rows together
    reward: Tensor  # [H, P, B]
    continues: Tensor | None  # [H, P, B]: probability that the episode goes on in z_{h+1}
    continues_slope: Tensor | None  # [H, P, B]: its derivative by the termination head's output, negated
    noise: Tensor  # [P, H, B, A]
    actor: list[ActionSample]  # empty, as `dynamics` is, where a `Recurrence` keeps them
    dynamics: list[list[Saved]]
    reward_logits: Tensor
    reward_layers: list[Saved]
    termination_layers: list[Saved]


class Recurrence(Protocol):
    """All H steps of actors and dynamics at once, in place of the loops in `Imagination`: the place of a kernel.

    All of it lies in memory that stays in place and that the next `forward` overwrites.
    """

    def forward(self, actor: Actor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`inputs` and `latents` of a `Rollout` from z_0 [P, B, Z] with noise [P, H, B, A]."""

    def backward(self, actor: Actor, d_inputs: Tensor, d_last: Tensor, detach: bool) -> Tensor:
        """Gradients [P, H, B, A] of the actions, given those at `inputs` [H, P, B, Z + A] and at z_H [P, B, Z]."""

    def sample(self, actor: Actor) -> ActionSample:
        """What the actors' backward pass needs of all steps, rows [P, H * B, .] ordered (step, state)."""

    def load(self, dynamics: Sequence[FrozenLayer]) -> None:
        """Take other weights of the same shapes, in place."""


class Imagination:
    """The world model as a differentiable simulator for a population of actors."""

    def __init__(self, world: FrozenWorldModel, terminations: bool = False, dtype: torch.dtype | None = None):
        """`dtype` as of `FrozenNetwork`, for all networks but the encoder, which runs once a step (default: theirs)."""
        c = self.config = world.config
        if terminations and world.termination is None:
            raise ValueError("terminations need a world model with a termination head (termination_dim > 0)")
        self.encoder = FrozenNetwork(world.encoder, c.simnorm_dim)  # used once a step: not worth packing
        self.dynamics = FrozenNetwork(world.dynamics, c.simnorm_dim, True, dtype)
        self.reward = FrozenNetwork(world.reward, c.simnorm_dim, True, dtype)
        self.termination = FrozenNetwork(world.termination, c.simnorm_dim, True, dtype) if terminations else None
        self.reward_scale = world.reward_scale
        self._workspace = Workspace()
        self.recurrence: Recurrence | None = None
        self._native = NativeRollout(self.dynamics, c)

    def load(self, world: FrozenWorldModel) -> None:
        """Take the weights of another world model of the same shape, in place: a captured step goes on with them."""
        self.encoder.load(world.encoder)
        self.dynamics.load(world.dynamics)
        self.reward.load(world.reward)
        if self.termination is not None:
            assert world.termination is not None
            self.termination.load(world.termination)
        self.reward_scale.copy_(world.reward_scale)
        if self.recurrence is not None:
            self.recurrence.load(self.dynamics.layers)

    @span("rollout")
    def rollout(self, actor: Actor, obs: Tensor, noise: Tensor) -> Rollout:
        """Imagine from raw observations [P, B, S] with standard normal noise [P, H, B, A]."""
        work = self._workspace.part("imagined")
        z = self.encoder.forward(obs, work.part("encoder"))[0]
        samples: list[ActionSample] = []
        dynamics: list[list[Saved]] = []
        recurrence = self.recurrence or (self._native if self._native.available(actor, z, noise) else None)
        if recurrence is not None:
            inputs, latents = recurrence.forward(actor, z, noise)
        else:
            inputs, latents, samples, dynamics = self._imagine(actor, z, noise)
        with span("reward"):
            logits, reward_layers = self.reward.forward(inputs[:-1], self._workspace.part("reward"))
            continues, slope, termination_layers = self._continues(inputs)

        def kept(name: str, value: Tensor) -> Tensor:
            return work.tensor(name, value, *value.shape).copy_(value)

        return Rollout(
            inputs,
            latents,
            kept("reward", self._expected_reward(logits)),
            None if continues is None else kept("continues", continues),
            None if slope is None else kept("slope", slope),
            kept("noise", noise),
            samples,
            dynamics,
            logits,
            reward_layers,
            termination_layers,
        )

    def _imagine(
        self, actor: Actor, z: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, list[ActionSample], list[list[Saved]]]:
        """The recurrence, step by step: `inputs`, `latents`, `actor` and `dynamics` of a `Rollout`."""
        z_dim, work = self.config.latent_dim, self._workspace.part("imagined")
        policies, horizon, batch, action_dim = noise.shape
        inputs = work.tensor("inputs", z, horizon + 1, policies, batch, z_dim + action_dim)
        latents = work.tensor("latents", z, policies, horizon + 1, batch, z_dim)
        samples, dynamics = [], []
        for h in range(horizon):
            latents[:, h], inputs[h, ..., :z_dim] = z, z
            samples.append(actor.forward(z, noise[:, h], work.part(f"actor {h}")))
            inputs[h, ..., z_dim:] = samples[h].action
            change, saved = self.dynamics.forward(inputs[h], self._workspace.part(f"dynamics {h}"))
            z = torch.add(z, change, out=work.tensor(f"z {h + 1}", z, *z.shape)) if self.config.residual else change
            dynamics.append(saved)
        latents[:, horizon], inputs[horizon, ..., :z_dim] = z, z
        return inputs, latents, samples, dynamics

    @span("rollout")
    def along(self, actor: Actor, obs: Tensor, action: Tensor, reward: Tensor, continues: Tensor) -> Rollout:
        """Real trajectories of the actors as if imagined: the values are real, the derivatives the world model's.

        Heess et al. 2015 (SVG, section 4): states, rewards and ends are taken as they were, the noise is what the
        actor's distribution needs to give the action taken, and no error of the model can be exploited or accumulate.
        obs [H+1, P, B, S], action [H, P, B, A], reward and continues [H, P, B] (0 where the episode ended).
        """
        horizon, z_dim = len(action), self.config.latent_dim
        z = self.encoder.forward(obs)[0]
        inputs = torch.cat([z, torch.zeros_like(z[..., :1]).expand(*z.shape[:-1], action.shape[-1])], -1)
        inputs[:-1, ..., z_dim:] = action
        samples, noises, dynamics = [], [], []
        for h in range(horizon):
            sample, noise = actor.explain(z[h], action[h])
            samples.append(sample)
            noises.append(noise)
            dynamics.append(self.dynamics.forward(inputs[h], self._workspace.part(f"dynamics {h}"))[1])
        with span("reward"):
            logits, reward_layers = self.reward.forward(inputs[:-1], self._workspace.part("reward"))
            _, slope, termination_layers = self._continues(inputs)
        return Rollout(
            inputs, z.transpose(0, 1).contiguous(), reward, continues, slope, torch.stack(noises, 1), samples, dynamics,
            logits, reward_layers, termination_layers,
        )  # fmt: skip

    def _continues(self, inputs: Tensor) -> tuple[Tensor | None, Tensor | None, list[Saved]]:
        """Continuation, its slope and what the head's backward pass needs, for the states z_1 .. z_H."""
        if self.termination is None:
            return None, None, []
        work = self._workspace.part("termination")
        logit, layers = self.termination.forward(inputs[1:, ..., : self.config.latent_dim], work)
        continues = torch.sigmoid(-logit.squeeze(-1))
        return continues, continues * (1 - continues), layers

    @span("backward")
    def backward(
        self,
        actor: Actor,
        rollout: Rollout,
        d_reward: Tensor,
        d_continues: Tensor | None,
        d_last: Tensor,
        detach_actor_input: bool = True,
    ) -> None:
        """Overwrite the actors' gradients, given those of rewards and continuations [H, P, B] and of z_H [P, B, Z]."""
        policies, horizon, batch, action_dim = rollout.noise.shape
        rows, work = horizon * batch, self._workspace
        d_logits = self._reward_gradient(d_reward, rollout)
        d_inputs = self.reward.input_gradient(d_logits, rollout.reward_layers, work.part("reward"))
        d_terminations = None
        if self.termination is not None:
            d_logit = -d_continues * rollout.continues_slope
            d_terminations = self.termination.input_gradient(
                d_logit[..., None], rollout.termination_layers, work.part("termination")
            )
        if not rollout.dynamics:
            recurrence = self.recurrence or self._native
            if d_terminations is not None:
                d_inputs[1:, ..., : self.config.latent_dim] += d_terminations[:-1]
                d_last = d_last + d_terminations[-1]
            d_action = recurrence.backward(actor, d_inputs, d_last, detach_actor_input)
            sample = recurrence.sample(actor)
        else:
            d_action = self._action_gradient(actor, rollout, d_inputs, d_terminations, d_last, detach_actor_input)
            sample = ActionSample(
                torch.stack([s.action for s in rollout.actor], 1).view(policies, rows, action_dim),
                Activations.join([s.activations for s in rollout.actor], work.part("actor")),
            )
        noise = rollout.noise.reshape(policies, rows, -1)
        actor.backward(d_action.view(policies, rows, -1), noise, sample, work.part("actor"))

    def _action_gradient(
        self,
        actor: Actor,
        rollout: Rollout,
        d_inputs: Tensor,
        d_terminations: Tensor | None,
        d_last: Tensor,
        detach_actor_input: bool,
    ) -> Tensor:
        """The recurrence backward, step by step: gradients [P, H, B, A] of the actions."""
        z_dim, work = self.config.latent_dim, self._workspace
        policies, horizon, batch, action_dim = rollout.noise.shape
        d_action = d_last.new_empty(policies, horizon, batch, action_dim)
        dz = d_last
        for h in reversed(range(horizon)):
            if d_terminations is not None:
                dz = dz + d_terminations[h]
            d_input = d_inputs[h].add_(
                self.dynamics.input_gradient(dz, rollout.dynamics[h], work.part("dynamics gradient"))
            )
            d_action[:, h] = d_input[..., z_dim:]
            dz = dz + d_input[..., :z_dim] if self.config.residual else d_input[..., :z_dim]
            if not detach_actor_input:
                dz = dz + actor.input_gradient(d_action[:, h], rollout.actor[h])
        return d_action

    def _expected_reward(self, logits: Tensor) -> Tensor:
        """Rewards [...] of the head's outputs [..., bins]."""
        c = self.config
        r = logits.squeeze(-1) if c.num_bins == 1 else two_hot.expectation_forward(logits, c.vmin, c.vmax)
        return self.reward_scale * (two_hot.symexp(r) if c.reward_symlog else r)

    def _reward_gradient(self, d_reward: Tensor, rollout: Rollout) -> Tensor:
        """Gradient [..., bins] with respect to the head's outputs."""
        c, logits = self.config, rollout.reward_logits
        d = d_reward * self.reward_scale
        if c.reward_symlog:  # symexp'(x) = exp(|x|) = |symexp(x)| + 1
            d = d * ((self._expected_reward(logits) / self.reward_scale).abs() + 1)
        return d[..., None] if c.num_bins == 1 else two_hot.expectation_backward(d, logits, c.vmin, c.vmax)
