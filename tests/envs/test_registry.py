"""Names of tasks: what they say, and what a wrong one gets to hear."""

import pytest

from pwm_fast.envs import registry
from pwm_fast.envs.dflex import TASKS


@pytest.mark.parametrize(("wrong", "near"), [("humaniod", "humanoid"), ("SNU", "snu-humanoid"), ("Hopper", "hopper")])
def test_an_unknown_task_suggests_the_nearest(wrong, near):
    with pytest.raises(registry.UnknownTask, match=f"unknown task '{wrong}'; did you mean '{near}'"):
        registry.get(wrong)


def test_a_name_like_no_other_lists_them_all():
    with pytest.raises(registry.UnknownTask, match="known: hopper, ant, humanoid, anymal, snu-humanoid"):
        registry.get("zzzzzz")
    with pytest.raises(registry.UnknownTask, match="unknown set of tasks 'dflx'; did you mean 'dflex'"):
        registry.names("dflx")


def test_the_table_agrees_with_the_simulated_tasks():
    assert list(TASKS) == registry.names("dflex") == registry.names()[: len(TASKS)]
    for name, task in TASKS.items():
        row = registry.get(name)
        assert (row.title, row.obs_dim, row.action_dim, row.episode_length) == (
            task.title,
            task.obs_dim,
            task.action_dim,
            task.episode_length,
        )
    assert registry.get("snu-humanoid").gym_id == "pwm_fast/SNUHumanoid-v0"
