"""World models out of TD-MPC2's and PWM's checkpoints: outputs of their own classes, every published size."""

import json
import sys
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pwm_fast.data.stored_zip import ForeignFileError
from pwm_fast.models.sizes import SIZES
from pwm_fast.models.tdmpc2_checkpoints import infer_config, load_checkpoint, size_name
from pwm_fast.models.world_model import WorldModel

DATA = Path(__file__).parent.parent / "data" / "tdmpc2"
TINY = ["new_layout", "new_layout_tensordict083", "old_layout_with_omegaconf"]
SHAPES = {name: json.loads((DATA / f"checkpoint_shapes_{name}_layout.json").read_text()) for name in ("new", "old")}
HORIZON = 16


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """What TD-MPC2's class gave for the tiny weights on 8 rows."""
    with np.load(DATA / "mt30_tiny_reference_outputs.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


class Naive:
    """TD-MPC2's equations on the raw state dict, read by torch's own loader."""

    def __init__(self, dtype: torch.dtype):
        state = torch.load(DATA / "mt30_tiny_new_layout_tensordict083.pt", weights_only=True)["model"]
        self.p = {k: v.to(dtype) for k, v in state.items() if isinstance(v, torch.Tensor)}

    def mlp(self, name, x, simnorm):
        last = max(int(k[len(name) + 1]) for k in self.p if k.startswith(f"{name}."))
        for i in range(last + 1):
            x = F.linear(x, self.p[f"{name}.{i}.weight"], self.p[f"{name}.{i}.bias"])
            if f"{name}.{i}.ln.weight" in self.p:
                x = F.layer_norm(x, x.shape[-1:], self.p[f"{name}.{i}.ln.weight"], self.p[f"{name}.{i}.ln.bias"])
                x = F.softmax(x.unflatten(-1, (-1, 8)), -1).flatten(-2) if i == last and simnorm else F.mish(x)
        return x

    def embed(self, task):
        return F.embedding(task, self.p["_task_emb.weight"].clone(), max_norm=1.0)

    def encode(self, obs, task):
        return self.mlp("_encoder.state", torch.cat([obs, self.embed(task)], -1), True)

    def next(self, z, action, task):
        return self.mlp("_dynamics", torch.cat([z, self.embed(task), action], -1), True)

    def reward_logits(self, z, action, task):
        return self.mlp("_reward", torch.cat([z, self.embed(task), action], -1), False)

    def reward(self, z, action, task):
        logits = self.reward_logits(z, action, task)
        r = (F.softmax(logits, -1) * torch.linspace(-10, 10, 101, dtype=logits.dtype)).sum(-1)
        return torch.sign(r) * (torch.exp(r.abs()) - 1)


def rollout(model, obs, actions, task):
    """Rewards [H, B] and the last latent state, from raw observations."""
    z, rewards = model.encode(obs, task), []
    for action in actions:
        rewards.append(model.reward(z, action, task))
        z = model.next(z, action, task)
    return torch.stack(rewards), z


def plan(reference, dtype):
    generator = torch.Generator().manual_seed(3)
    actions = torch.rand(HORIZON, 8, 6, generator=generator, dtype=torch.float64).to(dtype) * 2 - 1
    return reference["obs"].to(dtype), actions


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_those_of_tdmpc2s_class(name, reference):
    r, model = reference, load_checkpoint(DATA / f"mt30_tiny_{name}.pt")
    assert (model.config.obs_dim, model.config.action_dim, model.config.num_tasks) == (24, 6, 30)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(model.encode(r["obs"], r["task"]), r["z"], **close)
    torch.testing.assert_close(model.next(r["z"], r["action"], r["task"]), r["next_z"], **close)
    logits = model.reward_logits(r["z"], r["action"], r["task"])
    torch.testing.assert_close(logits, r["reward_logits"], **close)
    torch.testing.assert_close(model.reward(r["z"], r["action"], r["task"]), r["reward"][:, 0], **close)


def test_the_equations_give_the_outputs_of_tdmpc2s_class(reference):
    """So they may stand for it where no output was recorded."""
    r, naive = reference, Naive(torch.float32)
    for given, expected in (
        (naive.encode(r["obs"], r["task"]), r["z"]),
        (naive.next(r["z"], r["action"], r["task"]), r["next_z"]),
        (naive.reward_logits(r["z"], r["action"], r["task"]), r["reward_logits"]),
        (naive.reward(r["z"], r["action"], r["task"]), r["reward"][:, 0]),
    ):
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_sixteen_steps_and_their_gradients_are_those_of_the_equations(name, dtype, reference):
    """Both against the equations in float64; tasks 3 and 7 have embeddings longer than 1."""
    task = torch.tensor([0, 3, 7, 7, 12, 3, 18, 29])
    obs, actions = plan(reference, torch.float64)
    given = [x.clone().requires_grad_() for x in (obs, actions)]
    rewards, z = rollout(Naive(torch.float64), *given, task)
    weights = torch.linspace(0.5, 1.5, rewards.numel(), dtype=torch.float64).view_as(rewards)
    loss = (rewards * weights).sum() + z.square().sum()
    expected = [rewards.detach(), z.detach(), *torch.autograd.grad(loss, given)]

    model = load_checkpoint(DATA / f"mt30_tiny_{name}.pt").to(dtype)
    given = [x.to(dtype).requires_grad_() for x in (obs, actions)]
    rewards, z = rollout(model, *given, task)
    loss = (rewards * weights.to(dtype)).sum() + z.square().sum()
    found = [rewards.detach(), z.detach(), *torch.autograd.grad(loss, given)]
    # our max_norm rule divides by norm + 1e-7 in one rounding, torch's in place in another: 1e-9 in float64
    bound = 1e-8 if dtype == torch.float64 else 1e-5
    for mine, theirs in zip(found, expected):
        assert ((mine.double() - theirs).norm() / theirs.norm()) < bound


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("name", SHAPES["new"])
def test_every_published_size_is_inferred_from_its_shapes(layout, name):
    keys = SHAPES[layout][name]["keys"]
    kept = {
        key.replace("_encoder.state.", "_encoder."): tuple(shape)
        for key, shape in keys.items()
        if key.startswith(("_encoder.", "_dynamics.", "_reward.", "_task_emb."))
    }
    config, published = infer_config(kept), SHAPES["new"][name]
    for ours, theirs in (
        ("obs_dim", "obs_dim"), ("action_dim", "action_dim"), ("task_dim", "task_dim"), ("latent_dim", "latent_dim"),
        ("mlp_dim", "mlp_dim"), ("encoder_dim", "enc_dim"), ("encoder_layers", "num_enc_layers"),
    ):  # fmt: skip
        assert getattr(config, ours) == published[theirs], ours
    assert config.num_tasks == int(name[2:4]) and config.num_bins == 101
    assert size_name(config) == name.split("-")[1] and size_name(config) in SIZES
    with torch.device("meta"):
        assert WorldModel(config).num_parameters == published["pwm_params"]


@pytest.mark.parametrize("layout", SHAPES)
def test_a_file_of_a_published_size_loads(layout, tmp_path):
    """mt30-1M with all its keys and random weights, Q functions and policy included."""
    keys = SHAPES[layout]["mt30-1M"]["keys"]
    state = {key: torch.randn(shape) * 0.05 for key, shape in keys.items()}
    torch.save({"model": state}, tmp_path / "mt30-1M.pt")
    model = load_checkpoint(tmp_path / "mt30-1M.pt")
    assert model.provenance["size"] == "1M" and model.config.reward_symlog
    assert torch.equal(model._dynamics[2].weight, state["_dynamics.2.weight"])
    assert torch.equal(WorldModel.load(tmp_path / "mt30-1M.pt")._encoder[0].weight, model._encoder[0].weight)


class RunningMeanStd:
    """Pickles as PWM's class of that name does."""

    def __init__(self, mean, var):
        self.mean, self.var, self.count, self.shape = mean, var, 1e-4, mean.shape


@pytest.fixture
def pwm_file(tmp_path, monkeypatch):
    """Writes a checkpoint of PWM's single-task form, its class existing only while it is written."""

    def write(num_bins=1, obs_rms=True, rew_rms=True):
        torch.manual_seed(2)
        model = WorldModel(infer_config(pwm_shapes(num_bins)))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
        moments = {
            "obs_rms": RunningMeanStd(torch.randn(11), torch.rand(11) + 0.1) if obs_rms else None,
            "rew_rms": RunningMeanStd(torch.tensor([2.0]), torch.tensor([9.0])) if rew_rms else None,
        }
        name = "pwm.utils.running_mean_std"
        modules = {part: types.ModuleType(part) for part in ("pwm", "pwm.utils", name)}
        modules[name].RunningMeanStd = RunningMeanStd
        with monkeypatch.context() as patch:
            patch.setattr(RunningMeanStd, "__module__", name)
            for part, module in modules.items():
                patch.setitem(sys.modules, part, module)
            parameters = {name: value.detach() for name, value in model.named_parameters()}
            optimiser = torch.optim.Adam(model.parameters()).state_dict()
            torch.save(
                {"actor": {"mu.weight": torch.ones(2)}, "critic": {}, "world_model": parameters, "ret_rms": None}
                | moments
                | {"actor_opt": optimiser, "world_model_opt": optimiser},
                tmp_path / "pwm.pt",
            )
        return tmp_path / "pwm.pt", model, moments

    return write


def pwm_shapes(num_bins: int) -> dict[str, tuple[int, ...]]:
    """Of a single-task world model with encoder [24] and units [32, 32]."""
    shapes = {}
    for name, widths in (
        ("_encoder", (11, 24, 16)), ("_dynamics", (19, 32, 32, 16)), ("_reward", (19, 32, 32, num_bins)),
    ):  # fmt: skip
        for i, (a, b) in enumerate(pairwise(widths)):
            shapes |= {f"{name}.{i}.weight": (b, a), f"{name}.{i}.bias": (b,)}
            if name != "_reward" or i < 2:
                shapes |= {f"{name}.{i}.ln.weight": (b,), f"{name}.{i}.ln.bias": (b,)}
    return shapes


@pytest.mark.parametrize("num_bins", [1, 101])
@pytest.mark.parametrize("obs_rms", [True, False])
@pytest.mark.parametrize("rew_rms", [True, False])
def test_pwm_checkpoints_compute_on_raw_observations_and_rewards(num_bins, obs_rms, rew_rms, pwm_file):
    path, inner, moments = pwm_file(num_bins, obs_rms, rew_rms)
    model = load_checkpoint(path)
    obs, action = torch.randn(6, 11), torch.rand(6, 3)
    x = obs
    if obs_rms:
        x = (obs - moments["obs_rms"].mean) / (moments["obs_rms"].var + 1e-5).sqrt()
    z = inner.encode(x)
    torch.testing.assert_close(model.encode(obs), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.next(z, action), inner.next(z, action), rtol=1e-5, atol=1e-6)
    reward = inner.reward(z, action)  # the head's own units
    if rew_rms:
        reward = reward * (moments["rew_rms"].var + 1e-5).sqrt() + moments["rew_rms"].mean
    torch.testing.assert_close(model.reward(z, action), reward, rtol=1e-5, atol=1e-5)
    assert model.provenance["source"]["layout"] == "pwm" and model.provenance["reward"] == "linear"
    assert "pwm.utils.running_mean_std" not in sys.modules


def test_how_rewards_are_read_can_be_chosen(reference):
    path = DATA / "mt30_tiny_new_layout.pt"
    z, action, task = (reference[name] for name in ("z", "action", "task"))
    linear = load_checkpoint(path, "linear").reward(z, action, task)
    symexp = load_checkpoint(path, "symexp").reward(z, action, task)
    torch.testing.assert_close(torch.sign(linear) * torch.expm1(linear.abs()), symexp)
    with pytest.raises(ValueError, match="reward must be one of symexp, linear, got 'log'"):
        load_checkpoint(path, "log")


def test_half_precision_weights_become_float32(tmp_path):
    state = {name: torch.randn(shape) for name, shape in pwm_shapes(1).items()}
    torch.save({"model": {name: value.bfloat16() for name, value in state.items()}}, tmp_path / "m.pt")
    model = load_checkpoint(tmp_path / "m.pt")
    assert torch.equal(model._reward[2].weight, state["_reward.2.weight"].bfloat16().float())


BAD = {
    "no dynamics": (lambda s: {k: v for k, v in s.items() if "_dynamics" not in k}, "holds no world model of TD-MPC2"),
    "missing layer": (lambda s: {k: v for k, v in s.items() if k != "_dynamics.1.bias"}, "_dynamics.1.bias is missing"),
    "missing head": (lambda s: {k: v for k, v in s.items() if "_reward" not in k}, "a parameter _reward.2.weight"),
    "gap in the encoder": (lambda s: {k.replace("_encoder.1", "_encoder.3"): v for k, v in s.items()}, r"\[0, 3\]"),
    "another layer": (lambda s: s | {"_reward.3.weight": torch.ones(2, 2)}, "_reward.3.weight .* is not wanted"),
    "wrong width": (lambda s: s | {"_reward.1.bias": torch.ones(7)}, r"_reward.1.bias \(7,\), from the others \(32,\)"),
    "latent of 12": (lambda s: s | {"_encoder.1.weight": torch.ones(12, 24)}, "multiple of simnorm_dim 8, got 12"),
    "negative action": (lambda s: s | {"_dynamics.0.weight": torch.ones(32, 9)}, "action_dim must be >= 1, got -7"),
    "NaN": (lambda s: s | {"_reward.1.bias": torch.full((32,), torch.nan)}, "NaN, infinite or whole numbers in _rew"),
    "integers": (lambda s: s | {"_reward.1.bias": torch.ones(32, dtype=torch.int32)}, "NaN, infinite or whole numbers"),
    "no tensor": (lambda s: s | {"_reward.1.bias": "bias"}, "_reward.1.bias is no tensor"),
    "pixels": (lambda s: s | {"_encoder.rgb.2.weight": torch.ones(2, 2)}, "it encodes images"),
    "shared storage": (
        lambda s: s | {"_dynamics.0.weight": torch.ones(1).expand(9000, 19)}, "larger than the whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_world_model_is_refused_with_the_reason(case, tmp_path):
    change, text = BAD[case]
    state = {name: torch.randn(shape) for name, shape in pwm_shapes(1).items()}
    torch.save({"model": change(state)}, tmp_path / "m.pt")
    with pytest.raises(ForeignFileError, match=text) as caught:
        load_checkpoint(tmp_path / "m.pt")
    assert str(tmp_path / "m.pt") in str(caught.value)


def test_extraction_takes_a_converted_model(tmp_path):
    """One task folded into biases computes what the whole model computes."""
    model = load_checkpoint(DATA / "mt30_tiny_new_layout.pt").double()
    frozen = model.frozen(torch.tensor([3]))
    obs = torch.randn(5, 24).double()
    x = obs
    for layer in frozen.encoder:
        x = F.layer_norm(x @ layer.weight.T + layer.bias, layer.ln_weight.shape, layer.ln_weight, layer.ln_bias)
        x = F.mish(x) if layer.activation == "mish" else F.softmax(x.unflatten(-1, (-1, 8)), -1).flatten(-2)
    torch.testing.assert_close(x, model.encode(obs, torch.full((5,), 3)), rtol=1e-9, atol=1e-11)
