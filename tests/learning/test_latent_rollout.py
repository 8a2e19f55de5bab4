"""The benchmark's fused autograd rollout against plain autograd through H steps."""

import torch
from autograd_pretraining import fused_rollout, plain_rollout

from pwm_fast.learning.pretraining import Windows
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

HORIZON, BATCH = 6, 5


def test_values_and_all_gradients_equal_plain_autograd():
    torch.manual_seed(0)
    model = WorldModel(WorldModelConfig(10, 3, 16, 24, 24, 2, num_tasks=3, task_dim=4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    z = torch.randn(BATCH, 16).double().requires_grad_()
    action = torch.randn(HORIZON, BATCH, 3).double().requires_grad_()
    task, weight = torch.tensor([0, 1, 2, 0, 1]), torch.randn(HORIZON + 1, BATCH, 16).double()
    windows = Windows(weight, action, weight, weight, task)
    found = []
    for function in (plain_rollout, fused_rollout):
        model.zero_grad()
        z.grad = action.grad = None
        out = function(model, z, windows)
        (out * weight).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"out": out.detach(), "z": z.grad.clone(), "action": action.grad.clone(), **gradients})
    assert found[0].keys() == found[1].keys()
    assert any("_task_emb" in name for name in found[0])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-13, msg=name)
