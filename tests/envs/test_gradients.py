"""Gradients of the simulator and of whole steps against central differences."""

import pytest
import torch
from recorded import TASKS, gradients

from pwm_fast.envs.dflex import DifferentiableEnv
from pwm_fast.envs.dflex.simulator import Simulator


@pytest.mark.parametrize("task", TASKS)
def test_control_step_against_central_differences(task):
    """Directional derivatives in state, velocity and command. The median over start states: where a contact or a limit
    switches within the difference, the two legitimately disagree."""
    env = DifferentiableEnv(task, 1)
    data = gradients(task)
    simulator = Simulator(env.model, 8, env.task.substeps, env.task.refresh)
    generator = torch.Generator().manual_seed(1)
    inputs = [data["start_joint_q"], data["start_joint_qd"], data["action"][0] * env._full_command]
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = simulator.step(*inputs)
    weights = [torch.randn(x.shape, generator=generator) for x in out]

    def objective(q, qd, command):  # per environment
        return sum((w * x).double().sum(-1) for w, x in zip(weights, simulator.step(q, qd, command)))

    grads = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, out)), inputs)
    for i, size in ((0, 1e-4), (1, 1e-3), (2, 1e-2 * float(env._full_command.max()))):
        direction = torch.randn(inputs[i].shape, generator=generator)
        with torch.no_grad():
            moved = [[x + s * size * direction if j == i else x for j, x in enumerate(inputs)] for s in (1, -1)]
            difference = (objective(*moved[0]) - objective(*moved[1])) / (2 * size)
        predicted = (grads[i] * direction).sum(-1)
        error = (predicted - difference).abs() / (difference.abs() + 0.05 * difference.abs().mean())
        assert error.median() < 0.02, f"input {i}: {predicted.tolist()} against {difference.tolist()}"


@pytest.mark.parametrize("task", TASKS)
def test_gradients_do_not_depend_on_recentring(task):
    data = gradients(task)
    found = []
    for recentre in (False, True):
        env = DifferentiableEnv(task, 8, early_termination=False, recentre=recentre)
        env.set_state(data["start_joint_q"], data["start_joint_qd"])
        action = data["action"][:3].clone().requires_grad_()
        sum(env.step(a)[1].sum() for a in action).backward()
        found.append(action.grad)
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


def test_action_gradient_is_zero_outside_the_clip():
    env = DifferentiableEnv("hopper", 2)
    action = torch.tensor([[0.5, 1.5, -2.0], [0.1, 0.2, 0.3]], requires_grad=True)
    env.step(action)[1].sum().backward()
    assert action.grad[0, 1] == 0 and action.grad[0, 2] == 0
    assert (action.grad[1] != 0).all()


def test_graph_is_cut_by_initialize_trajectory_and_by_a_reset():
    env = DifferentiableEnv("hopper", 3)
    action = torch.zeros(3, 3, requires_grad=True)
    env.step(action)
    assert env.state()[0].requires_grad
    env.initialize_trajectory()
    assert not env.state()[0].requires_grad
    q, qd = (x.clone() for x in env.state())
    q[1, 1:3], qd[1] = torch.tensor([-0.5, torch.pi / 2]), 0.0  # lies, too low: reset in the next step
    env.set_state(q, qd)
    _, _, terminated, _, info = env.step(action)
    assert terminated.tolist() == [False, True, False]
    grad = torch.autograd.grad(env.state()[0].sum(), action, retain_graph=True)[0]
    assert (grad[1] == 0).all() and (grad[0] != 0).any()
    assert (torch.autograd.grad(info["final_obs"][1].sum(), action)[0][1] != 0).any()


def test_backward_twice_through_one_graph_and_graphs_side_by_side():
    env = DifferentiableEnv("ant", 5)
    start = [x.clone() for x in env.state()]
    actions = [torch.full((5, 8), 0.1 * i, requires_grad=True) for i in range(3)]

    def loss(action):
        env.set_state(*start)
        return env.step(action)[0].sum()

    together = [loss(a) for a in actions]  # three graphs alive at once
    first = [torch.autograd.grad(x, a, retain_graph=True)[0] for x, a in zip(together, actions)]
    again = [torch.autograd.grad(x, a)[0] for x, a in zip(reversed(together), reversed(actions))][::-1]
    alone = [torch.autograd.grad(loss(a), a)[0] for a in actions]
    for x, y, z in zip(first, again, alone):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_tapes_return_to_the_pool_and_memory_stays_small():
    """A 16-step backward of 64 humanoids keeps under 40 MB of tapes; a dropped graph leaves them to the next one."""
    env = DifferentiableEnv("humanoid", 64, threads=1)
    part = env.simulator.parts[0]
    for _ in range(2):
        env.initialize_trajectory()
        action = torch.zeros(64, 21, requires_grad=True)
        loss = sum(env.step(action)[1].sum() for _ in range(16))
        loss.backward()
        env.initialize_trajectory()
        del loss
        assert len(part.free_tapes) == 16
    held = sum(
        x.numel() * 4 for tape in part.free_tapes for x in (tape.q, tape.qd, tape.motor, tape.tension, tape.factor)
    )
    assert held < 40e6
