"""The critics' epochs in one native call per step: what an extraction on the CPU does unless another backend is forced.

It takes the place that `Extraction.critic_epochs` keeps for such a kernel. Minibatch by minibatch, with four calls each
from Python, a step takes 1.15, 1.09 and 1.04 times as long at 1M, 5M and 48M (Zen 3, one thread).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pwm_fast.kernels.gemm import gemm_for
from pwm_fast.kernels.native_critic_epoch import NativeCriticEpoch
from pwm_fast.learning.configuration import ExtractionConfig
from pwm_fast.learning.optim import Adam
from pwm_fast.models.critic import Critic
from pwm_fast.models.population_mlp import EPS

if TYPE_CHECKING:
    from pwm_fast.learning.extraction import CriticRows


class NativeCritics:
    """`kernels/native_critic_epoch.py` as `CriticEpochs`."""

    def __init__(self, critic: Critic, adam: Adam, config: ExtractionConfig):
        self._critic, self._adam, self._config = critic, adam, config
        self._plan: NativeCriticEpoch | None = None

    def available(self) -> bool:
        """Whether float32 products on the CPU are native at the moment (`pwm_fast.backend`)."""
        return gemm_for(None, self._critic.parameters.flat) is not None

    def __call__(self, rows: CriticRows, orders: Tensor, lr: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        adam, c, p = self._adam, self._config, self._critic.parameters
        if self._plan is None:
            offsets = {name: view.storage_offset() for name, view in p.views.items()}
            self._plan = NativeCriticEpoch(
                self._critic.mlp.widths, offsets, p.size, self._critic.policies, self._critic.num_critics,
                rows.latents.shape[1], c.critic_epochs, c.critic_minibatches, c.critic_max_norm, c.betas, adam.eps, EPS,
            )  # fmt: skip
        return self._plan.run(p.flat, rows.latents, rows.targets, orders, adam.m, adam.v, lr, adam.steps, active)
