"""Gradient-norm clipping and Adam (Kingma and Ba 2015, bias-corrected, as torch.optim.Adam) per policy, in one pass.

Every policy owns one row of the flat parameters: its norm, learning rate and step count are its own, so a policy's
training does not depend on which others share the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.kernels.dispatch import native_for

Betas = tuple[float, float]


def clip_adam(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    lr: Tensor,
    step: Tensor,
    max_norm: float,
    betas: Betas,
    eps: float,
    active: Tensor,
) -> Tensor:
    """The definition; see `step`. Works without host synchronisation."""
    norm = torch.linalg.vector_norm(grad, dim=1)
    update = active & torch.isfinite(norm)
    step += update
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    clipped = grad * scale[:, None]
    beta1, beta2 = betas
    new_m = m + (1 - beta1) * (clipped - m)
    new_v = beta2 * v + (1 - beta2) * clipped.square()
    count = step.clamp(min=1).to(torch.float64)
    correction1 = 1 - beta1**count
    correction2 = 1 - beta2**count
    rate = (lr.to(torch.float64) / correction1).to(param.dtype)
    denominator = new_v.sqrt() / correction2.sqrt().to(param.dtype)[:, None] + eps
    new_param = param - rate[:, None] * new_m / denominator
    mask = update[:, None]
    param.copy_(torch.where(mask, new_param, param))
    m.copy_(torch.where(mask, new_m, m))
    v.copy_(torch.where(mask, new_v, v))
    return norm


@torch.no_grad()
def step(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    lr: Tensor,
    step: Tensor,
    max_norm: float,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One clipped Adam step in place on param, m and v [P, n]; returns the gradient norms [P] before clipping.

    grad [P, n] is scaled by min(1, max_norm / (norm + 1e-6)) (max_norm may be inf) and left as it is. lr [P] in the
    parameters' dtype. step [P] int64 counts the updates done so far and is raised by one in the rows that are
    updated. Rows that are not `active` [P] bool, or whose norm is not finite, keep param, m, v and step: the caller
    sees the norm and decides.
    """
    policies = param.shape[0]
    for name, value in (("grad", grad), ("m", m), ("v", v)):
        if value.shape != param.shape:
            raise ValueError(f"{name} must have the parameters' shape {tuple(param.shape)}, got {tuple(value.shape)}")
    if active is None:
        active = torch.ones(policies, dtype=torch.bool, device=param.device)
    for name, value, dtype in (("lr", lr, param.dtype), ("step", step, torch.int64), ("active", active, torch.bool)):
        if value.shape != (policies,) or value.dtype is not dtype:
            raise ValueError(f"{name} must be {dtype} [{policies}], got {value.dtype} {tuple(value.shape)}")
    native = native_for(backend, param, grad, m, v)
    in_place = (param, m, v, step)
    if native is None or not all(t.is_contiguous() for t in in_place):
        return clip_adam(param, grad, m, v, lr, step, max_norm, betas, eps, active)
    grad, lr, active = grad.contiguous(), lr.contiguous(), active.contiguous()
    norm = param.new_empty(policies)
    native.clip_adam(
        *(t.data_ptr() for t in (param, grad, m, v, lr, step, active, norm)),
        *param.shape,
        max_norm,
        *betas,
        eps,
        torch.get_num_threads(),
    )
    return norm
