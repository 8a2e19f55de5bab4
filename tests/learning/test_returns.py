"""Imagined returns against their definition under autograd, and the running normalisation."""

from __future__ import annotations

import pytest
import torch

from pwm_fast.learning.returns import ReturnStatistics, imagined_return

H, P, B = 5, 2, 3


@pytest.mark.parametrize("offset", [0, 1], ids=["paper", "published-code"])
@pytest.mark.parametrize("terminations", [False, True], ids=["never-ends", "terminations"])
def test_value_and_gradients(offset: int, terminations: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(H, P, B, generator=generator, dtype=torch.float64, requires_grad=True)
    last = torch.randn(P, B, generator=generator, dtype=torch.float64, requires_grad=True)
    continues = torch.rand(H, P, B, generator=generator, dtype=torch.float64)
    continues[1, 0, 0] = 0.0  # a certain end: products of what follows must not be divided by it
    continues.requires_grad_()
    gamma, discount, expected = 0.9, torch.ones(P, B, dtype=torch.float64), torch.zeros(P, B, dtype=torch.float64)
    for h in range(H):
        expected = expected + discount * reward[h]
        discount = discount * gamma * (continues[h] if terminations else 1.0)
    expected = expected + gamma**offset * discount * last
    expected.sum().backward()

    with torch.no_grad():
        actual = imagined_return(reward, continues if terminations else None, last, gamma, offset)
    torch.testing.assert_close(actual.value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.d_reward, reward.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.d_last, last.grad, rtol=1e-12, atol=1e-12)
    if terminations:
        torch.testing.assert_close(actual.d_continues, continues.grad, rtol=1e-12, atol=1e-12)
    else:
        assert actual.d_continues is None


def test_statistics_are_those_of_all_samples_seen() -> None:
    statistics = ReturnStatistics(P, torch.float64, "cpu")
    samples = torch.randn(4, P, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 2
    for sample in samples:
        statistics.update(sample, torch.ones(P, dtype=torch.bool))
    everything = samples.transpose(0, 1).reshape(P, -1)
    # The start (mean 0, variance 1) counts as 1e-4 of a sample.
    torch.testing.assert_close(statistics.mean, everything.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics.variance, everything.var(1, correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics.scale(), (statistics.variance + 1e-5).sqrt())


def test_inactive_policies_keep_their_statistics() -> None:
    statistics = ReturnStatistics(P, torch.float64, "cpu")
    sample = torch.full((P, B), 7.0, dtype=torch.float64)
    sample[1, 0] = torch.nan
    statistics.update(sample, torch.tensor([True, False]))
    assert statistics.mean[0] == pytest.approx(7.0, rel=1e-3)
    assert (statistics.mean[1], statistics.variance[1]) == (0.0, 1.0)
