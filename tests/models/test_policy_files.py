"""A policy by itself: what it computes, and its files, whole, missing and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small import OBS_DIM, extraction, start_obs, world_model

from pwm_fast import backend
from pwm_fast.models.policy import DESCRIPTION_FILE, WEIGHTS_FILE, Actor, Policy
from pwm_fast.models.world_model import LATENTS


@pytest.fixture(params=LATENTS)
def policy(request: pytest.FixtureRequest) -> Policy:
    """The second of two policies after one step, in float32."""
    ext = extraction(world_model(dtype=torch.float32, latent=request.param), policies=2)
    ext.step(start_obs(ext))
    return ext.policies()[1]


def test_act_is_encoder_and_mean_actor() -> None:
    model = world_model()
    ext = extraction(model, policies=2)
    ext.step(start_obs(ext))
    obs = torch.randn(4, 3, OBS_DIM, dtype=torch.float64)
    for p, policy in enumerate(ext.policies()):
        z = model.encode(obs, torch.tensor(p)).detach().reshape(1, 12, -1)
        expected = ext.actor.mean(z.expand(2, -1, -1))[p].view(4, 3, -1)
        torch.testing.assert_close(policy.act(obs), expected, rtol=1e-10, atol=1e-12)


def test_act_takes_numpy_and_single_observations(policy: Policy) -> None:
    obs = np.random.default_rng(0).normal(size=(5, OBS_DIM))
    actions = policy.act(obs)
    assert isinstance(actions, np.ndarray) and actions.shape == (5, policy.action_dim)
    np.testing.assert_allclose(policy.act(obs[0]), actions[0], rtol=1e-5, atol=1e-6)
    assert np.abs(actions).max() <= 1


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
def test_an_action_does_not_depend_on_the_episodes_beside_it(policy: Policy, kind: Callable) -> None:
    obs = kind(np.random.default_rng(0).normal(size=(16, OBS_DIM)).astype(np.float32))
    together = np.asarray(policy.act(obs))
    if backend.resolve() == "native":  # torch's products may add in another order for other numbers of rows
        for row in range(16):
            np.testing.assert_array_equal(np.asarray(policy.act(obs[row])), together[row])


def test_native_and_torch_agree(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    obs = np.random.default_rng(0).normal(size=(5, OBS_DIM))
    z = torch.rand(5, policy.description["latent_dim"])
    draw = partial(policy.act, obs, deterministic=False)
    calls = (
        lambda: policy.act(obs),
        lambda: policy.act(obs.tolist()).numpy(),
        lambda: draw(generator=torch.Generator().manual_seed(3)),
        lambda: policy.act_latent(z).numpy(),
    )
    found = [call() for call in calls]
    monkeypatch.setenv(backend.VARIABLE, "torch")
    for call, native in zip(calls, found):
        np.testing.assert_allclose(native, call(), rtol=1e-5, atol=1e-6)


def test_actions_have_no_gradient(policy: Policy) -> None:
    obs = torch.zeros(2, OBS_DIM, requires_grad=True)
    assert not policy.act(obs).requires_grad and not policy.act(obs, deterministic=False).requires_grad


def test_sampled_actions_follow_the_generator(policy: Policy) -> None:
    obs = torch.zeros(1000, OBS_DIM)
    one, same = (policy.act(obs, deterministic=False, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, same) and one.std(0).min() > 0.01


def test_wrong_observation_size_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"observations must have 7 entries \(unknown\), got \(2, 8\)"):
        policy.act(np.zeros((2, OBS_DIM + 1)))


def test_policies_do_not_change_with_the_extraction_they_came_from() -> None:
    ext = extraction(world_model(), policies=1)
    policy, obs = ext.policies()[0], start_obs(ext)
    before = policy.act(obs[0])
    ext.step(obs)
    assert torch.equal(policy.act(obs[0]), before)


def test_saved_and_loaded(policy: Policy, tmp_path: Path) -> None:
    written = policy.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in written.parent.iterdir()) == [DESCRIPTION_FILE, WEIGHTS_FILE]
    obs = np.random.default_rng(0).normal(size=(5, OBS_DIM))
    for path in (written.parent, written, written.with_name(DESCRIPTION_FILE)):
        loaded = Policy.load(path)
        np.testing.assert_array_equal(loaded.act(obs), policy.act(obs))
        assert loaded.description == policy.description


def test_description_says_what_a_person_needs(policy: Policy) -> None:
    expected = {"task", "obs_dim", "action_dim", "architecture", "normalisation", "versions", "format", "seed"}
    assert expected <= policy.description.keys()
    json.dumps(policy.description)


def test_missing_files(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no policy"):
        Policy.load(tmp_path)
    policy.save(tmp_path)
    (tmp_path / DESCRIPTION_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=DESCRIPTION_FILE):
        Policy.load(tmp_path)


def cut_weights(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def cut_description(folder: Path) -> None:
    path = folder / DESCRIPTION_FILE
    path.write_text(path.read_text()[:-20])


def edit(**changes: object):
    def change(folder: Path) -> None:
        path = folder / DESCRIPTION_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def poison(folder: Path) -> None:
    policy = Policy.load(folder)
    policy._actor.parameters["0.weight"][0, 0, 0] = torch.nan
    policy.save(folder)


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_weights, "is damaged"),
        (cut_description, "is damaged"),
        (edit(format="other"), "describes no policy of this version"),
        (edit(obs_dim=9), "does not fit.*encoder.0.weight must have shape"),
        (edit(actor_units=[12]), "does not fit.*parameters"),
        (edit(latent_dim="x"), "does not fit"),
        (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"\x80\x04pickle"), "is damaged"),
        (poison, "NaN or infinite numbers in actor.0.weight"),
    ],
    ids=["cut-weights", "cut-json", "format", "obs-dim", "units", "type", "pickle", "nan"],
)
def test_damaged_files_are_refused(policy: Policy, tmp_path: Path, damage, message: str) -> None:
    policy.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Policy.load(tmp_path)


def test_actor_initialisation_depends_on_its_seed_only() -> None:
    together = Actor([3, 4], latent_dim=8, action_dim=2, units=(6, 5))
    alone = Actor([4], latent_dim=8, action_dim=2, units=(6, 5))
    assert torch.equal(together.parameters.flat[1], alone.parameters.flat[0])
    assert not torch.equal(together.parameters.flat[0], together.parameters.flat[1])
    assert (together.parameters["log_std"] == -1).all()
    assert together.parameters["0.weight"].abs().max() <= 8**-0.5
