"""Adam on flat rows: what belongs to one policy is clipped together, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from pwm_fast.learning.optim import Adam, linear_schedule
from pwm_fast.models.parameters import FlatParameters


def test_members_of_a_policy_share_one_norm() -> None:
    """Two policies of two critics each, against torch's Adam and clipping per policy."""
    parameters = FlatParameters(4, {"w": (3, 2), "b": (5,)}, torch.float64)
    generator = torch.Generator().manual_seed(0)
    for view in parameters.views.values():
        view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
    adam = Adam(parameters, policies=2, betas=(0.7, 0.95))
    copies = [[v[2 * p : 2 * p + 2].clone().requires_grad_() for v in parameters.views.values()] for p in range(2)]
    theirs = [torch.optim.Adam(c, lr=0.01 * (p + 1), betas=(0.7, 0.95)) for p, c in enumerate(copies)]
    for _ in range(3):
        for view in parameters.grads.values():
            view.copy_(5 * torch.randn(view.shape, generator=generator, dtype=torch.float64))
        expected = []
        for p, copy in enumerate(copies):
            for one, grad in zip(copy, parameters.grads.values(), strict=True):
                one.grad = grad[2 * p : 2 * p + 2].clone()
            expected.append(torch.nn.utils.clip_grad_norm_(copy, 2.0))
            theirs[p].step()
        norms = adam.step(torch.tensor([0.01, 0.02], dtype=torch.float64), 2.0, torch.tensor([True, True]))
        torch.testing.assert_close(norms, torch.stack(expected))
    for p, copy in enumerate(copies):
        for one, view in zip(copy, parameters.views.values(), strict=True):
            torch.testing.assert_close(view[2 * p : 2 * p + 2], one.detach(), rtol=1e-12, atol=1e-12)


def test_linear_schedule() -> None:
    values = [linear_schedule(torch.tensor(step), 1.0, 0.2, 8).item() for step in (0, 4, 8, 100)]
    assert values == pytest.approx([1.0, 0.6, 0.2, 0.2])
