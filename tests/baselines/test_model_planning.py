"""Planning for a task of the registry out of files: padding, task numbers, guides, and data made so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pwm_fast.baselines.guides import ActorGuide, QGuide
from pwm_fast.baselines.model_planning import ModelPlanner, default_planning, find_guide, model_source
from pwm_fast.baselines.mppi import MPPIConfig, with_samples
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.envs import registry
from pwm_fast.learning.extraction import Extraction, ExtractionConfig
from pwm_fast.learning.members import task_number
from pwm_fast.models.world_model import WorldModel, WorldModelConfig
from pwm_fast.state_files import save_state

TINY_MT30 = Path(__file__).parent.parent / "data" / "tdmpc2" / "mt30_tiny_new_layout.pt"
PENDULUM, HOPPER = registry.get("pendulum-swingup"), registry.get("hopper")
TINY = MPPIConfig(horizon=2, samples=6, elites=3, iterations=1, policy_trajectories=2)


def test_a_tasks_number_is_its_row_in_the_embedding(tiny_world_model: Path):
    published = WorldModel.load(TINY_MT30)
    assert task_number(published, PENDULUM) == 7
    assert task_number(WorldModel.load(tiny_world_model), HOPPER) is None
    own = WorldModel(WorldModelConfig(39, 6, 16, 16, 16, 2, num_tasks=80, task_dim=4), {"tasks": {"cup-spin": 2}})
    assert task_number(own, registry.get("cup-spin")) == 2
    with pytest.raises(ValueError, match=r"unknown task 'cup-catch'.*was trained on 1"):
        task_number(own, registry.get("cup-catch"))
    with pytest.raises(ValueError, match="has 24 observations and 6 actions, task mw-reach has 39 and 4"):
        task_number(published, registry.get("mw-reach"))


def test_a_published_model_plans_with_its_own_heads():
    """Rows of 3 padded to 24 and one action of 6 come to the planner's own answer for padded rows of task 7."""
    model = WorldModel.load(TINY_MT30)
    make = find_guide(TINY_MT30, model)
    assert make is not None and isinstance(make(torch.tensor([7]), None), QGuide)
    planner = ModelPlanner(PENDULUM, model, make, TINY, seed=3)
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    action = planner(obs)
    assert action.shape == (4, 1) and (np.abs(action) <= 1).all() and len(np.unique(action)) > 1
    wide = replace(registry.get("walker-stand"), name=PENDULUM.name, episode_length=PENDULUM.episode_length)
    masked = ModelPlanner(wide, model, lambda index, mask: make(index, planner._mask), TINY, seed=3)
    masked._mask = planner._mask
    np.testing.assert_array_equal(masked(np.pad(obs, ((0, 0), (0, 21))))[:, :1], action)


@pytest.fixture
def run(tmp_path: Path, tiny_world_model: Path) -> tuple[Path, Extraction]:
    """What a run of two seeds leaves; the second one is the better."""
    config = ExtractionConfig(actor_units=(16,), critic_units=(16,))
    ext = Extraction(WorldModel.load(tiny_world_model), config, seeds=[3, 4], tasks=["hopper", "hopper"])
    ext.policies()[1].save(tmp_path)
    rounds = {"best_return": np.array([1.0, 2.0]), "extraction": ext.state_dict()}
    save_state(tmp_path / "checkpoint.safetensors", {"rounds": rounds})
    return tmp_path, ext


def test_a_run_guides_with_its_best_actor_and_critics(run: tuple[Path, Extraction], tiny_world_model: Path):
    folder, ext = run
    model = WorldModel.load(tiny_world_model)
    make = find_guide(tiny_world_model, model, folder)
    assert make is not None
    found, exact = make(None, None), ActorGuide.of_extraction(ext, 1)
    z = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(0))
    for name in ("action", "value"):
        values = [getattr(guide, name)(z, torch.Generator().manual_seed(1)) for guide in (found, exact)]
        torch.testing.assert_close(*values, rtol=0, atol=0)
    (folder / "checkpoint.safetensors").unlink()
    without = find_guide(tiny_world_model, model, folder)
    assert without is not None
    assert (without(None, None).value(z, torch.Generator()) == 0).all(), "a policy alone knows no values"
    other = WorldModel(WorldModelConfig(11, 3, 24, 32, 32, 2))
    with pytest.raises(ValueError, match="a policy of 16 latents and 3 actions; the world model has 24 and 3"):
        find_guide(tiny_world_model, other, folder)


def test_without_a_guide_plans_are_longer(tiny_world_model: Path):
    assert find_guide(tiny_world_model, WorldModel.load(tiny_world_model)) is None
    assert default_planning(HOPPER, guided=True) == MPPIConfig()
    unguided = default_planning(HOPPER, guided=False)
    assert (unguided.horizon, unguided.policy_trajectories) == (16, 0)
    smaller = with_samples(MPPIConfig(), samples=64, horizon=5)
    assert (smaller.samples, smaller.elites, smaller.policy_trajectories, smaller.horizon) == (64, 8, 3, 5)


def test_recorded_planning_does_not_depend_on_what_came_before(tiny_world_model: Path):
    """A batch is a function of its episodes' numbers; its noisy half is of another phase."""
    model = WorldModel.load(tiny_world_model)
    source = model_source(HOPPER, model, 5, (0.0, 1.0), config=replace(TINY, policy_trajectories=0), threads=1)
    first, again = (list(source.batch(2, 4)) for _ in range(2))
    assert [phase for phase, _ in first] == ["random actions"] * 2 + ["planning in the world model, noise 0"] * 2
    for (_, one), (_, two) in zip(first, again):
        np.testing.assert_array_equal(one.action, two.action)
        np.testing.assert_array_equal(one.obs, two.obs)


def test_the_command_records_planning(tiny_world_model: Path, run: tuple[Path, Extraction], call, tmp_path: Path):
    out = tmp_path / "store"
    arguments = ["--task", "hopper", "--policy", "planning", "--world-model", tiny_world_model, "--guide", run[0]]
    arguments += ["--samples", 24, "--episodes", 4, "--num-envs", 2, "--noise-levels", 0, 0.5, "--threads", 1]
    assert call("collect", *arguments, "--out", out) == 0
    store = EpisodeStore.open(out)
    notes = store.meta["collect"]
    assert store.num_episodes == 4 and notes["noise_levels"] == [0.0, 0.5] and notes["samples"] == 24
    assert [phase for phase, _ in notes["order"]] == [f"planning in the world model, noise {n}" for n in ("0", "0.5")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "mw-reach", "--policy", "planning"], "use --policy expert, or plan in a world model"),
        (["--task", "cartpole-swingup", "--policy", "expert"], "make its data with --policy sac"),
        (["--task", "cartpole-swingup"], "--policy shac is for one dflex task, got cartpole-swingup; use --policy sac"),
        (["--task", "hopper", "--policy", "sac"], "use --policy shac"),
        (["--task", "hopper", "--policy", "random", "--horizon", "4"], "--horizon is for planning"),
        (["--task", "hopper", "--policy", "random", "--sac.gamma", "0.9"], "--sac is for sac"),
        (["--task", "cup-spin", "--policy", "planning", "--guide", "x"], "give --world-model too"),
        (["--task", "cup-spin", "--policy", "planning", "--world-model", "no.pt"], "no.pt does not exist"),
        (["--task", "mw-reach", "mw-reach", "--policy", "expert"], "tasks must differ"),
        (["--task", "--policy", "random"], "must name at least one task"),
        (["--task", "hopper", "ant", "--policy", "random", "random", "sac"], "one for each, got 3 policies"),
        (["--task", "mw-reach", "hopper", "--policy", "expert", "sac", "--steps", "9"], "use --policy shac"),
    ],
)
def test_what_cannot_be_is_refused_with_the_mend(arguments: list[str], message: str, call, capsys, tmp_path: Path):
    assert call("collect", *arguments, "--out", tmp_path / "store") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
