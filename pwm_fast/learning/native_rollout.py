"""Actors and dynamics of all imagined steps in one native call each way: what an extraction on the CPU does unless
another backend is forced.

It takes the place that `Imagination.recurrence` keeps for such a kernel. Step by step, with calls from Python for every
layer, the recurrence takes 1.7, 1.3 and 1.1 times as long at 1M, 5M and 48M, forward and backward alike, a whole step
1.05, 1.05 and 1.03 times (Zen 3, one thread, bench/test_native.py), with the shipped humanoid's model 1.03. On two
threads a whole step takes 1.1, 1.3 and 1.4 times the CPU time, for torch's second thread spins while it waits; with
OMP_WAIT_POLICY=passive the recurrence still takes 2.0 and 1.9 times forward and 1.6 and 1.5 backward at 1M and 5M.

The reward's networks stay as they were: in 4 calls for blocks of 256 rows, so that activations stay in the cache, they
took 1.04 to 1.2 times as long as in one call for all 1024 rows, in 16 calls 1.04 to 1.5 times.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pwm_fast.kernels.gemm import gemm_for
from pwm_fast.kernels.native_dynamics_rollout import NativeDynamicsRollout, PackedLayer
from pwm_fast.models.frozen import FrozenNetwork
from pwm_fast.models.policy import ActionSample, Actor
from pwm_fast.models.population_mlp import EPS, Activations, Hidden
from pwm_fast.models.world_model import FrozenLayer, WorldModelConfig

SIMNORM_DIM = 8  # the groups that native kernels take


class NativeRollout:
    """`kernels/native_dynamics_rollout.py` as a `Recurrence`; one set of buffers for every shape that it has met."""

    def __init__(self, dynamics: FrozenNetwork, config: WorldModelConfig):
        self._dynamics, self._config = dynamics, config
        self._plans: dict[tuple[object, ...], NativeDynamicsRollout] = {}
        self._plan: NativeDynamicsRollout | None = None  # of the last call

    def available(self, actor: Actor, z: Tensor, noise: Tensor) -> bool:
        """Whether float32 products on the CPU are native at the moment (`pwm_fast.backend`)."""
        c, vectors = self._config, [layer.bias for layer in self._dynamics.layers]
        if gemm_for(None, actor.parameters.flat, z, noise, *vectors) is None:
            return False
        packed = all(w is not None for pair in self._dynamics._packed for w in pair)
        return packed and (c.residual or c.simnorm_dim == SIMNORM_DIM)

    def forward(self, actor: Actor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        p, layers, (policies, horizon, batch, _) = actor.parameters, self._dynamics.layers, noise.shape
        key = self._key(actor, policies, horizon, batch)
        if key not in self._plans:
            offsets = {name: view.storage_offset() for name, view in p.views.items()}
            widths = [layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers)]
            self._plans[key] = NativeDynamicsRollout(
                actor.mlp.widths, offsets, p.size, widths, policies, horizon, batch, self._config.residual, EPS
            )
        self._plan = self._plans[key]
        return self._plan.forward(p.flat, self._layers(), z, noise)

    def backward(self, actor: Actor, d_inputs: Tensor, d_last: Tensor, detach: bool) -> Tensor:
        """Of the last rollout of this shape, whatever others there were since."""
        horizon, policies, batch, _ = d_inputs.shape
        self._plan = self._plans[self._key(actor, policies, horizon, batch)]
        return self._plan.backward(actor.parameters.flat, self._layers(), d_inputs, d_last, detach, actor.mask)

    def sample(self, actor: Actor) -> ActionSample:
        plan = self._plan
        assert plan is not None
        x = plan.latents[:, :-1].flatten(1, 2)  # [P, H * B, Z]
        hidden, outputs = [], plan.actor_outputs
        for rows, y in zip(plan.actor_rows, [x, *outputs]):
            hidden.append(Hidden(y, *rows))
        return ActionSample(plan.actions.flatten(1, 2), Activations(hidden, outputs[-1]))

    def load(self, dynamics: Sequence[FrozenLayer]) -> None:
        """Nothing to do: the network's own weights are read where they lie, whatever they are by then."""

    @staticmethod
    def _key(actor: Actor, policies: int, horizon: int, batch: int) -> tuple[object, ...]:
        return actor.mlp.widths, actor.parameters.size, policies, horizon, batch

    def _layers(self) -> list[PackedLayer]:
        out = []
        for layer, (weight, transpose) in zip(self._dynamics.layers, self._dynamics._packed):
            assert weight is not None and transpose is not None
            out.append(PackedLayer(weight, transpose, layer.bias, layer.ln_weight, layer.ln_bias))
        return out
