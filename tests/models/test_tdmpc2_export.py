"""Our models as TD-MPC2's checkpoints: the keys, shapes and types that its own class wrote, and the same outputs."""

from pathlib import Path

import pytest
import torch

from pwm_fast.data.task_table import action_dims
from pwm_fast.models.tdmpc2_checkpoints import load_checkpoint
from pwm_fast.models.tdmpc2_export import export_checkpoint
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

DATA = Path(__file__).parent.parent / "data" / "tdmpc2"
WRITTEN = {"0.8": "mt30_tiny_new_layout_tensordict083.pt", "0.14": "mt30_tiny_new_layout.pt"}


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def kind(value):
    """What a loader compares: shape, type and whether there is data."""
    return (tuple(value.shape), value.dtype, value.is_meta) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("tensordict", WRITTEN)
def test_an_exported_model_has_what_tdmpc2s_class_wrote(tensordict, tmp_path):
    theirs = read(DATA / WRITTEN[tensordict])
    model = load_checkpoint(DATA / WRITTEN[tensordict])
    export_checkpoint(model, tmp_path / "m.pt", action_dims=action_dims(30), num_q=2, tensordict=tensordict)
    ours = read(tmp_path / "m.pt")
    assert {key: kind(value) for key, value in ours.items()} == {key: kind(value) for key, value in theirs.items()}
    for key, value in ours.items():
        known = key.startswith(("_encoder", "_dynamics", "_reward", "_task_emb", "_action_masks", "log_std"))
        if known and isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[key]), key


def small(**options) -> WorldModel:
    torch.manual_seed(1)
    model = WorldModel(WorldModelConfig(7, 3, 16, 24, 20, 2, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
        model.obs_mean.normal_()
        model.obs_std.uniform_(0.5, 2.0)
    return model


def test_q_functions_and_policy_are_as_tdmpc2_initialises_them(tmp_path):
    """Truncated normal weights of deviation 0.02, neutral biases and norms, values of zero, targets equal."""
    export_checkpoint(small(), tmp_path / "m.pt", num_q=5, seed=3)
    state = read(tmp_path / "m.pt")
    for name in ("_pi.0", "_pi.2", "_Qs.params.0", "_Qs.params.1"):
        weight = state[f"{name}.weight"]
        assert abs(weight.std() - 0.02) < 0.003 and abs(weight.mean()) < 0.003 and not state[f"{name}.bias"].any()
    members = state["_Qs.params.1.weight"]
    assert members.shape == (5, 24, 24) and not torch.equal(members[0], members[1])
    assert not state["_Qs.params.2.weight"].any()
    assert (state["_Qs.params.0.ln.weight"] == 1).all() and not state["_Qs.params.0.ln.bias"].any()
    for key, value in state.items():
        if key.startswith("_Qs.params.") and isinstance(value, torch.Tensor):
            assert torch.equal(value, state[key.replace("_Qs.params", "_target_Qs_params")]), key
    export_checkpoint(small(), tmp_path / "again.pt", num_q=5, seed=3)
    assert torch.equal(read(tmp_path / "again.pt")["_pi.0.weight"], state["_pi.0.weight"])


@pytest.mark.parametrize(
    ("options", "num_bins"),
    [
        (dict(num_bins=1), 0),
        (dict(num_bins=1, reward_symlog=True), 1),
        (dict(reward_symlog=True), 101),
        (dict(num_tasks=4, task_dim=5, reward_symlog=True), 101),
        (dict(num_bins=1, termination_dim=24), 0),
    ],
)
def test_statistics_are_folded_in_and_models_come_back(options, num_bins, tmp_path):
    model = small(**options)
    if num_bins == 0:
        model.reward_scale.fill_(3.0)
    result = export_checkpoint(model, tmp_path / "m.pt")
    assert result["settings"]["num_bins"] == num_bins and result["settings"]["num_enc_layers"] == 2
    back = load_checkpoint(tmp_path / "m.pt", "symexp" if model.config.reward_symlog else "linear")
    assert back.config == model.config and (back.obs_std == 1).all()
    task = torch.tensor([0, 1, 2, 3, 0]) if model.config.num_tasks else None
    obs, action = torch.randn(5, 7), torch.rand(5, 3)
    z = model.encode(obs, task)
    torch.testing.assert_close(back.encode(obs, task), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back.reward(z, action, task), model.reward(z, action, task), rtol=1e-5, atol=1e-5)
    if model.has_termination:
        torch.testing.assert_close(back.termination_logit(z), model.termination_logit(z))


def test_what_cannot_be_said_is_noted(tmp_path):
    model = small(termination_dim=8)
    model.reward_scale.fill_(2.0)
    notes = " ".join(export_checkpoint(model, tmp_path / "m.pt")["notes"])
    for text in ("divided by 2", "not trained for", "termination head is left out", "untrained"):
        assert text in notes
    plain = export_checkpoint(small(reward_symlog=True), tmp_path / "p.pt")["notes"]
    assert len(plain) == 1 and "untrained" in plain[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(num_q=1), "num_q must be >= 2"),
        (dict(tensordict="0.5"), r"tensordict must be one of 0\.8, 0\.14, got '0\.5'"),
        (dict(action_dims=[3]), r"action_dims must be 0 numbers from 1 to 3, got \[3\]"),
    ],
)
def test_impossible_wishes_are_refused(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        export_checkpoint(small(), tmp_path / "m.pt", **options)
    residual = WorldModel(WorldModelConfig(7, 3, 7, 24, 0, 0, latent="observation"))
    with pytest.raises(ValueError, match="no residual dynamics"):
        export_checkpoint(residual, tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())
