"""The episode store: a directory of raw little-endian columns that is memory-mapped, so any size opens at once.

    meta.json           committed counts, dimensions, task names, checksums and the caller's own notes
    obs.f32             [N, S]   observation of the row
    action.f32          [N, A]   action taken there, in [-1, 1]
    reward.f32          [N]      reward of the transition to the next row
    terminated.u8       [N]      1 if that transition ended the episode for good (not by a time limit)
    task.i32            [N]      index into the task names
    episode_start.i64   [E]      row index of each episode's first row

An episode of T transitions has T+1 rows: row t holds obs[t], action[t], reward[t], terminated[t] of the transition to
row t+1. Its last row holds the final observation; action, reward and terminated are 0 there and mean nothing.

Only what meta.json counts is committed. Appending writes past the committed end, syncs, then replaces meta.json
atomically: whatever interrupts a writer, a reader sees the last commit and nothing else.

    with EpisodeWriter("data/hopper", obs_dim=11, action_dim=3, task_names=["hopper"]) as writer:
        writer.add(obs, action, reward, terminated=True)
    store = EpisodeStore.open("data/hopper")
    train, validation = store.split(0.1, seed=0)
    batch = WindowSampler(store, horizon=16, episodes=train).windows(step=0, batch=256)
"""

from pwm_fast.data.layout import StoreError
from pwm_fast.data.sampling import WindowSampler
from pwm_fast.data.store import EpisodeStore
from pwm_fast.data.writer import EpisodeWriter

__all__ = ["EpisodeStore", "EpisodeWriter", "StoreError", "WindowSampler"]
