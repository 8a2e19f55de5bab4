"""Planning in a world model: values as plain loops give them, problems with a known optimum, TD-MPC2's own heads."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "learning"))
from known_optimum import Chase, ChaseGuide, chase_return
from small import ACTION_DIM, OBS_DIM, extraction, world_model

from pwm_fast.baselines.guides import ActorGuide, load_q_guide
from pwm_fast.baselines.mppi import MPPIConfig
from pwm_fast.baselines.tdmpc2_planning import TDMPC2Planner, WorldModelDynamics, published_discount
from pwm_fast.data.stored_zip import ForeignFileError
from pwm_fast.models.tdmpc2_checkpoints import load_checkpoint

DATA = Path(__file__).parent.parent / "data" / "tdmpc2"
TINY = ["new_layout", "new_layout_tensordict083", "old_layout_with_omegaconf"]


@pytest.mark.parametrize("guided", [True, False])
def test_planning_finds_a_known_optimum(guided: bool):
    """Return of 10 steps from 8 starts; without a value, a horizon that reaches the goal does as well."""
    start = torch.tensor(np.random.default_rng(0).uniform(-2, 2, (8, 2)), dtype=torch.float32)
    best = chase_return(Chase.best_action, start, 10)
    generator = torch.Generator().manual_seed(0)
    prior = chase_return(lambda z: ChaseGuide().action(z, generator), start, 10)
    guide, config = (ChaseGuide(), MPPIConfig()) if guided else (None, MPPIConfig(horizon=6, policy_trajectories=0))
    planner = TDMPC2Planner(Chase(), 2, 8, guide, config, discount=1.0)
    found = chase_return(lambda z: planner(z.numpy()), start, 10)
    assert (found <= best + 1e-4).all(), "nothing is better than the optimum"
    assert ((best - found) < 0.15 * (best - prior)).all(), (best, found, prior)


def naive_value(model, guide_value, obs, actions, tasks, gamma):
    """One sequence's value in plain torch."""
    z, total, weight = model.encode(obs, tasks), 0.0, 1.0
    for action in actions:
        total = total + weight * model.reward(z, action, tasks)
        z = model.next(z, action, tasks)
        weight = weight * gamma
        if model.has_termination and float(model.termination_logit(z, tasks)) > 0:
            weight = 0.0
    return float(total + weight * guide_value(z))


@pytest.mark.parametrize("termination_dim", [0, 8])
@pytest.mark.parametrize("latent", ["simnorm", "observation"])
def test_values_of_sequences_are_the_models(latent: str, termination_dim: int):
    """Three environments with a task and a discount each, in float64, against loops over the module."""
    model = world_model(latent=latent, termination_dim=termination_dim)
    tasks, gammas = torch.tensor([2, 0, 3]), [0.99, 0.95, 0.9]

    class Guide:
        def value(self, z, generator):
            return z.square().sum(-1)

    generator = torch.Generator().manual_seed(1)
    obs = torch.randn(3, OBS_DIM, generator=generator, dtype=torch.float64)
    actions = torch.rand(3, 5, 4, ACTION_DIM, generator=generator, dtype=torch.float64) * 2 - 1
    dynamics = WorldModelDynamics(model, tasks)
    planner = TDMPC2Planner(dynamics, ACTION_DIM, 3, Guide(), discount=gammas, dtype=torch.float64)
    values = planner.values(dynamics.encode(obs).clone(), actions)
    for n in range(3):
        for k in range(5):
            with torch.no_grad():
                exact = naive_value(model, lambda z: z.square().sum(), obs[n], actions[n, k], tasks[n], gammas[n])
            assert values[n, k].item() == pytest.approx(exact, rel=1e-10), (n, k)


def test_an_extractions_actor_and_critics_guide():
    model = world_model()
    ext = extraction(model, policies=3)
    guide = ActorGuide.of_extraction(ext, 1)
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(2, 4, 16, generator=generator, dtype=torch.float64)
    rows = z.view(1, 8, 16).expand(3, -1, -1).contiguous()
    values = ext.critic.forward(rows)[0][1].view(3, 2, 4)  # [K, N, samples]
    found = torch.stack([guide.value(z, generator) for _ in range(30)])
    pairs = torch.stack([(values[i] + values[j]) / 2 for i, j in ((0, 1), (0, 2), (1, 2))])
    distance = (found[:, None] - pairs).abs().amax((2, 3))  # [draws, pairs]
    assert distance.min(1).values.max() < 1e-12 and set(distance.argmin(1).tolist()) == {0, 1, 2}
    noise = torch.randn(1, 8, ACTION_DIM, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    sampled = ext.actor.forward(rows, noise.expand(3, -1, -1).contiguous()).action[1].view(2, 4, -1)
    torch.testing.assert_close(guide.action(z, torch.Generator().manual_seed(7)), sampled)
    planner = TDMPC2Planner(WorldModelDynamics(model, torch.tensor([1])), ACTION_DIM, 2, guide, dtype=torch.float64)
    assert planner(np.zeros((2, OBS_DIM))).shape == (2, ACTION_DIM)


@pytest.mark.parametrize("layout", TINY)
def test_tdmpc2s_own_heads_are_read(layout: str):
    """Q functions and policy of every layout give the outputs of TD-MPC2's own class (float32)."""
    with np.load(DATA / "mt30_tiny_reference_outputs.npz") as file:
        reference = {name: torch.from_numpy(file[name]) for name in file.files}
    path, task = DATA / f"mt30_tiny_{layout}.pt", reference["task"]
    guide = load_q_guide(path, load_checkpoint(path), task)
    z = reference["z"][:, None]
    raw = guide._prior.forward(z)[0][:, 0]
    torch.testing.assert_close(raw, reference["pi_raw"], rtol=1e-5, atol=1e-5)
    inputs = torch.cat([z, reference["action"][:, None]], -1)
    logits = torch.stack([q.forward(inputs)[0][:, 0] for q in guide._q])
    torch.testing.assert_close(logits, reference["q_logits_all"], rtol=1e-5, atol=1e-5)


def test_planning_with_tdmpc2s_heads_is_the_published_estimate():
    """Value of the reached state: the mean of the two Q functions at a sample of the policy, masked to the task."""
    path, tasks = DATA / "mt30_tiny_new_layout.pt", torch.tensor([7, 1])
    model = load_checkpoint(path)
    mask = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1.0] * 6])
    guide = load_q_guide(path, model, tasks, mask)
    z = model.encode(torch.randn(2, 24, generator=torch.Generator().manual_seed(0)), tasks)[:, None].detach()
    action = guide.action(z, torch.Generator().manual_seed(3))
    assert (action[0, 0, 1:] == 0).all() and (action[1] != 0).all()
    logits = [q.forward(torch.cat([z, action], -1))[0] for q in guide._q]
    scalars = [(x.softmax(-1) * torch.linspace(-10, 10, 101)).sum(-1) for x in logits]
    expected = sum(torch.sign(x) * torch.expm1(x.abs()) for x in scalars) / 2
    torch.testing.assert_close(guide.value(z, torch.Generator().manual_seed(3)), expected, rtol=1e-4, atol=1e-5)
    planner = TDMPC2Planner(WorldModelDynamics(model, tasks), 6, 2, guide, action_mask=mask)
    planned = planner(np.zeros((2, 24), np.float32))
    assert (planned[0, 1:] == 0).all() and (np.abs(planned[1]) > 0).all()


def test_files_without_heads_are_refused(tmp_path: Path, tiny_world_model: Path):
    path = DATA / "mt30_tiny_new_layout.pt"
    model = load_checkpoint(path)
    state = torch.load(path, weights_only=True)["model"]
    bare = {k: v for k, v in state.items() if "_Qs" not in k}
    torch.save({"model": bare}, tmp_path / "bare.pt")
    with pytest.raises(ForeignFileError, match=r"no policy and Q functions.*guide the planner"):
        load_q_guide(tmp_path / "bare.pt", model)
    torch.save({"model": {**state, "_pi.2.weight": torch.zeros(3, 48)}}, tmp_path / "odd.pt")
    with pytest.raises(ForeignFileError, match="pi functions do not fit"):
        load_q_guide(tmp_path / "odd.pt", model, torch.tensor([0]))
    torch.save({"model": {**state, "_pi.2.bias": torch.full((12,), torch.nan)}}, tmp_path / "nan.pt")
    with pytest.raises(ForeignFileError, match=r"NaN or infinite numbers in pi\.2\.bias"):
        load_q_guide(tmp_path / "nan.pt", model, torch.tensor([0]))


def test_mistakes_are_named():
    planner = TDMPC2Planner(Chase(), 2, 2, ChaseGuide())
    with pytest.raises(ValueError, match=r"observations must be \[2, S\], got \(3, 2\)"):
        planner(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"discount must be in \(0, 1\], got 1.5"):
        TDMPC2Planner(Chase(), 2, discount=1.5)
    with pytest.raises(ValueError, match="finite value"):
        planner(np.full((2, 2), np.nan, np.float32))


def test_published_discounts():
    assert [published_discount(n) for n in (500, 100, 25, 10_000)] == [0.99, 0.95, 0.95, 0.995]
