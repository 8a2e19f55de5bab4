"""`python -m pwm_fast.convert`: what it makes, shows and refuses. What is converted exactly is tested in the library's
tests (tests/data_store, tests/models)."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.models.world_model import WorldModel

DATA = Path(__file__).parent / "data" / "tdmpc2"
CHUNK = DATA / "mt30_mini_chunk_0_tensordict020.pt"
MODEL = DATA / "mt30_tiny_old_layout_with_omegaconf.pt"


@pytest.fixture
def refused(call, capsys):
    """Run a conversion that must refuse; returns its one-line error."""

    def run(*arguments: object) -> str:
        code = call("convert", *arguments)
        shown = capsys.readouterr()
        error = shown.err.strip().splitlines()
        assert code == 2 and len(error) == 1 and error[0].startswith("error: "), shown.err
        return error[0]

    return run


def test_episodes_are_converted_with_progress_and_a_summary(tmp_path, call, capsys):
    assert call("convert", CHUNK, tmp_path / "s", "--tasks", "walker-walk", "reacher-three-easy") == 0
    shown = capsys.readouterr().out
    assert "step 12/12" in shown and "transitions 4,000" in shown
    assert "8 episodes, 4,000 transitions" in shown
    row = next(line for line in shown.splitlines() if "reacher-three-easy" in line)
    assert "181" in row and "pendulum-swingup" not in shown
    assert EpisodeStore.open(tmp_path / "s").meta["convert"]["tasks"] == ["walker-walk", "reacher-three-easy"]


def test_a_conversion_of_a_finished_store_says_what_is_there(tmp_path, call, capsys):
    assert call("convert", CHUNK, tmp_path / "s") == 0
    capsys.readouterr()
    assert call("convert", CHUNK, tmp_path / "s", "--resume") == 0
    assert "12 episodes, 6,000 transitions" in capsys.readouterr().out


def test_episodes_that_are_left_out_are_told(tmp_path, call, capsys):
    reward = np.zeros((3, 6))
    reward[1, 4] = np.inf
    np.savez(tmp_path / "walk.npz", obs=np.zeros((3, 7, 2)), action=np.zeros((3, 6, 1)), reward=reward)
    assert call("convert", tmp_path / "walk.npz", tmp_path / "s", "--task", "stroll") == 0
    shown = capsys.readouterr().out
    assert "left out: 1 episodes with NaN or infinite numbers" in shown and "stroll" in shown


def test_a_checkpoint_becomes_safetensors_and_json(tmp_path, call, capsys):
    assert call("convert", MODEL, tmp_path / "m.safetensors") == 0
    shown = capsys.readouterr().out
    assert "tdmpc2 (first release) checkpoint" in shown and "30 tasks" in shown and "rewards read as symexp" in shown
    model, direct = WorldModel.load(tmp_path / "m.safetensors"), WorldModel.load(MODEL)
    assert model.config == direct.config and model.provenance["source"]["file"] == MODEL.name
    for name, value in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    described = json.loads((tmp_path / "m.json").read_text())
    assert described["config"]["latent_dim"] == 32 and described["provenance"] == model.provenance
    assert call("convert", MODEL, tmp_path / "linear.safetensors", "--reward", "linear") == 0
    assert not WorldModel.load(tmp_path / "linear.safetensors").config.reward_symlog


def test_our_model_becomes_a_checkpoint_of_tdmpc2(tmp_path, call, capsys):
    assert call("convert", MODEL, tmp_path / "m.safetensors") == 0
    assert call("convert", tmp_path / "m.safetensors", tmp_path / "m.pt", "--num-q", "2") == 0
    assert "Q functions and policy prior are untrained" in capsys.readouterr().out
    theirs = torch.load(DATA / "mt30_tiny_new_layout_tensordict083.pt", weights_only=True)["model"]
    ours = torch.load(tmp_path / "m.pt", weights_only=True)["model"]
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["_action_masks"], theirs["_action_masks"])
    assert torch.equal(ours["_encoder.state.1.weight"], theirs["_encoder.state.1.weight"])
    assert json.loads((tmp_path / "m.pt.json").read_text())["settings"]["num_q"] == 2


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "empty", "text", "truncated", "pickle", "other object", "policy"]
)
def test_bad_sources_are_refused_with_their_name(kind, refused, tmp_path, tiny_policies):
    source = tmp_path / "source.pt"
    if kind == "folder":
        source.mkdir()
    elif kind == "other object":
        torch.save([1, 2], source)
    elif kind == "policy":
        source = tiny_policies[0].save(tmp_path / "policy")
        source = source if source.is_file() else source / "policy.safetensors"
    elif kind != "missing":
        content = {"empty": b"", "text": b"my weights", "truncated": MODEL.read_bytes()[:-999],
                   "pickle": b"\x80\x04cposix\nsystem\n(S'touch hacked'\ntR."}  # fmt: skip
        source.write_bytes(content[kind])
    destination = tmp_path / ("d.pt" if kind == "policy" else "d.safetensors")
    assert str(source) in refused(source, destination)
    assert not destination.exists() and not Path("hacked").exists()


def test_a_damaged_model_is_refused_and_leaves_nothing(refused, tmp_path):
    content = bytearray(MODEL.read_bytes())
    content[100_000] ^= 16
    (tmp_path / "m.pt").write_bytes(content)
    assert "fails its checksum" in refused(tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_destinations_are_checked(refused, tmp_path, call):
    assert "DST must end in .safetensors for a world model" in refused(MODEL, tmp_path / "model")
    (tmp_path / "m.json").write_text("mine")
    assert "m.json exists already" in refused(MODEL, tmp_path / "m.safetensors")
    (tmp_path / "n.safetensors").write_text("mine")
    assert "n.safetensors exists already" in refused(MODEL, tmp_path / "n.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    assert "go on with it by --resume" in refused(CHUNK, tmp_path / "full")
    assert "nothing to resume" in refused(CHUNK, tmp_path / "none", "--resume")
    assert "cannot write episode store" in refused(CHUNK, tmp_path / "m.json" / "s")
    assert "cannot write" in refused(MODEL, "/proc/nowhere.safetensors")
    assert (tmp_path / "m.json").read_text() == "mine" and (tmp_path / "n.safetensors").read_text() == "mine"


def test_wrong_choices_are_refused(refused, tmp_path):
    assert "did you mean 'walker-walk'?" in refused(CHUNK, tmp_path / "s", "--tasks", "walker-wlak")
    assert "num_q must be > 0" in refused(CHUNK, tmp_path / "s", "--num-q", "0")
    assert not (tmp_path / "s").exists()


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
sys.argv = ["convert", *sys.argv[1:]]
runpy.run_module("pwm_fast.convert", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("kind", ["model", "episodes", "export"])
def test_a_full_disk_leaves_nothing_half_written(kind, tmp_path, command_environment, tmp_path_factory):
    """No file may grow past 40 kB."""
    source, destination = CHUNK if kind == "episodes" else MODEL, tmp_path / "d.safetensors"
    if kind == "export":
        source, destination = tmp_path_factory.mktemp("model") / "m.safetensors", tmp_path / "d.pt"
        WorldModel.load(MODEL).save(source)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(source), str(destination)],
        env=command_environment, capture_output=True, text=True,
    )  # fmt: skip
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and error.startswith("error: cannot write ") and "File too large" in error
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_ctrl_c_leaves_a_store_that_resumes(tmp_path, command_environment):
    """The signal comes with the first commit, long before the end."""
    reward = np.random.default_rng(0).normal(size=(4000, 50))
    np.savez(tmp_path / "walk.npz", obs=np.zeros((4000, 51, 2)), action=np.zeros((4000, 50, 1)), reward=reward)
    program = """
import os, signal, sys
from pwm_fast import convert
from pwm_fast.data import conversion
conversion.COMMIT_SECONDS = conversion.convert_episodes.__kwdefaults__["commit_seconds"] = 0.0
commit = conversion.EpisodeWriter.commit
def interrupted(self):
    commit(self)
    conversion.EpisodeWriter.commit = commit
    os.kill(os.getpid(), signal.SIGINT)
conversion.EpisodeWriter.commit = interrupted
sys.exit(convert.run_command(convert.Options, convert.main, "pwm_fast.convert"))
"""
    arguments = [str(tmp_path / "walk.npz"), str(tmp_path / "s")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=command_environment, capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr.strip().endswith(f"resume with: {shown(arguments)} --resume")
    assert 0 < EpisodeStore.open(tmp_path / "s").num_episodes < 4000
    again = [sys.executable, "-m", "pwm_fast.convert", *arguments, "--resume"]
    assert subprocess.run(again, env=command_environment, capture_output=True).returncode == 0
    store = EpisodeStore.open(tmp_path / "s")
    store.verify()
    returns = store.statistics()["returns"]
    assert np.allclose(returns, reward.astype("f4").sum(1, dtype=np.float64))


def shown(arguments: list[str]) -> str:
    return " ".join(["python", "-m", "pwm_fast.convert", *arguments])
