"""The persistent kernels in a gradient step: one for the rollout in each direction, one for the critics' epochs.

They take the places that `Imagination.recurrence` and `Extraction.critic_epochs` keep for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pwm_fast.kernels import mish_layernorm
from pwm_fast.kernels.critic_epoch import CriticEpoch
from pwm_fast.kernels.dynamics_rollout import DynamicsRollout
from pwm_fast.kernels.grid_barrier import resident_programs
from pwm_fast.learning.extraction import CriticRows, Extraction
from pwm_fast.models.policy import ActionSample, Actor
from pwm_fast.models.population_mlp import EPS, Activations, Hidden
from pwm_fast.models.world_model import FrozenLayer


def use_persistent_kernels(extraction: Extraction, beside: bool = False) -> None:
    """From now on the extraction's steps run on them; a second call changes nothing.

    `beside`: rollouts and critics may run at the same time, so each gets half of the multiprocessors. If both wanted
    them all, each could hold some and wait for the rest for ever.
    Raises RuntimeError where Triton cannot run, ValueError for shapes that the kernels do not take and for tasks of
    different actions, which they do not mask.
    """
    if extraction.actor.mask is not None:
        raise ValueError("persistent kernels take tasks of equal sizes; use --execution.no-persistent")
    if extraction.critic_epochs is None:
        programs = max(1, resident_programs(extraction.iteration.device) // (2 if beside else 1))
        extraction.imagination.recurrence = PersistentRollout(extraction, programs)
        extraction.critic_epochs = PersistentCritics(extraction, programs)


class PersistentRollout:
    """`kernels/dynamics_rollout.py` as a `Recurrence`."""

    def __init__(self, extraction: Extraction, programs: int):
        e, c, w = extraction, extraction.config, extraction.world_config
        self._latent_dim = w.latent_dim
        self._kernel = DynamicsRollout(
            e.imagination.dynamics.layers, e.actor.parameters, e.actor.mlp.widths, e.policies_count, c.horizon,
            c.batch_size, w.residual, w.simnorm_dim, e.precision, programs,
        )  # fmt: skip

    def forward(self, actor: Actor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self._kernel.forward(z, noise, actor.parameters)

    def backward(self, actor: Actor, d_inputs: Tensor, d_last: Tensor, detach: bool) -> Tensor:
        return self._kernel.backward(d_inputs, d_last, actor.parameters, detach)

    def sample(self, actor: Actor) -> ActionSample:
        """The layers' outputs are made anew from what the kernel kept: one batch over all steps."""
        states, p = self._kernel.latents[:, :-1], actor.parameters
        x = states.reshape(len(states), -1, self._latent_dim)
        hidden = []
        for i, row in enumerate(self._kernel.actor_rows()):
            pre = row.pre.to(x.dtype)
            y, mean, rstd = mish_layernorm.forward(pre, p[f"{i}.ln.weight"], p[f"{i}.ln.bias"], EPS)
            hidden.append(Hidden(x, pre, mean, rstd))
            x = y
        action = self._kernel.inputs[:-1, ..., self._latent_dim :].transpose(0, 1)
        return ActionSample(action.reshape(*x.shape[:2], -1), Activations(hidden, x))

    def load(self, dynamics: Sequence[FrozenLayer]) -> None:
        self._kernel.load(dynamics)


class PersistentCritics:
    """`kernels/critic_epoch.py` as `CriticEpochs`."""

    def __init__(self, extraction: Extraction, programs: int):
        e, c = extraction, extraction.config
        self._adam = e.critic_adam
        self._kernel = CriticEpoch(
            e.critic.parameters, e.critic.mlp.widths, e.policies_count, c.num_critics, c.horizon * c.batch_size,
            c.critic_epochs, c.critic_minibatches, c.critic_max_norm, c.betas, self._adam.eps,
            "tf32" if e.precision == "bf16" else e.precision, programs,
        )  # fmt: skip

    def __call__(self, rows: CriticRows, orders: Tensor, lr: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        adam = self._adam
        done = self._kernel.run(rows.latents, rows.targets, orders, adam.m, adam.v, lr, adam.steps, active)
        return done.loss, done.norm, done.active
