"""Several tasks in one store: numbers, padding, the account, each task's share of the cap."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pwm_fast.data.collect import Source, check_noise_levels, collect_episodes, noise_level, noise_phase
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.recording import Recording, task_numbers
from pwm_fast.data.task_table import tasks as table
from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import Episode
from pwm_fast.progress import Interrupt

TASKS = [registry.get(name) for name in ("mw-reach", "cartpole-swingup")]


def source(task: registry.Task, length: int = 5) -> Source:
    """Episode n of a task: observations n + 1, actions 0.5, rewards n; odd ones are of another phase."""

    def batch(first: int, count: int) -> Iterator[tuple[str, Episode]]:
        for n in range(first, first + count):
            obs = np.full((length + 1, task.obs_dim), n + 1, np.float32)
            action = np.full((length, task.action_dim), 0.5, np.float32)
            yield ("odd" if n % 2 else "even"), Episode(obs, action, np.full(length, n, np.float32), False)

    return Source(task, "made up", batch)


def collect(path: Path, episodes: int, resume: bool = False, **options) -> EpisodeStore:
    settings = {"options": {"task": ["mw-reach", "cartpole-swingup"], "noise": [0.0, 1.0]}, "batch": 2} | options
    collect_episodes(path, [source(task) for task in TASKS], episodes=episodes, resume=resume, **settings)
    return EpisodeStore.open(path)


def test_tasks_have_the_numbers_of_their_set():
    names, numbers = task_numbers(TASKS)
    assert names == [task.name for task in table("mt80")]
    assert numbers == {"mw-reach": names.index("mw-reach"), "cartpole-swingup": names.index("cartpole-swingup")}
    names, numbers = task_numbers([registry.get("walker-run"), registry.get("cup-spin")])
    assert len(names) == 30 and numbers == {"walker-run": 2, "cup-spin": 28}
    assert task_numbers([TASKS[1]]) == (["cartpole-swingup"], {"cartpole-swingup": 0})
    mixed = [registry.get("hopper"), TASKS[0]]
    assert task_numbers(mixed) == (["hopper", "mw-reach"], {"hopper": 0, "mw-reach": 1})


def test_observations_and_actions_are_padded_to_the_widest(tmp_path: Path):
    store = collect(tmp_path / "store", 3)
    assert (store.obs_dim, store.action_dim, store.num_episodes) == (39, 4, 6)
    narrow = store.episode(3)
    assert store.task_names[int(narrow["task"])] == "cartpole-swingup"
    assert (narrow["obs"][:, :5] == 1).all() and (narrow["obs"][:, 5:] == 0).all()
    assert (narrow["action"][:, :1] == 0.5).all() and (narrow["action"][:, 1:] == 0).all()
    assert (store.episode(2)["obs"] == 3).all(), "the widest task fills its rows"


def test_the_account_tells_phases_of_tasks_and_of_every_episode(tmp_path: Path):
    store = collect(tmp_path / "store", 3)
    notes = store.meta["collect"]
    rows = {row["phase"]: row for row in notes["mixture"]}
    assert list(rows) == [f"{task.name}: {phase}" for task in TASKS for phase in ("even", "odd")]
    assert rows["mw-reach: even"]["episodes"] == 2 and rows["mw-reach: even"]["return_mean"] == 5.0
    assert notes["order"][:3] == [["mw-reach: even", 1], ["mw-reach: odd", 1], ["mw-reach: even", 1]]
    assert sum(count for _, count in notes["order"]) == store.num_episodes


def test_a_stopped_collection_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped by a signal in the middle of the first task."""
    from pwm_fast.errors import Interrupted

    whole = collect(tmp_path / "whole", 6)
    signals = iter([False, True, True, True, True])
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__bool__", lambda self: next(signals))
        patch.setattr(Interrupt, "raise_if_set", lambda self, text: (_ for _ in ()).throw(Interrupted(text)))
        with pytest.raises(Interrupted, match="4 of 12 episodes are saved"):
            collect(tmp_path / "parts", 6)
    assert EpisodeStore.open(tmp_path / "parts").num_episodes == 4
    parts = collect(tmp_path / "parts", 6, resume=True)
    for name in ("obs", "action", "reward", "task"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    for name in ("mixture", "order", "episodes_done"):
        assert parts.meta["collect"][name] == whole.meta["collect"][name]


def test_each_task_has_its_share_of_the_cap(tmp_path: Path):
    store = collect(tmp_path / "store", 50, max_transitions=40)
    counts = [int((store.episode_task == store.task_names.index(task.name)).sum()) for task in TASKS]
    assert counts == [4, 4]


def test_other_options_are_refused(tmp_path: Path):
    collect(tmp_path / "store", 2)
    with pytest.raises(ValueError, match=r"begun with noise \[0.0, 1.0\], got \[0.5\]"):
        collect(tmp_path / "store", 4, resume=True, options={"noise": [0.5]})
    with pytest.raises(ValueError, match="tasks must differ"):
        Recording(tmp_path / "other", [TASKS[0], TASKS[0]], max_transitions=10)


def test_noise_levels_come_in_pairs():
    assert [noise_level((0.0, 0.5, 1.0), n) for n in range(8)] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 0.0, 0.0]
    assert (noise_phase("expert", 0.25), noise_phase("expert", 1.0)) == ("expert, noise 0.25", "random actions")
    for levels in ([], [0.5, 1.5], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match=r"from 0 \(no noise\) to 1"):
            check_noise_levels(levels)
