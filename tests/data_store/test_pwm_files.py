"""PWM's single-task data: rows that were arrived at, cut where an episode ended."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pwm_fast.data.conversion import convert_episodes, episode_sources
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.foreign_episodes import arriving_rows
from pwm_fast.data.pwm_files import DflexData, task_of
from pwm_fast.data.stored_zip import ForeignFileError

N, T, S, A = 4, 9, 5, 2


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    """Whole sequences, one that ends at row 6 with padding after it, one whose successor begins there."""
    obs = torch.arange(float(N * T * S)).view(N, T, S)
    data = {
        "obs": obs,
        "action": -obs[..., :A] / 100,
        "reward": obs[..., 0] / 10,
        "term": torch.zeros(N, T, dtype=torch.bool),
    }
    data["action"][:, 0], data["reward"][:, 0] = torch.nan, torch.nan
    data["term"][:, 0] = True  # row 0's is as meaningless as the rest of it
    data["term"][1, 6] = data["term"][2, 6] = True
    for name in ("obs", "action", "reward"):
        data[name][1, 7:] = torch.nan
    data["action"][2, 7], data["reward"][2, 7] = torch.nan, torch.nan
    return data


def test_episodes_are_cut_where_they_ended(rows, tmp_path):
    torch.save(rows, tmp_path / "ep_data_HopperEnv.pt")
    convert_episodes(episode_sources(tmp_path / "ep_data_HopperEnv.pt"), tmp_path / "s")
    store = EpisodeStore.open(tmp_path / "s")
    assert store.task_names == ["hopper"] and store.meta["convert"]["left_out"] == 0
    assert store.lengths.tolist() == [8, 6, 6, 1, 8]
    assert [bool(store.episode(i)["terminated"][-1]) for i in range(5)] == [False, True, True, False, False]
    for i, (n, first, stop) in enumerate([(0, 0, 9), (1, 0, 7), (2, 0, 7), (2, 7, 9), (3, 0, 9)]):
        episode = store.episode(i)
        assert np.array_equal(episode["obs"], rows["obs"][n, first:stop])
        assert np.array_equal(episode["action"], rows["action"][n, first + 1 : stop])
        assert np.array_equal(episode["reward"], rows["reward"][n, first + 1 : stop])


def test_nan_inside_an_episode_is_no_padding():
    obs = np.zeros((6, 2))
    obs[2] = np.nan
    (episode,) = arriving_rows(obs, np.zeros((6, 1)), np.zeros(6), np.zeros(6, bool), 0)
    assert len(episode.obs) == 6, "it stays, to be left out and counted"


def test_the_task_comes_from_the_files_name_or_is_given(rows, tmp_path):
    assert task_of(Path("ep_data_SNUHumanoidEnv.pt")) == "snu-humanoid"
    assert task_of(Path("ep_data_AntEnv_2.pt")) == "ant" and task_of(Path("data.pt")) is None
    torch.save(rows, tmp_path / "data.pt")
    with pytest.raises(ValueError, match=r"data\.pt does not tell its task .* give --task NAME"):
        DflexData(tmp_path / "data.pt")
    assert DflexData(tmp_path / "data.pt", "hopper").task_names == ["hopper"]


def test_without_term_sequences_are_whole(rows, tmp_path):
    del rows["term"]
    torch.save(rows, tmp_path / "ep_data_AntEnv.pt")
    convert_episodes(episode_sources(tmp_path / "ep_data_AntEnv.pt"), tmp_path / "s")
    store = EpisodeStore.open(tmp_path / "s")
    assert store.lengths.tolist() == [8, 8] and store.meta["convert"]["left_out"] == 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d | {"obs": d["obs"][0]}, "obs and action must be"),
        (lambda d: d | {"reward": d["reward"][:2]}, r"reward is \(2, 9\), obs is \(4, 9, 5\)"),
        (lambda d: d | {"term": torch.zeros(N, T, 3)}, "term must be"),
        (lambda d: {k: v[:, :1] for k, v in d.items()}, "sequences have 1 rows"),
        (lambda d: {k: v for k, v in d.items() if k != "reward"}, "no table with columns"),
    ],
)
def test_columns_that_do_not_fit_are_named(change, text, rows, tmp_path):
    torch.save(change(rows), tmp_path / "ep_data_HopperEnv.pt")
    with pytest.raises(ForeignFileError, match=text):
        convert_episodes(episode_sources(tmp_path / "ep_data_HopperEnv.pt"), tmp_path / "s")
