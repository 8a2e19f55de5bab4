"""Random numbers that depend on (seed, step, place) only: a policy draws the same ones whoever shares its batch.

Philox4x32-10 (Salmon et al. 2011) written in tensor operations: the same numbers on every device, no generator state to
save, nothing read back to the host.
"""

from __future__ import annotations

from math import pi, prod

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# One stream per use, so that no two uses share numbers.
ACTION_NOISE, MINIBATCH_ORDER = 0, 1


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Ten rounds on four words (int64 tensors below 2**32, broadcastable) under a key of two words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products reach 2**64 and wrap around in int64: shift and mask still give the unsigned halves.
        low, high = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK) ^ c1 ^ k0,
            high & _MASK,
            ((low >> 32) & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def random_words(seeds: Tensor, step: Tensor, stream: int, count: int) -> Tensor:
    """Uniform integers [P, count] below 2**32 (int64). seeds [P] int64 >= 0, step [] int64 >= 0."""
    blocks = -(-count // 4)
    index = torch.arange(blocks, device=seeds.device)
    counter = [index, step & _MASK, step >> 32, torch.full_like(step, stream)]
    key = [(seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]]
    words = torch.stack(_philox(counter, key), -1)  # [P, blocks, 4]
    return words.flatten(1)[:, :count]


def indices(seeds: Tensor, step: Tensor, stream: int, limits: Tensor, count: int) -> Tensor:
    """Uniform integers [P, count] (int64) below `limits` [P], which are < 2**31.

    The same as `pwm_fast.data.philox` draws, bit for bit: a counter laid out as there, and the high half of the product
    of 64 random bits and the limit.
    """
    index = torch.arange(count, device=seeds.device)
    counter = [index, torch.full_like(step, stream), step & _MASK, step >> 32]
    low, high, *_ = _philox(counter, [(seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]])
    limit = limits[:, None]
    return (high * limit + ((low * limit) >> 32)) >> 32


def normal(seeds: Tensor, step: Tensor, stream: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers [P, *shape] (Box-Muller in float64, then rounded)."""
    count = prod(shape)
    words = random_words(seeds, step, stream, 2 * (-(-count // 2))).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((words[:, 0::2] + 1) * 2.0**-32))
    angle = words[:, 1::2] * (2 * pi * 2.0**-32)
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)
    return pairs[:, :count].to(dtype).view(-1, *shape)


def permutations(seeds: Tensor, step: Tensor, stream: int, number: int, length: int) -> Tensor:
    """`number` random orders of `length` things per policy: int64 [P, number, length]."""
    words = random_words(seeds, step, stream, number * length)
    return words.view(-1, number, length).sort(dim=-1, stable=True).indices
