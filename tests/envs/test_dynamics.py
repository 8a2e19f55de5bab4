"""The dynamics against their plain float64 definition, in states that the recorded trajectories do not reach."""

import naive_dynamics as naive
import pytest
import torch
from recorded import TASKS, TOLERANCES

from pwm_fast.envs.dflex import DifferentiableEnv


@pytest.mark.parametrize("task", TASKS)
def test_a_control_step_is_the_definitions(task):
    """20 robots, a bundle and a part of another: half after 20 full-range random steps, half just reset."""
    env = DifferentiableEnv(task, 20, seed=7, early_termination=False)
    generator, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(7)
    _, fresh = (env.task.start_state(env._start_q, env.model.nqd, n, noise) for n in (20, 10))
    with torch.no_grad():
        for _ in range(20):
            env.step(2 * torch.rand(20, env.action_dim, generator=generator) - 1)
        env.restart_rows(torch.arange(10), *fresh)
        start, action = env.state(), 2 * torch.rand(20, env.action_dim, generator=generator) - 1
        env.step(action)
    command = (action * env._full_command).numpy()
    substeps, refresh = env.task.substeps, env.task.refresh or env.task.substeps
    expected = naive.control_step(env.model, *(x.numpy() for x in start), command, substeps, refresh)
    for found, exact, tolerance in zip(env.state(), expected, TOLERANCES[task][:2]):
        error = (found - torch.from_numpy(exact)).abs().amax(1)
        assert error.median() < tolerance
        assert error.max() < 5 * tolerance  # a contact may switch one substep earlier or later
