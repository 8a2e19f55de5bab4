"""Philox4x32-10 (Salmon et al. 2011) in numpy: counter-based random numbers, the same bits as `csrc/philox.hpp`.

The n-th number of a stream needs no state: it is a function of (seed, stream, step, index).
"""

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox4x32_10(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """counter [4, n] of 32-bit words held in uint64, key two 32-bit words -> four random words [4, n] (uint64)."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    key0, key1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0 = (product1 >> _SHIFT) ^ c1 ^ np.uint64(key0)
        c2 = (product0 >> _SHIFT) ^ c3 ^ np.uint64(key1)
        c1, c3 = product1 & _LOW, product0 & _LOW
        key0, key1 = (key0 + _WEYL[0]) & 0xFFFFFFFF, (key1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def random_bits(seed: int, stream: int, step: int, count: int) -> np.ndarray:
    """64 random bits for every index in [0, count): uint64 [count]. seed and step are taken modulo 2^64."""
    return random_pairs(seed, stream, step, count)[0]


def random_pairs(seed: int, stream: int, step: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`random_bits`, and 64 more that are independent of them: the counter's other half."""
    counter = np.empty((4, count), np.uint64)
    counter[0] = np.arange(count, dtype=np.uint64)
    counter[1], counter[2], counter[3] = stream, step & 0xFFFFFFFF, (step >> 32) & 0xFFFFFFFF
    words = philox4x32_10(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return words[0] | (words[1] << _SHIFT), words[2] | (words[3] << _SHIFT)


def scale_to(bits: np.ndarray, limit: int | np.ndarray) -> np.ndarray:
    """Numbers in [0, limit) as int64: the high half of the 128-bit product; the bias is below limit / 2^64."""
    limit = np.asarray(limit).astype(np.uint64)
    a0, a1 = bits & _LOW, bits >> _SHIFT
    b0, b1 = limit & _LOW, limit >> _SHIFT
    middle = a1 * b0 + ((a0 * b0) >> _SHIFT)
    other = a0 * b1 + (middle & _LOW)
    return (a1 * b1 + (middle >> _SHIFT) + (other >> _SHIFT)).astype(np.int64)
