"""How much memory a population takes, before it is made: what every policy adds, and what all of them share.

Everything that stays allocated is counted tensor by tensor, as `Imagination`, `PopulationMLP`, `FrozenNetwork` and
`StepGraph` keep it; what comes and goes within a step is an upper estimate for plain torch kernels (fused ones need
less). Sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pwm_fast.learning.configuration import ExtractionConfig
from pwm_fast.models.critic import VALUE_ROWS
from pwm_fast.models.parameters import ALIGNMENT
from pwm_fast.models.world_model import WorldModelConfig

ROOM = 0.9  # of the free memory: allocators round up, and libraries keep workspaces of their own
_ELEMENTWISE = 6  # tensors of one activation's size that a plain torch normalisation or Mish has at once
_ADAM = 8  # and of the parameters' size that plain torch Adam has


@dataclass(frozen=True)
class PopulationMemory:
    """Bytes: `shared` by all policies; `kept` and, within a step, `passing` for every one of them."""

    shared: int
    kept: int
    passing: int

    @property
    def per_policy(self) -> int:
        return self.kept + self.passing

    def total(self, policies: int) -> int:
        return self.shared + policies * self.per_policy

    def fits(self, free: int) -> int:
        """How many policies fit at once into `free` bytes; 0 if none does."""
        return max(int(ROOM * free - self.shared) // self.per_policy, 0)

    def describe(self, free: int | None = None) -> str:
        """One line for the start of a run."""
        line = f"memory: {_size(self.shared)} shared, {_size(self.per_policy)} per policy"
        return line if free is None else f"{line}; {self.fits(free):,} policies fit into {_size(free)}"


def population_memory(
    world: WorldModelConfig,
    config: ExtractionConfig,
    *,
    start_states: int = 0,
    overlap: bool = False,
    ring: int = 0,
    low_precision: bool = False,
    itemsize: int = 4,
    on_cpu: bool = False,
) -> PopulationMemory:
    """Of an extraction on a world model. `start_states`: rows of a `StartTable`; `ring`: of a `StepGraph`'s metrics.

    `low_precision`: frozen networks in bf16; `itemsize` of all else. `on_cpu`: values come in blocks there.
    """
    c, w = config, world
    rows, hb = c.batch_size, c.horizon * c.batch_size
    actor = (w.latent_dim, *c.actor_units, w.action_dim)
    critic = (w.latent_dim, *c.critic_units, 1)
    networks = _frozen_widths(w, c.terminations)
    encoder = networks.pop("encoder")
    frozen_size = 2 if low_precision else itemsize

    weights = frozen_size * sum(_frozen_parameters(n, w.residual and k == "dynamics") for k, n in networks.items())
    weights += itemsize * _frozen_parameters(encoder, w.residual)
    shared = weights + itemsize * (start_states * w.obs_dim)

    parameters = _parameters(actor, extra=w.action_dim) + c.num_critics * _parameters(critic)
    kept = 4 * parameters + _parameters(actor, extra=w.action_dim)  # values, gradients, two moments; averages
    kept += (c.horizon + 1) * rows * (2 * w.latent_dim + w.action_dim)  # inputs and latents of the rollout
    kept += hb * (1 + w.action_dim) + (2 * hb if c.terminations else 0)  # reward, noise, continuation and its slope
    kept += hb * w.latent_dim if w.residual else 0
    kept += hb * (_mlp_activations(actor) + w.action_dim)  # step by step, and once more joined for the backward pass
    kept += hb * (_joined(actor) if c.horizon > 1 else 0) + hb * sum(c.actor_units)
    blocks = {rows, *_values_rows(hb, on_cpu), *_block_rows(hb, c.critic_minibatches)}
    kept += c.num_critics * sum(blocks) * _mlp_activations(critic)
    kept += c.num_critics * sum(set(_block_rows(hb, c.critic_minibatches))) * sum(c.critic_units)
    kept += hb * w.latent_dim if c.shuffle else 0
    kept += hb * (w.latent_dim + 1) if overlap else 0
    kept *= itemsize
    kept += itemsize * rows * _frozen_activations(encoder, w.residual)
    for name, widths in networks.items():
        plain = w.residual and name == "dynamics"
        backward_rows = rows if name == "dynamics" else hb
        kept += frozen_size * hb * _frozen_activations(widths, plain or name != "dynamics", not low_precision)
        ends_open = plain or name != "dynamics"
        gradients = sum(widths[1:-1]) + sum(widths[:-1]) + (0 if ends_open else widths[-1])
        kept += frozen_size * backward_rows * gradients
        kept += itemsize * hb * widths[-1] if low_precision else 0
    kept += itemsize * ring * (9 + c.terminations) + 8 * 2  # metrics, and counts of both optimisers

    widest = max(hb * max(max(n) for n in networks.values()), c.num_critics * max(blocks) * max(c.critic_units))
    noise = 100 * hb * w.action_dim  # counters and words of 64 bits, numbers of float64
    orders = 40 * c.critic_epochs * hb if c.shuffle else 0
    passing = itemsize * (_ELEMENTWISE * widest + _ADAM * c.num_critics * _parameters(critic)) + noise + orders
    return PopulationMemory(shared, kept, passing)


def split(policies: int, fits: int) -> list[range]:
    """Waves of nearly equal size, none above `fits`, in order. Raises ValueError where not even one policy fits."""
    if fits < 1:
        raise ValueError("not even one policy fits into memory: use a smaller batch size, world model or device table")
    number = -(-policies // fits)
    edges = [policies * i // number for i in range(number + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def _frozen_widths(w: WorldModelConfig, terminations: bool) -> dict[str, tuple[int, ...]]:
    step = w.latent_dim + w.action_dim
    encoder: tuple[int, ...] = (w.obs_dim, *[w.encoder_dim] * max(w.encoder_layers - 1, 1), w.latent_dim)
    out = {
        "encoder": (w.obs_dim, w.obs_dim) if w.residual else encoder,
        "dynamics": (step, w.mlp_dim, w.mlp_dim, w.latent_dim),
        "reward": (step, w.mlp_dim, w.mlp_dim, w.num_bins),
    }
    if terminations:
        out["termination"] = (w.latent_dim, w.termination_dim, w.termination_dim, 1)
    return out


def _frozen_parameters(widths: Sequence[int], plain: bool) -> int:
    """Weights and one bias per layer, gain and shift where it is normalised (task biases come to little)."""
    return sum(a * b + b for a, b in pairwise(widths)) + 2 * sum(widths[1:-1]) + (0 if plain else 2 * widths[-1])


def _frozen_activations(widths: Sequence[int], plain: bool, statistics: bool = True) -> int:
    """Per row: Linear's output of every layer; output and statistics of the normalised ones."""
    normed = list(widths[1:-1]) + ([] if plain else [widths[-1]])
    return sum(widths[1:]) + sum(normed) + (2 * len(normed) if statistics else 0)


def _parameters(widths: Sequence[int], extra: int = 0) -> int:
    """Floats of one member's flat row."""
    sizes = [extra] if extra else []
    for i, (a, b) in enumerate(pairwise(widths)):
        sizes += [a * b, b] + ([b, b] if i < len(widths) - 2 else [])
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _mlp_activations(widths: Sequence[int]) -> int:
    """Per row: before and after Mish and LayerNorm, their statistics, the output."""
    return 2 * sum(widths[1:-1]) + 2 * len(widths[1:-1]) + widths[-1]


def _joined(widths: Sequence[int]) -> int:
    return sum(widths[:-2]) + sum(widths[1:-1]) + 2 * len(widths[1:-1]) + widths[-2]


def _block_rows(rows: int, parts: int) -> list[int]:
    """Sizes of tensor_split's parts."""
    return sorted({rows // parts, -(-rows // parts)})


def _values_rows(rows: int, on_cpu: bool) -> set[int]:
    if not on_cpu:
        return {rows}
    return {min(VALUE_ROWS, rows)} | ({rows % VALUE_ROWS} if rows > VALUE_ROWS and rows % VALUE_ROWS else set())


def _size(number: int) -> str:
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError
