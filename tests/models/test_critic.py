"""The critics' least-squares start."""

from __future__ import annotations

import torch

from pwm_fast.models.critic import Critic


def test_last_layers_are_the_least_squares_fit_of_each_policys_own_rows() -> None:
    """Against torch.linalg.lstsq on centred features; rows of weight 0 leave no trace."""
    torch.manual_seed(0)
    critic = Critic([3, 4], 5, num_critics=2, units=(12, 7), dtype=torch.float64)
    lengths, z = (40, 25), torch.randn(2, 40, 5, dtype=torch.float64)
    value = 100 + z[..., 0].sin() + z[..., 1]
    there = torch.stack([(torch.arange(40) < n).double() for n in lengths])
    parts = zip(z.split(16, 1), (value * there + 1e6 * (1 - there)).split(16, 1), there.split(16, 1))
    critic.fit_last_layers(parts, ridge=1e-10)  # normalised features sum to zero: singular without any
    found, activations = critic.forward(z)
    for p, n in enumerate(lengths):
        for k in range(2):
            features = activations.last[2 * p + k, :n]
            table = torch.cat([features, torch.ones(n, 1, dtype=torch.float64)], 1)
            expected = table @ torch.linalg.lstsq(table, value[p, :n, None], driver="gelsd").solution
            torch.testing.assert_close(found[p, k, :n], expected[:, 0], rtol=1e-5, atol=1e-5)
