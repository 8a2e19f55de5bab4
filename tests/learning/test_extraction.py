"""The explicit extraction step against its definition, and what a population promises: isolation and exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from naive import NaiveExtraction
from small import ACTION_DIM, OBS_DIM, extraction, relative, start_obs, world_model

from pwm_fast.kernels import td_lambda
from pwm_fast.kernels.triton_support import refusal
from pwm_fast.learning import noise as counter_noise
from pwm_fast.learning.extraction import PRESETS, Extraction, ExtractionConfig, preset
from pwm_fast.models.world_model import WorldModel, WorldModelConfig
from pwm_fast.state_files import load_state, save_state

REFERENCE = Path(__file__).parents[1] / "data" / "pwm" / "update_reference.npz"

# Names of the recorded arrays.
ACTOR_NAMES = {
    f"{i}.{mine}": f"mu_net.{3 * i + place}.{theirs}"
    for i in range(3)
    for mine, place, theirs in (
        ("weight", 0, "weight"),
        ("bias", 0, "bias"),
        ("ln.weight", 2, "weight"),
        ("ln.bias", 2, "bias"),
    )
} | {"3.weight": "mu_net.9.weight", "3.bias": "mu_net.9.bias", "log_std": "logstd"}
CRITIC_NAMES = {f"{i}.{kind}": f"{kind[0]}{i + 1}" for i in range(3) for kind in ("weight", "bias")} | {
    f"{i}.ln.{kind}": f"ln{i + 1}_{kind[0]}" for i in range(2) for kind in ("weight", "bias")
}


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """Two updates of the published code in float64."""
    with np.load(REFERENCE) as file:
        return {name: torch.from_numpy(np.array(file[name])) for name in file.files}


def reference_extraction(reference: dict[str, torch.Tensor], dtype: torch.dtype) -> Extraction:
    """Our extraction with the recorded world model and initial networks; the recording kept its learning rate."""
    model = WorldModel(WorldModelConfig(10, 3, 16, 24, 24, 2, num_tasks=30, task_dim=64)).to(dtype)
    recorded = {k.removeprefix("world_model/"): v for k, v in reference.items() if k.startswith("world_model/")}
    statistics = {name: value for name, value in model.state_dict().items() if name not in recorded}
    assert set(statistics) == {"obs_mean", "obs_std", "reward_scale"}  # identities in a new model
    model.load_state_dict({**statistics, **recorded})
    config = replace(
        preset("published-code"), batch_size=8, actor_units=(48, 32, 24), critic_units=(48, 32), final_lr=5e-4
    )
    ext = Extraction(model, config, task_ids=[int(reference["task_id"])])
    ext.actor.parameters.load(0, {mine: reference[f"actor0/{theirs}"] for mine, theirs in ACTOR_NAMES.items()})
    for k in range(3):
        ext.critic.parameters.load(k, {mine: reference[f"critic0/{n}"][k] for mine, n in CRITIC_NAMES.items()})
    return ext


@pytest.mark.parametrize(
    "backend, dtype, tolerance",
    [("torch", torch.float64, 1e-9), ("triton", torch.float32, 1e-4)],  # 5e-5 the loss, a small mean; else 2e-6
    ids=["float64", "float32-triton"],
)
def test_two_updates_of_the_published_code(
    reference: dict[str, torch.Tensor],
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "triton" and (reason := refusal(torch.empty(1))):
        pytest.skip(reason)
    monkeypatch.setenv("PWM_FAST_BACKEND", backend)
    ext = reference_extraction(reference, dtype)
    reference = {k: v.to(dtype) for k, v in reference.items()}
    for step in range(2):
        recorded = {k.removeprefix(f"step{step}/"): v for k, v in reference.items() if k.startswith(f"step{step}/")}

        def check(name: str, value: torch.Tensor, recorded: dict[str, torch.Tensor] = recorded) -> None:
            assert relative(value, recorded[name].reshape(value.shape)) < tolerance, name

        rollout = ext.imagination.rollout(ext.actor, reference["obs"][None], reference["eps"][step][None])
        metrics, next_values = ext.update_actor(rollout)
        check("rewards", rollout.reward)
        check("latents", rollout.latents[:, : len(recorded["latents"])])
        check("next_values", next_values)
        check("actor_loss", metrics["actor_loss"])
        check("actor_grad_norm", metrics["actor_grad_norm"])
        clip = (1 / (metrics["actor_grad_norm"] + 1e-6)).clamp(max=1.0)
        for mine, theirs in ACTOR_NAMES.items():
            check(f"actor_grad_clipped/{theirs}", ext.actor.parameters.grads[mine] * clip)
            check(f"actor/{theirs}", ext.actor.parameters[mine])
        statistics = ext.return_statistics
        check("return_rms_mean_var_count", torch.cat([statistics.mean, statistics.variance, statistics.count]))

        targets = ext.targets(rollout, next_values)
        check("targets", targets)
        check("targets_td_lambda_095", td_lambda.returns(rollout.reward, next_values, None, 0.99, 0.95))
        metrics = ext.update_critic(rollout, targets)
        check("value_loss", metrics["critic_loss"])
        for mine, theirs in CRITIC_NAMES.items():
            check(f"critic/{theirs}", ext.critic.parameters[mine])


VARIANTS = {
    "paper": {},
    "published-code": {"td_lambda": 0.0, "terminal_discount_offset": 1, "shuffle": False},
    "actor-input-not-detached": {"detach_actor_input": False},
    "no-return-normalisation": {"return_normalisation": False},
    "one-critic": {"num_critics": 1},
    "uneven-minibatches": {"critic_minibatches": 7},
    "log-std-at-its-limit": {"min_log_std": -0.9},
    "terminations": {"terminations": True, "model": {"termination_dim": 11}},
    "terminations-not-detached": {"terminations": True, "detach_actor_input": False, "model": {"termination_dim": 11}},
    "terminations-offset": {"terminations": True, "terminal_discount_offset": 1, "model": {"termination_dim": 11}},
    "scalar-reward-head": {"model": {"num_bins": 1}},
    "symlog-reward": {"model": {"reward_symlog": True, "vmin": -2.0, "vmax": 2.0}},
    "no-task-embedding": {"model": {"tasks": 0}},
    "observation-latents": {"model": {"latent": "observation", "num_bins": 1}},
    "observation-latents-not-detached": {"detach_actor_input": False, "model": {"latent": "observation"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_explicit_step_is_the_autograd_definition(name: str) -> None:
    options = dict(VARIANTS[name])
    model = world_model(**options.pop("model", {}))
    ext = extraction(model, policies=2, **options)
    naive = [NaiveExtraction(model, ext, p) for p in range(2)]
    config, rows = ext.config, ext.config.horizon * ext.config.batch_size
    for step in range(3):
        obs, at = start_obs(ext, step), torch.tensor(step)
        seeds, shape = torch.tensor(ext.seeds), (config.horizon, config.batch_size, ACTION_DIM)
        noise = counter_noise.normal(seeds, at, counter_noise.ACTION_NOISE, shape, torch.float64)
        orders = counter_noise.permutations(seeds, at, counter_noise.MINIBATCH_ORDER, config.critic_epochs, rows)
        metrics = ext.step(obs)
        for p, one in enumerate(naive):
            expected = one.step(obs[p], noise[p], list(orders[p]) if config.shuffle else None)
            for key, value in expected.items():
                assert metrics[key][p].item() == pytest.approx(value, rel=1e-9)
            for key, value in one.actor_tensors().items():
                assert relative(ext.actor.parameters[key][p], value) < 1e-9, key
            critics = slice(p * config.num_critics, (p + 1) * config.num_critics)
            for key, value in one.critic_tensors().items():
                assert relative(ext.critic.parameters[key][critics], value) < 1e-9, key
    assert not ext.diverged.any()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
def test_each_policy_of_a_population_is_the_one_extracted_alone(dtype: torch.dtype, tolerance: float) -> None:
    """To rounding only: a matrix product may be blocked differently for P * B rows than for B."""
    model = world_model(dtype=dtype, termination_dim=11)
    together = extraction(model, policies=4, terminations=True)
    alone = [extraction(model, seeds=[10 + p], task_ids=[p], terminations=True) for p in range(4)]
    for step in range(3):
        together.step(start_obs(together, step))
        for one in alone:
            one.step(start_obs(one, step))
    for p, one in enumerate(alone):
        assert relative(together.actor.parameters.flat[p], one.actor.parameters.flat[0]) < tolerance
        assert relative(together.critic.parameters.flat.view(4, -1)[p], one.critic.parameters.flat.view(-1)) < tolerance


def test_a_diverged_policy_is_frozen_and_the_others_go_on() -> None:
    model = world_model()
    healthy, sick = extraction(model, policies=3), extraction(model, policies=3)
    for step in range(4):
        obs = start_obs(healthy, step)
        healthy.step(obs)
        if step == 1:
            before = sick.state_dict()
            obs = obs.clone()
            obs[1, 0, 0] = torch.nan
        sick.step(obs)
    assert sick.diverged.tolist() == [False, True, False]
    after, expected = sick.state_dict(), healthy.state_dict()
    for name in ("actor", "critic"):
        rows = after[name].shape[0] // 3
        for p, reference_state in ((0, expected), (1, before), (2, expected)):
            mine = slice(p * rows, (p + 1) * rows)
            assert torch.equal(after[name][mine], reference_state[name][mine]), (name, p)
        for key in ("m", "v", "steps"):
            for p, reference_state in ((0, expected), (1, before), (2, expected)):
                assert torch.equal(after[f"{name}_adam"][key][p], reference_state[f"{name}_adam"][key][p])
    for key, value in after["return_statistics"].items():
        assert torch.equal(value[1], before["return_statistics"][key][1])


def test_a_critic_that_diverges_freezes_its_policy() -> None:
    ext = extraction(world_model(), policies=2)
    ext.critic.parameters["2.bias"][: ext.config.num_critics] = 1e200  # squares overflow, values and actor do not
    before = ext.state_dict()
    ext.step(start_obs(ext))
    assert ext.diverged.tolist() == [True, False]
    assert torch.equal(ext.critic.parameters.flat[:3], before["critic"][:3])
    assert not torch.equal(ext.critic.parameters.flat[3:], before["critic"][3:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_resume_is_bitwise_the_uninterrupted_run(dtype: torch.dtype, tmp_path: Path) -> None:
    model = world_model(dtype=dtype)
    whole, first = extraction(model, policies=2), extraction(model, policies=2)
    for step in range(5):
        whole.step(start_obs(whole, step))
    for step in range(2):
        first.step(start_obs(first, step))
    save_state(tmp_path / "state.safetensors", first.state_dict())
    second = extraction(model, policies=2)
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    for step in range(2, 5):
        second.step(start_obs(second, step))
    for name, value in flatten(whole.state_dict()).items():
        assert torch.equal(flatten(second.state_dict())[name], value), name


def flatten(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a nested dict."""
    out = {}
    for key, value in state.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            out[f"{prefix}{key}"] = value
    return out


def test_state_of_another_run_is_refused() -> None:
    state = extraction(world_model(), policies=2).state_dict()
    with pytest.raises(ValueError, match="seeds"):
        extraction(world_model(), policies=3).load_state_dict(state)
    with pytest.raises(ValueError, match="config"):
        extraction(world_model(), policies=2, gamma=0.9).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks actor"):
        extraction(world_model()).load_state_dict({k: v for k, v in state.items() if k != "actor"})


def test_another_world_model_in_the_middle_of_a_run() -> None:
    ext = extraction(world_model(0), policies=2)
    ext.step(start_obs(ext))
    ext.set_world_model(world_model(1))
    fresh = extraction(world_model(1), policies=2)
    fresh.load_state_dict(ext.state_dict())
    for one in (ext, fresh):
        one.step(start_obs(ext, 1))
    assert torch.equal(ext.actor.parameters.flat, fresh.actor.parameters.flat)
    with pytest.raises(ValueError, match="keep its shape"):
        ext.set_world_model(world_model(num_bins=1))


def test_learning_rate_falls_linearly_to_its_final_value() -> None:
    ext = extraction(world_model())
    rates = []
    for iteration in (0, 25, 50, 60):
        ext.iteration.fill_(iteration)
        rates.append(ext.learning_rate(5e-4).item())
    assert rates == pytest.approx([5e-4, (5e-4 + 1e-5) / 2, 1e-5, 1e-5])


def test_averaged_policies_are_exponential_averages_of_the_actors() -> None:
    ext = extraction(world_model(), 2, actor_average=0.75, actor_lr=1e-2)
    mean = ext.actor.parameters.flat.clone()
    for step in range(3):
        ext.step(start_obs(ext, step))
        mean = 0.75 * mean + 0.25 * ext.actor.parameters.flat
    torch.testing.assert_close(ext.average, mean)
    last, averaged = ext.policies()[1].tensors(), ext.policies(averaged=True)[1].tensors()
    assert not torch.equal(last["actor.0.weight"], averaged["actor.0.weight"])
    torch.testing.assert_close(averaged["actor.0.weight"], ext.average[1, : 12 * 16].view(12, 16))


def test_without_averaging_the_average_is_the_actor() -> None:
    ext = extraction(world_model(), 2)
    ext.step(start_obs(ext))
    assert torch.equal(ext.average, ext.actor.parameters.flat)


def test_numpy_start_observations() -> None:
    ext, same = extraction(world_model(), policies=2), extraction(world_model(), policies=2)
    ext.step(start_obs(ext))
    same.step(start_obs(same).numpy())
    assert torch.equal(ext.actor.parameters.flat, same.actor.parameters.flat)


def test_presets() -> None:
    paper, published = PRESETS["paper"], preset("published-code")
    assert (paper.terminal_discount_offset, paper.td_lambda, paper.shuffle, paper.batch_size) == (0, 0.95, True, 64)
    assert (published.terminal_discount_offset, published.td_lambda, published.shuffle) == (1, 0.0, False)
    assert not paper.terminations and not published.terminations
    with pytest.raises(ValueError, match="published-code"):
        preset("papre")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"horizon": 0}, "horizon must be >= 1, got 0"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"actor_lr": 0.0}, "actor_lr must be > 0"),
        ({"horizon": 1, "batch_size": 3}, "critic_minibatches must be <= horizon"),
    ],
    ids=["horizon", "gamma", "learning-rate", "minibatches"],
)
def test_impossible_configurations_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractionConfig(**options)


def test_impossible_requests_are_refused() -> None:
    model = world_model()
    with pytest.raises(ValueError, match=r"start observations must be \[P, B, S\] = \(1, 6, 7\), got \(1, 6, 8\)"):
        extraction(model).step(torch.zeros(1, 6, OBS_DIM + 1))
    with pytest.raises(ValueError, match="terminations need a world model with a termination head"):
        extraction(model, terminations=True)
    with pytest.raises(ValueError, match="task_ids must have shape"):
        extraction(model, policies=2, task_ids=[0])
    with pytest.raises(ValueError, match="seeds must be"):
        extraction(model, seeds=[-1])
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        extraction(model).set_total_steps(0)
