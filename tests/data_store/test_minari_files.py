"""Minari data sets, written and read by the library itself."""

import sys

import numpy as np
import pytest
from gymnasium import spaces

from pwm_fast.data.conversion import convert_episodes, episode_sources
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.minari_files import MinariData
from pwm_fast.data.stored_zip import ForeignFileError

minari = pytest.importorskip("minari", reason="reads data sets with the minari package: pip install 'pwm_fast[minari]'")
LENGTHS = [5, 3, 8]
PLAIN = spaces.Box(-np.inf, np.inf, (3,), np.float64)
GOAL = spaces.Dict({"observation": PLAIN, "goal": spaces.Box(-1, 1, (2,), np.float64)})
TORQUE = spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 4.0]), dtype=np.float64)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes a data set of random episodes, the second of them terminated; returns its name and its episodes."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))

    def build(observation=PLAIN, action=TORQUE, name="pwm/test-v0"):
        from minari.data_collector import EpisodeBuffer

        observation.seed(0)
        action.seed(0)
        buffers = []
        for i, length in enumerate(LENGTHS):
            ends = np.zeros((2, length), bool)
            ends[i == 1, -1] = True
            rows = [observation.sample() for _ in range(length + 1)]
            joined = {k: np.stack([row[k] for row in rows]) for k in rows[0]} if isinstance(rows[0], dict) else rows
            buffers.append(
                EpisodeBuffer(
                    id=i, observations=joined, actions=[action.sample() for _ in range(length)],
                    rewards=np.arange(length) + 0.5 * i, terminations=list(ends[1]), truncations=list(ends[0]),
                )
            )  # fmt: skip
        minari.create_dataset_from_buffers(
            name, buffers, observation_space=observation, action_space=action, description="test", algorithm_name="a",
            author="a", author_email="a@a.org", code_permalink="https://a.org",
        )  # fmt: skip
        return name, buffers

    return build


def store_of(source, tmp_path) -> EpisodeStore:
    convert_episodes(episode_sources(source), tmp_path / "store")
    return EpisodeStore.open(tmp_path / "store")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["name", "folder"])
def test_episodes_come_over_with_actions_in_the_unit_box(by, make, tmp_path):
    name, buffers = make()
    store = store_of(f"minari:{name}" if by == "name" else tmp_path / "sets" / name, tmp_path)
    assert store.task_names == [name] and store.lengths.tolist() == LENGTHS
    for i, buffer in enumerate(buffers):
        episode, action = store.episode(i), np.stack(buffer.actions)
        assert np.allclose(episode["obs"], np.stack(buffer.observations), atol=1e-6)
        assert np.allclose(episode["action"], np.stack([action[:, 0] / 2, action[:, 1] / 2 - 1], 1), atol=1e-6)
        assert np.allclose(episode["reward"], buffer.rewards) and episode["terminated"][-1] == (i == 1)


@pytest.mark.filterwarnings("ignore")
def test_observations_of_several_parts_are_laid_end_to_end(make, tmp_path):
    name, buffers = make(GOAL)
    store = store_of(f"minari:{name}", tmp_path)
    order = list(GOAL.spaces)
    for i, buffer in enumerate(buffers):
        assert np.allclose(
            store.episode(i)["obs"], np.concatenate([buffer.observations[k] for k in order], 1), atol=1e-6
        )


@pytest.mark.filterwarnings("ignore")
def test_spaces_that_are_not_continuous_are_refused(make):
    name, _ = make(action=spaces.Box(-np.inf, np.inf, (2,), np.float64))
    with pytest.raises(ForeignFileError, match="no finite bounds"):
        MinariData(f"minari:{name}")


def test_a_data_set_that_is_not_there_is_named(make):
    with pytest.raises(FileNotFoundError, match="minari:no/such-v0 is no Minari data set on this machine"):
        MinariData("minari:no/such-v0")


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"pip install 'pwm_fast\[minari\]'"):
        MinariData("minari:no/such-v0")
