"""SHAC against its definition: targets in a loop, gradients by autograd, learning on problems with known answers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pwm_fast.baselines.actor_policy import ActorPolicy, load_policy
from pwm_fast.baselines.shac import SHAC, Rollout, SHACConfig, limited
from pwm_fast.baselines.shac_training import SHACTraining, train_shac
from pwm_fast.envs.dflex import DifferentiableEnv
from pwm_fast.envs.evaluation import evaluate

SMALL = SHACConfig(num_envs=6, horizon=8, actor_units=(32, 16), critic_units=(32,), critic_epochs=2)


def network(parameters: dict[str, Tensor], x: Tensor, depth: int) -> Tensor:
    """The population network's only member, in plain differentiable torch."""
    for i in range(depth - 1):
        x = F.mish(F.linear(x, parameters[f"{i}.weight"], parameters[f"{i}.bias"]))
        x = F.layer_norm(x, x.shape[-1:], parameters[f"{i}.ln.weight"], parameters[f"{i}.ln.bias"], 1e-5)
    return F.linear(x, parameters[f"{depth - 1}.weight"], parameters[f"{depth - 1}.bias"])


def test_targets_are_those_of_a_loop(point_env):
    shac = SHAC(point_env(6), SMALL)
    random = torch.Generator().manual_seed(0)
    terminated, truncated = torch.rand(2, 8, 6, generator=random) < 0.15
    obs, final_obs = torch.randn(2, 8, 6, 4, generator=random)
    reward = torch.randn(8, 6, generator=random)
    rollout = Rollout(obs, torch.zeros(8, 6, 2), reward, terminated, truncated, final_obs)
    parameters = shac.target_critic.parameters.tensors(0)
    value = network(parameters, shac.normalisation(final_obs), 2)[..., 0]
    gamma, lam = SMALL.gamma, SMALL.td_lambda
    expected = torch.empty(8, 6)
    for n in range(6):
        following = value[7, n].item()
        for h in reversed(range(8)):
            next_value = 0.0 if terminated[h, n] else value[h, n].item()
            if terminated[h, n] or truncated[h, n]:
                following = next_value
            elif h == 7:
                following = value[7, n].item()
            else:
                following = (1 - lam) * next_value + lam * following
            following = reward[h, n].item() + gamma * following
            expected[h, n] = following
    torch.testing.assert_close(shac.targets(rollout), expected, rtol=1e-5, atol=1e-5)


def objective(shac: SHAC, parameters: dict[str, Tensor]) -> Tensor:
    """Equation 5 by autograd, step by step, with the noise and resets that `shac` will draw next."""
    env, c = shac.env, shac.config
    generator = torch.Generator()
    generator.set_state(shac.generator.get_state())
    critic = {k: v.detach() for k, v in shac.target_critic.parameters.tensors(0).items()}
    obs, discount, total = env.initialize_trajectory(), torch.ones(env.num_envs), torch.zeros(())
    for h in range(c.horizon):
        noise = torch.randn(env.num_envs, env.action_dim, generator=generator)
        mean = network(parameters, shac.normalisation(obs), len(c.actor_units) + 1)
        obs, reward, terminated, truncated, info = env.step(torch.tanh(mean + parameters["log_std"].exp() * noise))
        total = total + (discount * reward).sum()
        value = network(critic, shac.normalisation(info["final_obs"]), len(c.critic_units) + 1)[:, 0]
        ends = (truncated | (h == c.horizon - 1)) & ~terminated
        total = total + torch.where(ends, discount * c.gamma * value, 0.0).sum()
        discount = torch.where(terminated | truncated, 1.0, discount * c.gamma)
    return total / (env.num_envs * c.horizon)


def test_the_actors_gradient_is_that_of_autograd(point_env):
    config = replace(SMALL, state_gradient_limit=0.0)
    shac = SHAC(point_env(6, length=5), config, overlap=False)
    for _ in range(2):  # statistics that matter, a critic that is not its target
        shac.iteration(0.0)
    state = shac.state_dict()
    parameters = {name: value.requires_grad_() for name, value in shac.actor.parameters.tensors(0).items()}
    (-objective(shac, parameters)).backward()
    shac.load_state_dict(state)
    rollout, tape = shac._act()
    shac._update_actor(rollout, tape, learning_rate=0.0)
    assert rollout.done.any()
    for name, parameter in parameters.items():
        torch.testing.assert_close(shac.actor.parameters.grads[name][0], parameter.grad, rtol=2e-4, atol=1e-6)


def test_a_step_along_the_gradient_raises_the_hoppers_return():
    env = DifferentiableEnv("hopper", 6, seed=1, threads=1, action_in_obs=False)
    shac = SHAC(env, replace(SMALL, state_gradient_limit=0.0))
    state = shac.state_dict()

    def value() -> float:
        shac.env.load_state_dict(state["env"])
        with torch.no_grad():
            return objective(shac, shac.actor.parameters.tensors(0)).item()

    before = value()
    shac.env.load_state_dict(state["env"])
    rollout, tape = shac._act()
    shac._update_actor(rollout, tape, learning_rate=0.0)
    gradient = shac.actor.parameters.grad.clone()
    step = 1e-4 / gradient.norm()
    shac.generator.set_state(state["generator"])
    shac.actor.parameters.flat.sub_(step * gradient)
    gain = value() - before
    assert gain == pytest.approx(1e-4 * gradient.norm().item(), rel=0.05)


def test_the_limit_shortens_long_gradients_only():
    x = torch.zeros(3, 4, requires_grad=True)
    limited(x * 1.0, 2.0).backward(torch.tensor([[1.0, 0, 0, 0], [3.0, 4.0, 0, 0], [0, 0, 0, 0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 0, 0, 0], [1.2, 1.6, 0, 0], [0, 0, 0, 0]]))


def test_a_broken_environment_does_not_spoil_the_others(point_env):
    shac = SHAC(point_env(6), SMALL)
    shac.env.broken = 2
    before = shac.actor.parameters.flat.clone()
    _, metrics = shac.iteration(0.0)
    assert 0 < metrics.actor_gradient_norm < float("inf")
    assert torch.isfinite(shac.actor.parameters.flat).all() and not torch.equal(shac.actor.parameters.flat, before)


@pytest.mark.parametrize("task", ["hopper", "ant"])
def test_resume_is_exact(task: str):
    """Whatever the threads, and whether or not the critic learns on one of its own."""

    def make(overlap: bool = True) -> SHAC:
        env = DifferentiableEnv(task, 6, seed=3, threads=1 + overlap, action_in_obs=False)
        return SHAC(env, SMALL, seed=4, overlap=overlap)

    def run(shac: SHAC, first: int, last: int) -> list[Rollout]:
        return [shac.iteration(i / 6)[0] for i in range(first, last)]

    whole = make()
    rollouts = run(whole, 0, 6)
    half = make()
    run(half, 0, 3)
    resumed = make(overlap=False)
    resumed.load_state_dict(half.state_dict())
    for expected, found in zip(rollouts[3:], run(resumed, 3, 6)):
        for name, value in vars(expected).items():
            assert torch.equal(value, getattr(found, name)), name
    whole.finish_regression()
    assert torch.equal(whole.actor.parameters.flat, resumed.actor.parameters.flat)
    assert torch.equal(whole.critic.parameters.flat, resumed.critic.parameters.flat)


def test_the_saved_policy_is_the_actor_and_ignores_the_last_action(tmp_path):
    env = DifferentiableEnv("ant", 6, seed=0, threads=1, action_in_obs=False)
    shac = SHAC(env, SMALL)
    for _ in range(2):
        shac.iteration(0.0)
    shac.policy().save(tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    assert isinstance(policy, ActorPolicy) and (policy.task, policy.obs_dim, policy.action_dim) == ("ant", 37, 8)
    obs = env.initialize_trajectory().detach()
    expected = shac.actor.mean(shac.normalisation(obs)[None])[0]
    torch.testing.assert_close(policy.act(obs), expected, rtol=0, atol=2e-5)
    shown = torch.cat([obs[:, :-8], torch.rand(6, 8)], -1)
    torch.testing.assert_close(policy.act(shown), expected, rtol=0, atol=2e-5)
    assert policy.act(shown.numpy()).shape == (6, 8)


def test_bad_policies_are_named(tmp_path, point_env):
    with pytest.raises(FileNotFoundError, match="holds no policy"):
        load_policy(tmp_path)
    path = SHAC(point_env(6), SMALL).policy().save(tmp_path)
    with pytest.raises(ValueError, match="must have 4 entries"):
        load_policy(tmp_path).act(torch.zeros(3, 5))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_policy(tmp_path)


@pytest.mark.parametrize("budget", [{}, {"minutes": 0}, {"steps": -1}])
def test_a_run_needs_a_budget(budget: dict):
    with pytest.raises(ValueError, match=r"minutes|steps"):
        SHACTraining("hopper", **budget)


def point_return(env, act) -> float:
    """Mean return of 20 steps from the same 256 starts."""
    env.progress[:] = 0
    total, obs = 0.0, env.obs
    for _ in range(20):
        obs, reward, _, _, _ = env.step(act(obs))
        total += reward.mean().item()
    return total


@pytest.mark.parametrize("seed", range(3))
def test_points_learn_to_go_home(point_env, seed: int):
    """Nearly as well as the best linear controller with clipped actions: -3.6, where doing nothing scores -30.

    Measured over seeds: -4.3 to -4.2, the bound is -4.9. The critic must keep up: with 2 epochs it falls to -7.
    """
    config = replace(SMALL, num_envs=32, horizon=16, critic_epochs=8)
    shac = SHAC(point_env(32, seed=seed), config, seed)
    for i in range(80):
        shac.iteration(i / 80)
    idle = point_return(point_env(256, seed=9), lambda obs: torch.zeros(256, 2))
    tuned = point_return(point_env(256, seed=9), lambda obs: (-2.0 * obs[:, :2] - obs[:, 2:]).clip(-1, 1))
    learned = point_return(point_env(256, seed=9), shac.policy().act)
    assert learned > idle + 0.95 * (tuned - idle)


HOPPER = replace(SHACConfig(), num_envs=32, actor_units=(64, 32), critic_units=(64, 64), critic_epochs=8)


def test_a_hopper_learns_a_little():
    result = train_shac("hopper", steps=25_000, config=HOPPER, threads=1)
    assert result.best.return_mean > 100, result.evaluations


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_hopper_learns_to_hop(seed: int):
    result = train_shac("hopper", steps=300_000, seed=seed)
    returns = evaluate("hopper", result.policy.act, 32, seed=99).returns
    assert returns.mean() > 1000, result.evaluations
