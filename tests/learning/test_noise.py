"""Counter-based random numbers: the published generator, independent of population and history, well distributed."""

from __future__ import annotations

import torch

from pwm_fast.learning import noise


def test_philox_known_answers() -> None:
    """Vectors of Random123's kat_vectors (philox4x32-10)."""
    full = 0xFFFFFFFF
    cases = [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([full] * 4, [full] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in cases:
        words = noise._philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        assert [int(w) for w in words] == expected


def test_a_policy_draws_the_same_whoever_shares_the_batch() -> None:
    step = torch.tensor(12345678901)
    together = noise.normal(torch.tensor([5, 2**40 + 1, 7]), step, 0, (4, 3), torch.float64)
    for p, seed in enumerate((5, 2**40 + 1, 7)):
        assert torch.equal(together[p], noise.normal(torch.tensor([seed]), step, 0, (4, 3), torch.float64)[0])


def test_seed_step_and_stream_each_change_the_numbers() -> None:
    drawn = [
        noise.normal(torch.tensor([seed]), torch.tensor(step), stream, (5,), torch.float32)
        for seed, step, stream in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 2**32, 0), (2**32, 0, 0), (0, 0, 1))
    ]
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:i])


def test_moments_of_the_normal_numbers() -> None:
    x = noise.normal(torch.tensor([3]), torch.tensor(0), 0, (100_001,), torch.float64)[0]
    assert abs(x.mean()) < 0.015 and abs(x.var() - 1) < 0.02
    assert abs((x**3).mean()) < 0.05 and abs((x**4).mean() - 3) < 0.15
    assert abs((x[:50_000] * x[50_000:100_000]).mean()) < 0.02


def test_permutations() -> None:
    orders = noise.permutations(torch.tensor([1, 2]), torch.tensor(9), 1, number=3, length=50)
    assert orders.shape == (2, 3, 50)
    assert torch.equal(orders.sort(-1).values, torch.arange(50).expand(2, 3, 50))
    assert len({tuple(order.tolist()) for order in orders.flatten(0, 1)}) == 6
