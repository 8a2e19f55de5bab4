"""TD(lambda) returns against sums written out by hand."""

import pytest
import torch
from closeness import relative_error

from pwm_fast.kernels import td_lambda

GAMMA = 0.9


def draw(horizon: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """reward, next_value [horizon, 5, 3] and continues of the same shape (a fifth of them zero)."""
    generator = torch.Generator().manual_seed(horizon)
    reward, value, chance = (torch.rand(horizon, 5, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    return reward.to(dtype), value.to(dtype), (chance > 0.2)


def test_lambda_0_is_td_0() -> None:
    reward, value, _ = draw(6)
    assert torch.allclose(td_lambda.returns(reward, value, None, GAMMA, 0.0), reward + GAMMA * value)


def test_lambda_1_is_the_discounted_sum() -> None:
    reward, value, _ = draw(6)
    discount = GAMMA ** torch.arange(7, dtype=torch.float64)
    expected = torch.einsum("h,hbc->bc", discount, torch.cat([reward, value[-1:]]))
    assert torch.allclose(td_lambda.returns(reward, value, None, GAMMA, 1.0)[0], expected)


def test_lambda_weights_the_n_step_returns() -> None:
    reward, value, _ = draw(4)
    lam = 0.7
    n_step = []
    for n in range(1, 5):
        total = sum(GAMMA**h * reward[h] for h in range(n)) + GAMMA**n * value[n - 1]
        n_step.append(total)
    expected = (1 - lam) * sum(lam**n * n_step[n] for n in range(3)) + lam**3 * n_step[3]
    assert torch.allclose(td_lambda.returns(reward, value, None, GAMMA, lam)[0], expected)


def test_nothing_crosses_an_episode_end() -> None:
    reward, value, continues = draw(6)
    continues = torch.ones_like(continues)
    continues[2] = False
    result = td_lambda.returns(reward, value, continues, GAMMA, 0.95)
    changed = td_lambda.returns(reward, torch.cat([value[:2], value[2:] + 7]), continues, GAMMA, 0.95)
    assert torch.equal(result[:3], changed[:3])
    assert torch.equal(result[2], reward[2])


@pytest.mark.parametrize("horizon", [1, 3, 16])
@pytest.mark.parametrize("ends", [True, False], ids=["with ends", "without ends"])
def test_native_matches_definition(horizon: int, ends: bool, isa: str) -> None:
    reward, value, continues = draw(horizon, torch.float32)
    mask = continues if ends else None
    expected = td_lambda.td_lambda(
        reward.double(), value.double(), None if mask is None else mask.double(), GAMMA, 0.95
    )
    assert relative_error(td_lambda.returns(reward, value, mask, GAMMA, 0.95, backend="native"), expected) < 1e-6


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        td_lambda.returns(torch.zeros(3, 2), torch.zeros(4, 2), None, GAMMA, 0.95)
    with pytest.raises(ValueError, match="horizon must be >= 1"):
        td_lambda.returns(torch.zeros(0, 2), torch.zeros(0, 2), None, GAMMA, 0.95)
