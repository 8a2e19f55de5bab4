"""Windows of many tasks out of one store or several: shares, numbers, padding, masks, splits, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pwm_fast.data import task_table
from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError, WindowSampler
from pwm_fast.envs import registry
from pwm_fast.learning.task_windows import TaskData, TaskSpace, TaskWindows, pooled_statistics

TASKS = ("mw-reach", "mw-drawer-open", "cartpole-swingup")
NUMBERS = {row.name: i for i, row in enumerate(task_table.tasks("mt80"))}


def write(path: Path, names: list[str], of: dict[str, int], dims: tuple[int, int], steps: int = 9) -> EpisodeStore:
    """`of` episodes of each task; obs[t] starts with the task's number, its episode's and t, actions are all 0.5."""
    with EpisodeWriter(path, *dims, task_names=names) as writer:
        for name, count in of.items():
            for episode in range(count):
                obs = np.ones((steps + 1, dims[0]), np.float32)
                obs[:, 0], obs[:, 1], obs[:, 2] = NUMBERS[name], episode, np.arange(steps + 1)
                action = np.full((steps, dims[1]), 0.5, np.float32)
                task = names.index(name)
                writer.add(obs, action, np.arange(steps, dtype=np.float32), terminated=False, task=task)
    return EpisodeStore.open(path)


@pytest.fixture
def single(tmp_path: Path) -> list[EpisodeStore]:
    """A store of its own for every task, as `collect` writes them, of very different sizes."""
    counts = (40, 8, 3)
    rows = [registry.get(name) for name in TASKS]
    return [
        write(tmp_path / row.name, [row.name], {row.name: n}, (row.obs_dim, row.action_dim))
        for row, n in zip(rows, counts)
    ]


@pytest.fixture
def joined(tmp_path: Path) -> EpisodeStore:
    """One store of all three, padded, with names in an order of its own."""
    return write(tmp_path / "joined", [TASKS[2], TASKS[0], TASKS[1]], dict(zip(TASKS, (40, 8, 3))), (39, 6))


def data_of(stores: list[EpisodeStore], names: tuple[str, ...] = TASKS, **options: float) -> TaskData:
    return TaskData.of_tasks(stores, [registry.get(name) for name in names], **options)


def check(batch: dict[str, np.ndarray], names: tuple[str, ...], dims: tuple[int, int]) -> None:
    """Each row is what its task's number says, in the task's own widths and zero beyond."""
    assert (batch["obs"].shape[-1], batch["action"].shape[-1]) == dims
    for row, number in enumerate(batch["task"]):
        task = registry.get(task_table.tasks("mt80")[number].name)
        assert task.name in names
        obs, action = batch["obs"][:, row], batch["action"][:, row]
        steps = batch["valid"][:, row].sum()  # what follows is another episode's
        assert (obs[: steps + 1, 0] == number).all() and (action[:, task.action_dim :] == 0).all()
        assert (action[:steps, : task.action_dim] == 0.5).all()
        assert (np.diff(obs[: steps + 1, 2]) == 1).all()


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("kind", ["single", "joined"])
def test_every_task_has_its_share_number_and_width(kind: str, prefetch: bool, single, joined) -> None:
    data = data_of(single if kind == "single" else [joined])
    batches = TaskWindows(data, horizon=4, batch=64, seed=3, prefetch=prefetch)
    counts = np.zeros(80)
    for step in range(40):
        batch = batches(step)
        check(batch, TASKS, (39, 6))
        counts += np.bincount(batch["task"], minlength=80)
    assert set(np.flatnonzero(counts)) == {NUMBERS[name] for name in TASKS}
    # of one store the shares are drawn (5 deviations), of several they are exact to a row of a batch
    deviation = 5 * (2560 * 2 / 9) ** 0.5 if kind == "joined" else 40
    assert np.abs(counts[counts > 0] - 2560 / 3).max() < deviation


@pytest.mark.parametrize("kind", ["single", "joined"])
def test_a_batch_depends_on_seed_and_step_alone(kind: str, single, joined) -> None:
    data = data_of(single if kind == "single" else [joined])
    ahead, plain = (TaskWindows(data, 4, 32, seed=5, prefetch=prefetch) for prefetch in (True, False))
    for step in (0, 1, 2, 3, 9, 10, 2):
        one, other = ahead(step), plain(step)
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert np.array_equal(one[name], value), (name, step)
    assert not np.array_equal(TaskWindows(data, 4, 32, seed=6)(0)["obs"], plain(0)["obs"])


def test_one_task_draws_what_its_store_alone_gives(single) -> None:
    data = data_of(single[:1], TASKS[:1])
    training, held_out = single[0].split(0.05, 0)
    assert np.array_equal(data.parts[0].training, training) and np.array_equal(data.parts[0].held_out, held_out)
    expected = WindowSampler(single[0], 4, training, seed=2, partial=True).windows(7, 16)
    found = TaskWindows(data, 4, 16, seed=2)(7)
    for name in ("obs", "action", "reward", "terminated", "valid"):
        assert np.array_equal(found[name], expected[name]), name


def test_one_task_out_of_a_padded_store_has_its_own_width(joined) -> None:
    data = data_of([joined], ("cartpole-swingup",))
    batch = TaskWindows(data, 4, 16, seed=0)(0)
    assert batch["obs"].shape == (5, 16, 5) and batch["action"].shape == (4, 16, 1)
    assert (batch["obs"][..., 0] == NUMBERS["cartpole-swingup"]).all()


def test_a_task_in_two_stores_has_one_share(single, joined) -> None:
    data = data_of([*single, joined])
    counts = np.zeros(80)
    for step in range(30):
        counts += np.bincount(TaskWindows(data, 4, 96, seed=1)(step)["task"], minlength=80)
    assert np.abs(counts[counts > 0] / counts.sum() - 1 / 3).max() < 0.03


def test_some_of_every_tasks_episodes_are_held_out(single, joined) -> None:
    for stores in (single, [joined]):
        data = data_of(stores, validation_fraction=0.25)
        for part in data.parts:
            both = np.concatenate((part.training, part.held_out))
            assert len(part.held_out) >= 1 and len(part.training) >= 1 and len(np.unique(both)) == len(both)
            assert (part.store.episode_task[both] == part.stored).all()
        train, held = (TaskWindows(data, 2, 64, seed=0, held_out=h) for h in (False, True))
        seen = [{(t, e) for s in range(20) for t, e in zip(w(s)["task"], w(s)["obs"][0, :, 1])} for w in (train, held)]
        assert not seen[0] & seen[1] and {t for t, _ in seen[1]} == {NUMBERS[name] for name in TASKS}


def test_tasks_of_mt30_are_numbered_as_there_others_by_themselves() -> None:
    get = registry.get
    both = TaskSpace.of([get("cheetah-run"), get("walker-run")])
    assert len(both.names) == 30 and (both.obs_dim, both.action_dim) == (24, 6)
    assert both.names.index("walker-run") == 2 and both.action_dims[3] == 6
    wider = TaskSpace.of([get("walker-run"), get("mw-reach")])
    assert len(wider.names) == 80 and (wider.obs_dim, wider.action_dim) == (39, 6)
    own = TaskSpace.of([get("hopper"), get("ant")])
    assert own.names == ("hopper", "ant") and own.action_dims == (3, 8) and (own.obs_dim, own.action_dim) == (37, 8)
    assert TaskSpace.of([get("mw-reach")]) == TaskSpace(("mw-reach",), (4,), 39, 4)


def test_normalisation_weighs_every_task_alike_and_keeps_what_varies_within_one(single, joined) -> None:
    numbers = [NUMBERS[name] for name in TASKS]
    for stores in (single, [joined]):
        data = data_of(stores)
        found = pooled_statistics(data, seed=0)
        mean, std = found["obs_mean"], found["obs_std"]
        assert mean[0] == pytest.approx(np.mean(numbers), rel=1e-6)
        assert std[0] == pytest.approx(0.1 * np.std(numbers), rel=1e-6)  # a constant of every task
        assert std[2] == pytest.approx(np.std(np.arange(9)), rel=0.01)  # what varies in all alike
        episodes = [np.var(part.training) for part in data.parts]
        if stores is single:
            assert std[1] == pytest.approx(np.mean(episodes) ** 0.5, rel=0.02)
        assert mean[30] == pytest.approx(2 / 3 if stores is single else 1)  # cartpole's own store has no such entry
        assert len(found["returns"]) == 51 and found["returns"].max() == 36
        assert found["reward_quantiles"] == {"0.01": 0, "0.99": 8}


def test_what_does_not_fit_is_refused(single, joined, tmp_path: Path) -> None:
    def refused(error: type[Exception], text: str, call: Callable[[], object]) -> None:
        with pytest.raises(error, match=text):
            call()

    refused(StoreError, "has none of mw-reach, mw-drawer-open; it has cartpole-swingup",
            lambda: data_of(single[2:], TASKS[:2]))  # fmt: skip
    refused(StoreError, "no episode of task mw-drawer-open in .*mw-reach: collect some",
            lambda: data_of(single[:1], TASKS[:2]))  # fmt: skip
    refused(ValueError, "5 observations and 1 actions, task mw-reach has 39 and 4: is it another task's",
            lambda: data_of(single[2:], TASKS[:1]))  # fmt: skip
    refused(ValueError, "tasks must be different ones", lambda: data_of(single, (TASKS[0], TASKS[0])))
    refused(ValueError, "each of the 3 stores, got batch size 2", lambda: TaskWindows(data_of(single), 4, 2, seed=0))
    lonely = write(tmp_path / "lonely", ["mw-reach"], {"mw-reach": 1}, (39, 4))
    refused(StoreError, "has 1 episode of mw-reach; a validation split needs at least 2",
            lambda: data_of([lonely], TASKS[:1]))  # fmt: skip
