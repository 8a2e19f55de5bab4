"""Environments: the table of tasks, differentiable dflex, dm_control, Meta-World, Gymnasium's own, and evaluation.

Importing this package registers the Gymnasium ids (``pwm_fast/Humanoid-v0`` and the like). Where importing is not at
hand, Gymnasium does it for an id that names the module: ``gymnasium.make_vec("pwm_fast.envs:pwm_fast/Hopper-v0")``.
"""

import gymnasium

from pwm_fast.envs.registry import TASKS


def register() -> None:
    """Tell Gymnasium our ids. Repeating it is harmless."""
    for task in TASKS.values():
        if task.gym_id in gymnasium.registry:
            continue
        if task.suite == "dflex":
            fronts = ("pwm_fast.envs.vector:DflexEnv", "pwm_fast.envs.vector:DflexVectorEnv")
        else:
            fronts = (task.make, task.make_vector)
        kwargs = {"task": task.name} if task.suite == "dflex" else {}
        gymnasium.register(task.gym_id, entry_point=fronts[0], vector_entry_point=fronts[1], kwargs=kwargs)


register()
