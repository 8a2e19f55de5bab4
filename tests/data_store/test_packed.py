"""Packs of episodes: variety kept, errors clear."""

import numpy as np
import pytest

from pwm_fast.data.episodes import EpisodeStore, EpisodeWriter, StoreError
from pwm_fast.data.packed import best_episodes, pack, unpack


@pytest.fixture
def store(tmp_path) -> EpisodeStore:
    """40 episodes of 20 to 200 transitions; the reward is the episode's number, the odd ones end in a fall."""
    random = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "store", 5, 2, task_names=["thing"]) as writer:
        for i in range(40):
            length = int(random.integers(20, 200))
            obs, action = random.normal(size=(length + 1, 5)), random.uniform(-1, 1, (length, 2))
            writer.add(obs, action, np.full(length, float(i)), terminated=i % 2 == 1)
    return EpisodeStore.open(tmp_path / "store")


def test_a_pack_favours_the_best_and_keeps_the_rest_and_falls(store, tmp_path):
    count = pack(store, tmp_path / "p.npz", transitions=640, piece=32)
    back = unpack(tmp_path / "p.npz", tmp_path / "back")
    assert back.num_transitions == count
    assert back.lengths.max() == 32 and 640 <= count < 700
    best_fifth = np.quantile(store.statistics()["returns"], 0.8)
    assert 0.4 < np.mean(np.array(back.meta["episode_return"]) >= best_fifth) < 0.95
    falls = [bool(back.episode(i)["terminated"][-1]) for i in range(back.num_episodes)]
    assert 0 < sum(falls) < len(falls)


def test_every_piece_is_a_piece_of_an_episode(store, tmp_path):
    pack(store, tmp_path / "p.npz", transitions=640, piece=32)
    back = unpack(tmp_path / "p.npz", tmp_path / "back")
    for i in range(back.num_episodes):
        piece = back.episode(i)
        whole = store.episode(int(piece["reward"][0]))
        starts = np.flatnonzero(np.abs(whole["obs"][: -len(piece["reward"])] - piece["obs"][0]).max(1) < 2e-3)
        assert len(starts) == 1
        span = slice(starts[0], starts[0] + len(piece["reward"]))
        np.testing.assert_allclose(piece["action"], whole["action"][span], atol=1e-3)
        np.testing.assert_array_equal(piece["terminated"], whole["terminated"][span])


def test_observations_that_show_the_last_action_come_back_whole(tmp_path):
    random = np.random.default_rng(1)
    with EpisodeWriter(tmp_path / "store", 5, 2, task_names=["thing"]) as writer:
        for _ in range(12):
            action = random.uniform(-1, 1, (50, 2))
            shown = np.concatenate([random.uniform(-1, 1, (1, 2)), action])
            writer.add(np.concatenate([random.normal(size=(51, 3)), shown], 1), action, action.sum(1), terminated=False)
    store = EpisodeStore.open(tmp_path / "store")
    pack(store, tmp_path / "p.npz", transitions=200, piece=16)
    back = unpack(tmp_path / "p.npz", tmp_path / "back")
    assert back.obs_dim == 5
    piece = back.episode(0)
    np.testing.assert_array_equal(piece["obs"][1:, 3:], piece["action"])
    assert np.abs(store.obs[:, 3:] - piece["obs"][0, 3:]).max(1).min() < 1e-3


def test_cloning_ranks_pieces_by_their_episodes(store, tmp_path):
    pack(store, tmp_path / "p.npz", transitions=640, piece=32)
    back = unpack(tmp_path / "p.npz", tmp_path / "back")
    returns = store.statistics()["returns"]
    source = [int(back.episode(int(i))["reward"][0]) for i in best_episodes(back, 0.2)]
    assert returns[source].min() >= np.quantile(np.array(back.meta["episode_return"]), 0.75)


def test_the_best_episodes_hold_a_share_of_the_transitions(store):
    returns, lengths = store.statistics()["returns"], store.lengths
    for share in (0.05, 0.3, 1.0):
        best = best_episodes(store, share)
        others = np.setdiff1d(np.arange(40), best)
        assert len(others) == 0 or returns[best].min() >= returns[others].max()
        assert abs(lengths[best].sum() / lengths.sum() - share) < 0.06
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        best_episodes(store, 0)


def test_an_unpacked_store_is_used_again(store, tmp_path):
    pack(store, tmp_path / "p.npz")
    first = unpack(tmp_path / "p.npz", tmp_path / "back")
    (tmp_path / "p.npz").unlink()
    assert unpack(tmp_path / "p.npz", tmp_path / "back").num_episodes == first.num_episodes


def test_damaged_packs_are_refused(store, tmp_path):
    path = tmp_path / "p.npz"
    pack(store, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StoreError, match="damaged"):
        unpack(path, tmp_path / "a")
    np.savez(path, something=np.zeros(3))
    with pytest.raises(StoreError, match="damaged"):
        unpack(path, tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "missing.npz", tmp_path / "c")
