"""The world model: shapes, folding of constants, files."""

import pytest
import torch

from pwm_fast.models.sizes import SIZES
from pwm_fast.models.world_model import LATENTS, WorldModel, WorldModelConfig


def model(latent: str = "simnorm", **options) -> WorldModel:
    torch.manual_seed(1)
    widths = (7, 3, 16, 24, 20, 2) if latent == "simnorm" else (7, 3, 7, 24, 0, 0)
    made = WorldModel(WorldModelConfig(*widths, latent=latent, **options))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.4)
        made.obs_mean.normal_()
        made.obs_std.uniform_(0.5, 2.0)
        made.reward_scale.fill_(1.7)
        if made.config.residual:
            made.step_mean.normal_()
            made.step_std.uniform_(0.5, 2.0)
    return made.double()


def frozen_forward(layers, x, group):
    """The frozen layers by their definition."""
    for layer in layers:
        x = x @ layer.weight.T + layer.bias
        if layer.activation != "none":
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], layer.ln_weight, layer.ln_bias)
        if layer.activation == "mish":
            x = torch.nn.functional.mish(x)
        elif layer.activation == "simnorm":
            x = torch.softmax(x.unflatten(-1, (-1, group)), -1).flatten(-2)
    return x


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("tasks", [0, 4])
def test_frozen_layers_compute_what_the_model_computes(tasks, latent):
    m = model(latent, num_tasks=tasks, task_dim=5 if tasks else 0, termination_dim=8)
    task = torch.tensor([2]) if tasks else None
    index = torch.full((6,), 2) if tasks else None
    obs, action = torch.randn(6, 7).double() * 3, torch.rand(6, 3).double()
    frozen = m.frozen(task)
    z = m.encode(obs, index)
    torch.testing.assert_close(frozen_forward(frozen.encoder, obs, 8), z, rtol=1e-10, atol=1e-12)
    za = torch.cat([z, action], -1)
    after = frozen_forward(frozen.dynamics, za, 8) + (z if m.config.residual else 0)
    torch.testing.assert_close(after, m.next(z, action, index), rtol=1e-10, atol=1e-12)
    logits = m.reward_logits(z, action, index)
    torch.testing.assert_close(frozen_forward(frozen.reward, za, 8), logits, rtol=1e-10, atol=1e-12)
    ended = m.termination_logit(z, index)
    torch.testing.assert_close(frozen_forward(frozen.termination, z, 8)[:, 0], ended, rtol=1e-10, atol=1e-12)


def test_long_task_embeddings_are_scaled_to_norm_one():
    m = model(num_tasks=4, task_dim=5)
    with torch.no_grad():
        m._task_emb.weight[1] = torch.tensor([3.0, 0, 4, 0, 0])
        m._task_emb.weight[2] = torch.tensor([0.3, 0, 0.4, 0, 0])
    rows = m.task_embedding(torch.tensor([1, 2]))
    torch.testing.assert_close(rows[0], torch.tensor([0.6, 0, 0.8, 0, 0]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(rows[1], torch.tensor([0.3, 0, 0.4, 0, 0]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("symlog", [False, True])
def test_reward_targets_and_expected_rewards_are_inverse(symlog):
    m = model(reward_symlog=symlog)
    reward = torch.tensor([-9.0, -0.3, 0.0, 2.0, 11.0]).double()
    place = (m.reward_target(reward) + 10) / 20 * 100
    logits = torch.full((5, 101), -1e9).double()
    for row, p in enumerate(place):
        low = int(p)
        logits[row, low] = torch.log(1 - (p - low) + 1e-300)
        logits[row, low + 1] = torch.log(p - low + 1e-300)
    torch.testing.assert_close(m.expected_reward(logits), reward, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_published_parameter_counts(name):
    published = {"1M": 0.63, "5M": 1.60, "19M": 5.60, "48M": 18.98, "317M": 108.3}
    task_dim = 96 if name in ("1M", "317M") else 64
    with torch.device("meta"):
        count = WorldModel(WorldModelConfig.of_size(name, 24, 6, num_tasks=30, task_dim=task_dim)).num_parameters
    # 19M's mt30 checkpoints have a latent of 512; the table has mt80's 768
    assert name == "19M" or abs(count / 1e6 - published[name]) < 0.02 * published[name]


def test_a_saved_model_comes_back_the_same(tmp_path):
    m = model(termination_dim=8).float()
    m.provenance = {"task": "hopper"}
    m.save(tmp_path / "m.safetensors")
    back = WorldModel.load(tmp_path / "m.safetensors")
    assert back.config == m.config and back.provenance == {"task": "hopper"}
    for name, value in m.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name


def test_half_precision_files_are_half_as_large_and_close(tmp_path):
    m = model().float()
    m.save(tmp_path / "whole.safetensors")
    m.save(tmp_path / "half.safetensors", half=True)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    back = WorldModel.load(tmp_path / "half.safetensors")
    assert all(v.dtype == torch.float32 for v in back.state_dict().values())
    obs = torch.randn(4, 7)
    torch.testing.assert_close(back.encode(obs), m.encode(obs), rtol=0, atol=5e-3)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match=r"pwm_fast\.pretrain` makes one"):
        WorldModel.load(path)
    path.write_bytes(b"\x80\x04nonsense" * 10)
    with pytest.raises(ValueError, match="damaged"):
        WorldModel.load(path)
    m = model().float()
    m.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        WorldModel.load(path)
    with torch.no_grad():
        m._reward[0].weight[0, 0] = float("nan")
    m.save(path)
    with pytest.raises(ValueError, match=r"NaN or infinite numbers in _reward.0.weight"):
        WorldModel.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 12}, "multiple of simnorm_dim 8, got 12"),
        ({"obs_dim": 0}, "obs_dim must be >= 1, got 0"),
        ({"num_tasks": 3}, "must both be 0 or both be > 0"),
        ({"latent": "pixels"}, "latent must be one of simnorm, observation, got 'pixels'"),
        ({"latent": "observation"}, "latent_dim = obs_dim = 7 and no encoder layers, got 16 and 2"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    base = dict(obs_dim=7, action_dim=3, latent_dim=16, mlp_dim=24, encoder_dim=20, encoder_layers=2)
    with pytest.raises(ValueError, match=message):
        WorldModelConfig(**{**base, **options})
