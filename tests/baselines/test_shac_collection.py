"""The collect command with SHAC: the store holds what the simulator does, and survives kills, Ctrl-C and full disks."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pwm_fast.baselines import shac_collection
from pwm_fast.baselines.shac import SHACConfig
from pwm_fast.baselines.shac_collection import RUN, CollectionSummary, collect_shac
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.layout import COLUMNS
from pwm_fast.data.recording import Recording
from pwm_fast.envs.dflex import DifferentiableEnv

SMALL = SHACConfig(num_envs=4, horizon=16, actor_units=(16,), critic_units=(16,), critic_epochs=2)
CHECKPOINT, POLICY = f"{RUN}/checkpoint.safetensors", f"{RUN}/policy.safetensors"
COLLECT = ["--task", "hopper", "--num-envs", "4", "--steps", "1500", "--episodes", "8", "--threads", "1"]
COLLECT += ["--evaluation-episodes", "16"]
OPTIONS = {"threads": 1, "best_episodes": 8, "evaluation_episodes": 16}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """The ant's data: a task whose observation shows the last action."""
    path = tmp_path_factory.mktemp("collection") / "ant"
    collect_shac("ant", path, steps=1280, config=SMALL, seed=5, **OPTIONS)
    return EpisodeStore.open(path)


def ant_state(obs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """joint_q, joint_qd of observations [N, 37], at x = z = 0: where it is does not change how it moves."""
    o = torch.from_numpy(obs)
    position = torch.zeros(len(o), 3)
    position[:, 1] = o[:, 0]
    omega, velocity = o[:, 8:11], o[:, 5:8]
    twist = velocity - torch.linalg.cross(omega, position)
    return torch.cat([position, o[:, 1:5], o[:, 11:19]], -1), torch.cat([omega, twist, 10 * o[:, 19:27]], -1)


def test_the_store_matches_a_replay_of_its_actions(store: EpisodeStore):
    episodes = [store.episode(i) for i in range(store.num_episodes)]
    steps = 12
    longer = [episode for episode in episodes if len(episode["reward"]) > steps]
    assert len(longer) > 30
    env = DifferentiableEnv("ant", len(longer), threads=1, action_in_obs=True)
    env.set_state(*ant_state(np.stack([episode["obs"][0] for episode in longer])))
    with torch.no_grad():
        for t in range(steps):
            action = torch.from_numpy(np.stack([episode["action"][t] for episode in longer]))
            _, reward, _, _, info = env.step(action)
            expected = np.stack([episode["obs"][t + 1] for episode in longer])
            # rates are up to 20 rad/s; float32 noise in the start state grows along the way
            np.testing.assert_allclose(info["final_obs"].numpy(), expected, atol=0.02)
            assert np.median(np.abs(info["final_obs"].numpy() - expected)) < 1e-4
            np.testing.assert_array_equal(info["final_obs"].numpy()[:, -8:], expected[:, -8:])
            np.testing.assert_allclose(reward.numpy(), [episode["reward"][t] for episode in longer], atol=0.02)


def test_episodes_begin_and_end_as_the_task_says(store: EpisodeStore):
    notes = store.meta["collect"]
    unfinished = sum(row["episodes"] for row in notes["mixture"] if "cut off" in row["phase"])
    assert unfinished == SMALL.num_envs
    odd = 0
    for i in range(store.num_episodes):
        episode = store.episode(i)
        np.testing.assert_array_equal(episode["obs"][0, -8:], 0.0)
        np.testing.assert_array_equal(episode["obs"][1:, -8:], episode["action"])
        fell = episode["obs"][-1, 0] < 0.27
        assert bool(episode["terminated"][-1]) == fell and not episode["terminated"][:-1].any()
        odd += not fell and len(episode["reward"]) < 1000
    assert odd <= unfinished


def test_the_notes_account_for_the_store(store: EpisodeStore):
    notes = store.meta["collect"]
    mixture = {row["phase"]: row for row in notes["mixture"]}
    assert sum(row["episodes"] for row in mixture.values()) == store.num_episodes
    assert sum(row["transitions"] for row in mixture.values()) == store.num_transitions
    assert {"random actions", "training 90-100%", "best policy, noise 0.4"} <= set(mixture)
    assert (notes["task"], notes["policy"], notes["seed"], notes["env_steps"]) == ("ant", "shac", 5, 1280)
    assert notes["finished"] and "torch" in notes["versions"] and SHACConfig.from_json(notes["config"]) == SMALL
    best = mixture["best policy, noise 0"]
    assert notes["best_return"] == pytest.approx(best["return_mean"], rel=1e-5)
    assert CollectionSummary.read(store.path).best_return == notes["best_return"]
    store.verify()


def test_the_cap_holds_and_keeps_all_phases(tmp_path: Path):
    collect_shac("hopper", tmp_path / "store", steps=3200, config=SMALL, max_transitions=5000, **OPTIONS)
    store = EpisodeStore.open(tmp_path / "store")
    assert 3000 < store.num_transitions <= 5000
    phases = [row["phase"] for row in store.meta["collect"]["mixture"]]
    assert sum(phase.startswith("training") for phase in phases) > 5 and "best policy, noise 0.4" in phases


def test_a_finished_run_is_left_alone_and_a_larger_budget_goes_on(tmp_path: Path):
    options = {"config": SMALL, **OPTIONS}
    collect_shac("hopper", tmp_path / "store", steps=640, **options)
    before = (tmp_path / "store" / "meta.json").read_bytes()
    summary = collect_shac("hopper", tmp_path / "store", steps=640, resume=True, **options)
    assert summary.env_steps == 640 and (tmp_path / "store" / "meta.json").read_bytes() == before
    summary = collect_shac("hopper", tmp_path / "store", steps=1280, resume=True, **options)
    store = EpisodeStore.open(tmp_path / "store")
    store.verify()
    assert summary.env_steps == store.meta["collect"]["env_steps"] == 1280
    assert sum(row["episodes"] for row in store.meta["collect"]["mixture"]) == store.num_episodes


def start(out: Path, environment: dict[str, str], *more: str, limit: int = 0) -> subprocess.Popen:
    """The command in a process of its own, with a limit on the size of its files if wanted."""
    program = [sys.executable, "-m", "pwm_fast.collect"]
    if limit:
        code = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "
        program = [
            sys.executable,
            "-c",
            code.format(limit) + "runpy.run_module('pwm_fast.collect', run_name='__main__', alter_sys=True)",
        ]
    arguments = [*COLLECT, "--out", str(out), "--checkpoint-minutes", "1e-6", *more]
    return subprocess.Popen(
        [*program, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def contents(path: Path) -> dict[str, bytes]:
    """What must not depend on interruptions: the data and the policy."""
    return {name: (path / name).read_bytes() for name in [*(column.file for column in COLUMNS.values()), POLICY]}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / "store"
    with torch.random.fork_rng(devices=[]):
        collect_shac("hopper", path, steps=1500, config=SHACConfig(num_envs=4), **OPTIONS)
    return contents(path)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
def test_an_interrupted_run_resumes_exactly(how: signal.Signals, uninterrupted, command_environment, tmp_path: Path):
    out = tmp_path / "store"
    process = start(out, command_environment)
    while process.poll() is None and not (out / CHECKPOINT).exists():
        time.sleep(0.01)
    time.sleep(0.3)  # some iterations later
    process.send_signal(how)
    _, error = process.communicate(timeout=240)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in error
        assert "episodes are saved" in error and error.rstrip().endswith("--resume")
    else:
        assert process.returncode == -signal.SIGKILL
    EpisodeStore.open(out).verify()
    resumed = start(out, command_environment, "--resume")
    shown, error = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, error
    assert "best policy, noise 0.4" in shown
    assert contents(out) == uninterrupted


def test_a_store_ahead_of_its_checkpoint_is_taken_back(uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed between the two: the store has committed, the checkpoint is still the one before."""
    out, options = tmp_path / "store", {"config": SHACConfig(num_envs=4), **OPTIONS}
    commit, commits = Recording.commit, []

    def dies(recording: Recording) -> None:
        commit(recording)
        commits.append(recording.writer.num_episodes)
        if len(commits) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recording, "commit", dies)
    with pytest.raises(KeyboardInterrupt):
        collect_shac("hopper", out, steps=1500, checkpoint_seconds=0.0, **options)
    monkeypatch.undo()
    assert EpisodeStore.open(out).num_episodes == commits[-1] > commits[-2]
    collect_shac("hopper", out, steps=1500, resume=True, **options)
    assert contents(out) == uninterrupted


def test_a_run_killed_before_its_first_checkpoint_resumes(uninterrupted, tmp_path: Path, monkeypatch):
    out, options = tmp_path / "store", {"config": SHACConfig(num_envs=4), **OPTIONS}

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shac_collection, "RunFolder", dies)
    with pytest.raises(KeyboardInterrupt):
        collect_shac("hopper", out, steps=1500, **options)
    monkeypatch.undo()
    assert EpisodeStore.open(out).num_episodes == OPTIONS["evaluation_episodes"] and not (out / RUN).exists()
    collect_shac("hopper", out, steps=1500, resume=True, **options)
    assert contents(out) == uninterrupted


@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_a_full_disk_loses_nothing(limit: int, uninterrupted, command_environment, tmp_path: Path):
    """At the first limit the random episodes do not fit, at the second the training's do not."""
    out = tmp_path / "store"
    process = start(out, command_environment, limit=limit)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 2, error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: cannot write ") and "File too large" in last and "Traceback" not in error
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.glob(".*"))
    if limit < 100_000:
        assert not out.exists()
        return
    EpisodeStore.open(out).verify()
    resumed = start(out, command_environment, "--resume")
    _, error = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, error
    assert contents(out) == uninterrupted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "hoper"], "did you mean 'hopper'"),
        (["--task", "hopper", "--minutes", "0"], "minutes must be > 0"),
        (["--task", "hopper", "--max-transitions", "-1"], "max_transitions must be > 0"),
        (["--task", "hopper", "--policy", "random", "--minutes", "3"], "--minutes is for shac and sac"),
        (["--task", "hopper", "--policy", "nowhere"], "nowhere holds no policy"),
        (["--task", "hopper", "--resume"], "nothing to resume"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, call, capsys, tmp_path: Path):
    assert call("collect", *arguments, "--out", tmp_path / "store") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_another_run_is_kept(store: EpisodeStore, call, capsys):
    path = Path(store.path)
    before = json.loads((path / "meta.json").read_text())
    assert call("collect", "--task", "ant", "--steps", "5", "--out", path) == 2
    assert "--resume" in capsys.readouterr().err
    assert call("collect", "--task", "ant", "--steps", "5000", "--seed", "6", "--out", path, "--resume") == 2
    assert "--seed 5, got 6" in capsys.readouterr().err
    assert json.loads((path / "meta.json").read_text()) == before


def test_a_saved_policy_makes_data(store: EpisodeStore, call, capsys, tmp_path: Path):
    given = ["--policy", Path(store.path) / RUN, "--out", tmp_path / "more", "--episodes", "4", "--noise", "0.1"]
    assert call("collect", "--task", "hopper", *given) == 2
    assert "37 observations" in capsys.readouterr().err
    assert call("collect", "--task", "ant", *given) == 0
    assert EpisodeStore.open(tmp_path / "more").num_episodes == 4
    assert "noise 0.1" in capsys.readouterr().out
