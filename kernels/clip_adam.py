"""Gradient-norm clipping and Adam (Kingma and Ba 2015, bias-corrected, as torch.optim.Adam) per policy, in one pass.

Every policy owns one row of the flat parameters: its norm, learning rate and step count are its own, so a policy's
training does not depend on which others share the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pwm_fast import backend as backends
from pwm_fast.kernels.ahead_of_time import Compilation, signature
from pwm_fast.kernels.dispatch import backend_for
from pwm_fast.kernels.triton_support import jit, operator, tl, triton

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


@jit
def squares_kernel(
    grad, step, squares, constants, lr, size, log_beta1, log_beta2,
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of squares [P, pieces] of the gradient, and what the update needs of the step count, [P, 3] in float64."""
    piece, policy = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, PIECE, BLOCK):
        at = piece * PIECE + first + tl.arange(0, BLOCK)
        value = tl.load(grad + policy * size + at, mask=at < size, other=0.0).to(tl.float32)
        total += value * value
    tl.store(squares + policy * tl.num_programs(0) + piece, tl.sum(total, 0))
    if piece == 0:
        # The update raises `step` while its other programs still read the count, so they read this copy.
        # 1 - beta^t loses what float32 has left after beta^t, for a beta near 1: float64, once per policy.
        count = tl.load(step + policy).to(tl.float64) + 1
        correction1 = 1 - tl.exp(count * log_beta1)
        correction2 = 1 - tl.exp(count * log_beta2)
        rate = tl.load(lr + policy).to(tl.float64) / correction1
        tl.store(constants + policy * 3, count)
        tl.store(constants + policy * 3 + 1, rate)
        tl.store(constants + policy * 3 + 2, 1 / tl.sqrt(correction2))


@jit
def update_kernel(
    param, grad, m, v, step, active, squares, constants, norm, size, pieces, max_norm, rest1, beta2, rest2, eps,
    PIECE: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The update of one piece. Each program adds the squares up for itself, in one order, so all agree on the norm."""
    piece, policy = tl.program_id(0), tl.program_id(1).to(tl.int64)
    every = tl.arange(0, PIECES)
    length = tl.sqrt(tl.sum(tl.load(squares + policy * pieces + every, mask=every < pieces, other=0.0), 0))
    if piece == 0:
        tl.store(norm + policy, length)
    if (tl.load(active + policy) != 0) & (length < float("inf")):  # NaN is not below it either
        if piece == 0:
            tl.store(step + policy, tl.load(constants + policy * 3).to(tl.int64))
        rate = tl.load(constants + policy * 3 + 1).to(tl.float32)
        shrink = tl.load(constants + policy * 3 + 2).to(tl.float32)
        scale = tl.minimum(max_norm / (length + 1e-6), 1.0)
        for first in range(0, PIECE, BLOCK):
            at = piece * PIECE + first + tl.arange(0, BLOCK)
            inside, at = at < size, policy * size + at
            clipped = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * scale
            mean = tl.load(m + at, mask=inside, other=0.0).to(tl.float32)
            mean += rest1 * (clipped - mean)
            square = beta2 * tl.load(v + at, mask=inside, other=0.0).to(tl.float32) + rest2 * clipped * clipped
            value = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
            value -= rate * mean / (tl.sqrt(square) * shrink + eps)
            tl.store(param + at, value, mask=inside)
            tl.store(m + at, mean, mask=inside)
            tl.store(v + at, square, mask=inside)


BLOCK = 1024  # elements at a time, 8 per thread
PIECES = 1024  # programs per policy at most: each reads one number from all the others


@operator("param", "m", "v", "step", "norm")
def clip_adam_step(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    lr: Tensor,
    step: Tensor,
    active: Tensor,
    norm: Tensor,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """`step` in Triton on contiguous tensors, in two launches: 32 bytes per float32 parameter (grad twice, the others
    read and written). Pieces depend on the size alone, so a policy's results do not depend on the others'."""
    policies, size = param.shape
    if policies == 0:
        return
    piece = BLOCK * 4
    while triton.cdiv(size, piece) > PIECES:
        piece *= 2
    pieces = max(1, triton.cdiv(size, piece))
    squares = param.new_empty(policies, pieces, dtype=torch.float32)
    constants = param.new_empty(policies, 3, dtype=torch.float64)
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    grid = (pieces, policies)
    squares_kernel[grid](grad, step, squares, constants, lr, size, *logs, piece, BLOCK)
    update_kernel[grid](
        param, grad, m, v, step, active, squares, constants, norm, size, pieces, max_norm,
        1 - beta1, beta2, 1 - beta2, eps, piece, BLOCK, triton.next_power_of_2(pieces),
    )  # fmt: skip


COMPILATIONS = [
    Compilation(
        "clip_adam squares_kernel",
        squares_kernel,
        signature({"*fp32": "grad squares lr", "*i64": "step", "*fp64": "constants", "i32": "size",
                   "fp32": "log_beta1 log_beta2"}),
        {"PIECE": 4 * BLOCK, "BLOCK": BLOCK},
    ),
    Compilation(
        "clip_adam update_kernel",
        update_kernel,
        signature({"*fp32": "param grad m v squares norm", "*i64": "step", "*i1": "active", "*fp64": "constants",
                   "i32": "size pieces", "fp32": "max_norm rest1 beta2 rest2 eps"}),
        {"PIECE": 4 * BLOCK, "BLOCK": BLOCK, "PIECES": PIECES},
    ),
]  # fmt: skip


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
    chosen = backend_for(backend, param, grad, m, v)
    in_place = {"param": param, "m": m, "v": v, "step": step}
    if chosen != "torch" and not all(t.is_contiguous() for t in in_place.values()):
        if backend is not None:
            scattered = next(name for name, value in in_place.items() if not value.is_contiguous())
            raise ValueError(f"backend {backend!r} needs contiguous tensors to update, got {scattered} with gaps")
        chosen = "torch"
    if chosen == "torch":
        return clip_adam(param, grad, m, v, lr, step, max_norm, betas, eps, active)
    grad, lr, active = grad.contiguous(), lr.contiguous(), active.contiguous()
    norm = param.new_empty(policies)
    if chosen == "triton":
        clip_adam_step(param, grad, m, v, lr, step, active, norm, max_norm, *betas, eps)
        return norm
    backends.native.clip_adam(
        *(t.data_ptr() for t in (param, grad, m, v, lr, step, active, norm)),
        *param.shape,
        max_norm,
        *betas,
        eps,
        torch.get_num_threads(),
    )
    return norm
