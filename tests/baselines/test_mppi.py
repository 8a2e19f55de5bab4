"""MPPI against a plain loop, on problems whose optimum is known, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor

from pwm_fast.baselines.mppi import MPPI, MPPIConfig

SMALL = MPPIConfig(horizon=4, samples=40, elites=8, iterations=3, policy_trajectories=6)


def quadratic(target: Tensor):
    """Values of sequences: minus the squared distance to `target` [N, H, A]."""
    return lambda actions: -(actions - target[:, None]).square().sum((2, 3))


def naive_plan(config, mean, generator, score, prior):
    """One environment's plan in float64, loop by loop, as the paper's algorithm box reads."""
    horizon, width = mean.shape
    std = torch.full_like(mean, config.max_std)
    for _ in range(config.iterations):
        noise = torch.randn(1, config.samples - len(prior), horizon, width, generator=generator, dtype=mean.dtype)
        sequences = list(prior) + [(mean + std * n).clamp(-1, 1) for n in noise[0]]
        values = [float(score(sequence[None, None])) for sequence in sequences]
        order = sorted(range(len(values)), key=lambda i: -values[i])[: config.elites]
        weights = [math.exp(config.temperature * (values[i] - values[order[0]])) for i in order]
        weights = [w / sum(weights) for w in weights]
        mean = sum(w * sequences[i] for w, i in zip(weights, order))
        variance = sum(w * (sequences[i] - mean) ** 2 for w, i in zip(weights, order))
        std = variance.sqrt().clamp(config.min_std, config.max_std)
    return mean, [sequences[i] for i in order], weights


def test_a_plan_is_the_papers_algorithm():
    generator = torch.Generator().manual_seed(0)
    target, prior = (torch.rand(*s, generator=generator, dtype=torch.float64) for s in ((1, 4, 2), (1, 6, 4, 2)))
    mppi = MPPI(SMALL, 1, 2, seed=5, dtype=torch.float64)
    noise, mean = torch.Generator().manual_seed(5), torch.zeros(4, 2, dtype=torch.float64)
    for _ in range(3):  # the second and third start from the plan before, a step on
        action = mppi.plan(quadratic(target), prior)
        mean, elites, weights = naive_plan(SMALL, mean, noise, quadratic(target), prior[0])
        chosen = torch.multinomial(torch.tensor([weights], dtype=torch.float64), 1, generator=noise)
        torch.testing.assert_close(action[0], elites[int(chosen)][0], rtol=1e-10, atol=1e-12)
        mean = torch.cat([mean[1:], torch.zeros(1, 2, dtype=torch.float64)])


def test_plans_find_the_optimum_of_every_environment():
    """Published settings; three environments whose best sequences differ, one at the actions' edge."""
    target = torch.tensor([[0.7, -0.3], [-0.9, 0.1], [1.5, -1.5]])[:, None].expand(-1, 3, -1)
    mppi = MPPI(MPPIConfig(), 3, 2, seed=1)
    actions = torch.stack([mppi.plan(quadratic(target)) for _ in range(20)])
    best = target[:, 0].clamp(-1, 1)
    assert (actions.mean(0) - best).abs().max() < 0.05
    assert (actions - best).abs().max() < 0.3, "a drawn elite lies near the best, not anywhere"


def test_the_next_plan_starts_from_this_one():
    """With one iteration of a narrow search, an optimum far away is reached only by steps that build on each other."""
    config = MPPIConfig(horizon=10, samples=256, elites=8, iterations=1, policy_trajectories=0, max_std=0.1)
    mppi, score = MPPI(config, 200, 1, seed=0), quadratic(torch.full((200, 10, 1), 0.9))
    first, *_, last = (mppi.plan(score) for _ in range(12))
    half = torch.arange(200) < 100
    mppi.reset(half)
    again = mppi.plan(score)
    assert last.mean() > 4 * first.mean() > 0
    assert again[~half].mean() > 0.9 * last.mean() and last.mean() > 4 * again[half].mean()


def test_a_prior_is_followed_where_it_is_best():
    """An optimum in a corner of 12 dimensions that 40 random samples do not find, and the prior knows."""
    target = torch.full((1, 4, 3), 0.95)
    lost, guided = (MPPI(SMALL, 1, 3, seed=2) for _ in range(2))
    prior = target[:, None].expand(-1, 6, -1, -1)
    assert quadratic(target[:, :1])(guided.plan(quadratic(target), prior)[:, None, None]) > -0.05
    assert quadratic(target[:, :1])(lost.plan(quadratic(target))[:, None, None]) < -0.05


def test_masked_actions_stay_zero():
    seen = []

    def score(actions: Tensor) -> Tensor:
        seen.append(actions)
        return actions.sum((2, 3))

    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    action = MPPI(SMALL, 2, 3, action_mask=mask).plan(score, explore=True)
    assert all((actions[:, :, :, mask[0] == 0][0] == 0).all() for actions in seen)
    assert (action[mask == 0] == 0).all() and (action[mask == 1] != 0).all()


def test_exploring_adds_the_plans_deviation():
    target = torch.zeros(2000, 1, 1)
    config = MPPIConfig(horizon=1, samples=64, elites=4, policy_trajectories=0, min_std=0.3)
    calm, curious = (MPPI(config, 2000, 1, seed=0).plan(quadratic(target), explore=e) for e in (False, True))
    assert curious.var() - calm.var() == pytest.approx(0.09, rel=0.2)


def test_values_that_are_not_finite_are_never_chosen():
    def score(actions: Tensor) -> Tensor:
        values = quadratic(torch.zeros(2, 4, 1))(actions)
        values[0, ::2] = torch.nan
        return values

    mppi = MPPI(SMALL, 2, 1)
    assert mppi.plan(score).isfinite().all()
    with pytest.raises(ValueError, match="environment 1 has a finite value"):
        mppi.plan(lambda actions: torch.tensor([[0.0] * 40, [math.nan] * 40]))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"horizon": 0}, "horizon must be >= 1, got 0"),
        ({"elites": 600}, "elites must be <= samples 512, got 600"),
        ({"policy_trajectories": 512}, "from 0 to samples - 1 = 511, got 512"),
        ({"min_std": 3.0}, "min_std <= max_std"),
        ({"temperature": math.nan}, "temperature must be > 0"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(options: dict, text: str):
    with pytest.raises(ValueError, match=text):
        MPPIConfig(**options)


def test_published_settings():
    """TD-MPC2's config: two more iterations from 20 actions on."""
    assert (MPPIConfig.published(19).iterations, MPPIConfig.published(20).iterations) == (6, 8)
    assert MPPIConfig() == MPPIConfig(3, 512, 64, 6, 24, 0.5, 0.05, 2.0)
