"""Our VectorEnv of single environments against Gymnasium's: the same protocol, over the ends of episodes."""

import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from pwm_fast.envs import registry


@pytest.mark.parametrize("name", ["gym:Pendulum-v1", "mw-drawer-close", "pendulum-spin"])
def test_steps_are_those_of_gymnasiums_own(name):
    """With environments at different times of their episodes."""
    package = {"mw-drawer-close": "metaworld", "pendulum-spin": "dm_control"}.get(name, "gymnasium")
    pytest.importorskip(package, reason=f"{package} is not installed (extra mt80)")
    task = registry.get(name)
    envs = task.make_vector(3), SyncVectorEnv([task.make] * 3)
    first = [env.reset(seed=[5, 6, 7])[0] for env in envs]
    late = [env.reset(seed=[None, 8, None], options={"reset_mask": np.array([False, True, False])})[0] for env in envs]
    assert np.array_equal(*first) and np.array_equal(*late)
    ended = np.zeros(3, int)
    for step in range(task.episode_length + 3):
        actions = np.random.default_rng(step).uniform(-1, 1, (3, task.action_dim)).astype(np.float32)
        if step == 40:
            masks = [{"reset_mask": np.array([False, True, False])} for _ in envs]
            assert np.array_equal(*[env.reset(seed=[None, 9, None], options=m)[0] for env, m in zip(envs, masks)])
        (*found, infos), (*expected, theirs) = (env.step(actions) for env in envs)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
        assert infos.keys() == theirs.keys() and all((infos[key] == theirs[key]).all() for key in infos)
        ended += found[3]
    assert ended.tolist() == [1, 0, 1]
