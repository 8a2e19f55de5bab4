"""All minibatch steps of a population's critics in one launch: forward, squared error, backward, clipping, Adam.

`critic_epoch` is the definition; `CriticEpoch` plans the persistent kernel for one shape and runs it. A step has
2 D + 2 phases for D hidden layers: D products forward; values, errors and the gradient at the last norm; D times the
gradient of the layer below beside this layer's weight gradients; Adam. A grid barrier separates them.

Cost model, on paper and unmeasured: 8 epochs x 4 minibatches x 6 phases = 192 barriers of about 1 microsecond. For one
policy of 3 critics 512-400-200-1 and 256 rows the products are 1.3 GFLOP a step (20 microseconds at 67 TFLOP/s in
float32); Adam moves 7 x 3.4 MB through the second-level cache, where all of it fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log2
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pwm_fast.kernels.clip_adam import Betas, clip_adam
from pwm_fast.kernels.critic_tiles import (
    BM,
    BN,
    DOWN_BM,
    DOWN_BN,
    VECTOR,
    W_BM,
    W_BN,
    K,
    N,
    adam_tile,
    down_tile,
    forward_tile,
    plan_critics,
    value_tile,
    vector_tile,
    weight_tile,
)
from pwm_fast.kernels.grid_barrier import grid_barrier, launch_phases, new_counter, phase_kernel, resident_programs
from pwm_fast.kernels.mish_layernorm import mish_layernorm
from pwm_fast.kernels.normed_linear import EPS, dot_options
from pwm_fast.kernels.triton_support import interpreting, refusal, tl

VALUE_ROWS, ADAM_BLOCK = 16, 1024


class Parameters(Protocol):
    """Critics' parameters: `flat` and `grad` [P K, n], views of `flat` by name (`{i}.weight` [P K, out, in] ...)."""

    flat: Tensor
    grad: Tensor

    def __getitem__(self, name: str) -> Tensor: ...


class EpochResult(NamedTuple):
    """What the steps of one call gave, per policy."""

    loss: Tensor  # [P] squared error, averaged over critics, rows and steps
    norm: Tensor  # [P] gradient norm of the last step, before clipping
    active: Tensor  # [P] bool: those still learning; a norm that is not finite ends it


def blocks(rows: int, minibatches: int) -> list[slice]:
    """The rows of each minibatch, as `torch.tensor_split` has them: the first ones take what is left over."""
    ends = [rows // minibatches * i + min(i, rows % minibatches) for i in range(minibatches + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def critic_epoch(
    parameters: Parameters, depth: int, x: Tensor, targets: Tensor, order: Tensor, minibatches: int, m: Tensor,
    v: Tensor, lr: Tensor, step: Tensor, max_norm: float, betas: Betas, eps: float, active: Tensor,
) -> EpochResult:  # fmt: skip
    """The definition, in place on parameters.flat, m, v and step; arguments as of `CriticEpoch.run`."""
    policies, epochs, rows = order.shape
    flat = parameters.flat
    total = torch.zeros_like(lr)
    for epoch in range(epochs):
        for block in blocks(rows, minibatches):
            picks = order[:, epoch, block]
            leaf = flat.detach().requires_grad_()

            def view(name: str, leaf: Tensor = leaf) -> Tensor:
                own = parameters[name]
                return leaf.as_strided(own.shape, own.stride(), own.storage_offset())

            with torch.enable_grad():
                y = torch.stack([x[p, picks[p]] for p in range(policies)])
                y = y.repeat_interleave(len(flat) // policies, 0)
                for i in range(depth):
                    y = torch.einsum("gri,goi->gro", y, view(f"{i}.weight")) + view(f"{i}.bias")[:, None]
                    if i < depth - 1:
                        y = mish_layernorm(y, view(f"{i}.ln.weight"), view(f"{i}.ln.bias"))
                error = y.view(policies, -1, picks.shape[1]) - targets.gather(1, picks)[:, None]
                loss = error.square().mean((1, 2))
                (grad,) = torch.autograd.grad(loss.sum(), leaf)
            rows_of_policies = (flat.view(policies, -1), grad.view(policies, -1), m, v)
            norm = clip_adam(*rows_of_policies, lr, step, max_norm, betas, eps, active)
            active = active & torch.isfinite(norm)
            total = total + loss.detach()
    return EpochResult(total / (epochs * minibatches), norm, active)


@phase_kernel
def critic_epoch_kernel(
    x, targets, order, param, grad, m, v, lr, steps, alive,
    norms, losses, pre, stats, grads, sums, errors, squares, counter,
    first_phase, last_phase, LAYERS: tl.constexpr, P: tl.constexpr, KC: tl.constexpr, ROWS: tl.constexpr,
    EPOCHS: tl.constexpr, MINIBATCHES: tl.constexpr, X_ROWS: tl.constexpr, STRIDE: tl.constexpr, SLOTS: tl.constexpr,
    MAX_NORM: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr, ADAM_EPS: tl.constexpr, EPS: tl.constexpr, VALUE_TILE: tl.constexpr,
    ADAM_TILE: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Phases first_phase .. last_phase - 1 of EPOCHS x MINIBATCHES steps."""
    D: tl.constexpr = len(LAYERS)
    PER: tl.constexpr = 2 * D + 2
    G: tl.constexpr = P * KC
    R: tl.constexpr = (ROWS + MINIBATCHES - 1) // MINIBATCHES
    SHARE: tl.constexpr = ROWS // MINIBATCHES
    MORE: tl.constexpr = ROWS % MINIBATCHES
    PICKS: tl.constexpr = EPOCHS * ROWS
    VALUES: tl.constexpr = G * ((R + VALUE_TILE - 1) // VALUE_TILE)
    step = first_phase // PER
    while step * PER < last_phase:
        part = step % MINIBATCHES
        count = SHARE + (part < MORE).to(tl.int32)
        picks = order + step // MINIBATCHES * ROWS + part * SHARE + tl.minimum(part, MORE)
        for i in tl.static_range(PER):
            if (step * PER + i >= first_phase) & (step * PER + i < last_phase):
                tile = tl.program_id(0)
                if i < D:
                    TILES: tl.constexpr = (
                        G
                        * ((R + LAYERS[i][BM] - 1) // LAYERS[i][BM])
                        * ((LAYERS[i][N] + LAYERS[i][BN] - 1) // LAYERS[i][BN])
                    )
                    while tile < TILES:
                        forward_tile(
                            tile, x, picks, pre, stats, param, count, i == 0, tl.constexpr(LAYERS[i]),
                            tl.constexpr(LAYERS[i - 1 if i > 0 else 0]), G, KC, R, X_ROWS, PICKS, STRIDE, EPS, ACC,
                            DOT, PRECISION, BK,
                        )  # fmt: skip
                        tile += tl.num_programs(0)
                elif i == D:
                    while tile < VALUES:
                        value_tile(
                            tile, targets, picks, pre, stats, grads, sums, errors, losses + step * VALUES, param,
                            count, tl.constexpr(LAYERS[D - 1]), G, KC, R, ROWS, PICKS, STRIDE, EPS, VALUE_TILE,
                        )  # fmt: skip
                        tile += tl.num_programs(0)
                elif i < PER - 1:
                    J: tl.constexpr = 2 * D - i
                    SELF: tl.constexpr = LAYERS[J]
                    BELOW: tl.constexpr = LAYERS[J - 1 if J > 0 else 0]
                    DOWN_M: tl.constexpr = (R + SELF[DOWN_BM] - 1) // SELF[DOWN_BM]
                    DOWN_N: tl.constexpr = (SELF[K] + SELF[DOWN_BN] - 1) // SELF[DOWN_BN]
                    DOWNS: tl.constexpr = G * DOWN_M * DOWN_N if J > 0 else 0
                    WEIGHTS: tl.constexpr = (
                        G * ((SELF[N] + SELF[W_BM] - 1) // SELF[W_BM]) * ((SELF[K] + SELF[W_BN] - 1) // SELF[W_BN])
                    )
                    VECTORS: tl.constexpr = G * ((SELF[N] + VECTOR - 1) // VECTOR)
                    while tile < DOWNS + WEIGHTS + VECTORS:
                        if tile < DOWNS:
                            if J > 0:
                                down_tile(
                                    tile, pre, stats, grads, sums, param, count, SELF, BELOW, G, R, STRIDE, EPS, ACC,
                                    DOT, PRECISION, BK,
                                )  # fmt: skip
                        elif tile < DOWNS + WEIGHTS:
                            weight_tile(
                                tile - DOWNS, x, picks, pre, stats, grads, sums, param, grad, squares, count, J == 0,
                                SELF, BELOW, G, KC, R, X_ROWS, PICKS, STRIDE, SLOTS, EPS, ACC, DOT, PRECISION,
                            )  # fmt: skip
                        else:
                            vector_tile(
                                tile - DOWNS - WEIGHTS, pre, stats, grads, sums, errors, param, grad, squares, count,
                                J == D - 1, SELF, G, R, STRIDE, SLOTS, EPS, ACC,
                            )  # fmt: skip
                        tile += tl.num_programs(0)
                else:
                    while tile < P * ((KC * STRIDE + ADAM_TILE - 1) // ADAM_TILE):
                        adam_tile(
                            tile, param, grad, m, v, squares, lr, steps, alive, norms, step, P, KC, STRIDE, SLOTS,
                            MAX_NORM, BETA1, BETA2, LOG2_BETA1, LOG2_BETA2, ADAM_EPS, ADAM_TILE,
                        )  # fmt: skip
                        tile += tl.num_programs(0)
                if step * PER + i + 1 < last_phase:
                    grid_barrier(counter)
        step += 1


def step_constants(max_norm: float, betas: Betas, eps: float) -> dict[str, Any]:
    """The kernel's constants that no shape decides."""
    return {
        "MAX_NORM": max_norm, "BETA1": betas[0], "BETA2": betas[1], "LOG2_BETA1": log2(betas[0]),
        "LOG2_BETA2": log2(betas[1]), "ADAM_EPS": eps, "EPS": EPS, "VALUE_TILE": VALUE_ROWS, "ADAM_TILE": ADAM_BLOCK,
    }  # fmt: skip


class CriticEpoch:
    """The persistent critic update for P policies of K critics on `rows` states each, on fixed buffers.

    `widths` are latent, hidden layers, 1. Products round their operands as `precision` says ("fp32", "tf32", "bf16");
    parameters, moments and sums stay float32 (float64 in the interpreter). `fused` is one launch, else one per phase
    (the default in the interpreter); `programs` must all fit on the device at once.
    """

    def __init__(
        self,
        parameters: Parameters,
        widths: Sequence[int],
        policies: int,
        num_critics: int,
        rows: int,
        epochs: int,
        minibatches: int,
        max_norm: float,
        betas: Betas,
        eps: float = 1e-8,
        precision: str = "fp32",
        programs: int | None = None,
        fused: bool | None = None,
    ):
        flat = parameters.flat
        if reason := refusal(flat, float64=True):
            raise RuntimeError(reason)
        if flat.dtype not in (torch.float32, torch.float64) or len(flat) != policies * num_critics:
            raise ValueError(
                f"critics must be float32 rows of {policies} x {num_critics} members, got {flat.dtype} {(*flat.shape,)}"
            )
        if len(widths) < 3 or widths[-1] != 1 or widths[-2] > 1024:
            raise ValueError(f"widths must be latent, hidden layers, the last of at most 1024, and 1; got {(*widths,)}")
        if not 1 <= minibatches <= rows:
            raise ValueError(f"minibatches must be between 1 and the {rows} rows, got {minibatches}")
        self._parameters, self._options = parameters, dot_options(flat.dtype, precision)
        self.programs = resident_programs(flat.device) if programs is None else programs
        self.fused = not interpreting if fused is None else fused
        self.shape = (policies, num_critics, rows, epochs, minibatches, widths[0])
        members, most = len(flat), -(-rows // minibatches)

        def offset(name: str) -> int:
            return (parameters[name].data_ptr() - flat.data_ptr()) // flat.element_size()

        sizes, slots, layers = plan_critics(widths, offset, members, most, self.programs)
        self._pre, self._stats, self._grads, self._sums = (flat.new_zeros(size) for size in sizes)
        self._errors, self._squares = flat.new_zeros(members, most), flat.new_zeros(members, slots)
        self._losses = flat.new_zeros(epochs * minibatches, policies, num_critics * -(-most // VALUE_ROWS))
        self._norms = flat.new_zeros(epochs * minibatches, policies)
        self._alive = torch.zeros(epochs * minibatches + 1, policies, dtype=torch.int32, device=flat.device)
        counts = [b.stop - b.start for b in blocks(rows, minibatches)]
        self._divisor = flat.new_tensor([num_critics * n for n in counts] * epochs)[:, None]
        self._counter = new_counter(flat.device)
        self._constants = {
            "P": policies, "KC": num_critics, "ROWS": rows, "EPOCHS": epochs, "MINIBATCHES": minibatches,
            "LAYERS": tuple(map(tuple, layers)), "STRIDE": flat.shape[1], "SLOTS": slots,
            **step_constants(max_norm, betas, eps),
        }  # fmt: skip

    @torch.no_grad()
    def run(
        self, x: Tensor, targets: Tensor, order: Tensor, m: Tensor, v: Tensor, lr: Tensor, step: Tensor, active: Tensor
    ) -> EpochResult:
        """Every step, in place on the parameters, m and v [P, K n] and the counts `step` [P] int64 of updates done.

        x [P, rows, Z] may have its policies further apart in memory by whole rows (`latents[:, :-1]` flattened);
        targets [P, rows]; order [P, epochs, rows] int64, a policy's rows in the order of its minibatches. lr [P].
        Policies that are not `active` [P] bool, or whose norm stops being finite, keep everything from there on.
        Raises ValueError on shapes and types other than the planned ones.
        """
        policies, _, rows, epochs, minibatches, latent = self.shape
        flat = self._parameters.flat
        moments = (policies, flat.numel() // policies)
        for name, value, shape, dtype in (
            ("x", x, (policies, rows, latent), flat.dtype),
            ("targets", targets, (policies, rows), flat.dtype),
            ("order", order, (policies, epochs, rows), torch.int64),
            ("m", m, moments, flat.dtype),
            ("v", v, moments, flat.dtype),
            ("lr", lr, (policies,), flat.dtype),
            ("step", step, (policies,), torch.int64),
            ("active", active, (policies,), torch.bool),
        ):
            if tuple(value.shape) != shape or value.dtype is not dtype:
                raise ValueError(f"{name} must be {dtype} {shape}, got {value.dtype} {tuple(value.shape)}")
        if x.stride()[1:] != (latent, 1) or x.stride(0) % latent:
            raise ValueError(f"x must have neighbouring rows of {latent}, got strides {x.stride()}")
        if not (flat.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
            raise ValueError("parameters, m and v must be contiguous: they change in place")
        self._alive[0] = active
        arguments = (
            x, targets.contiguous(), order.contiguous(), flat, self._parameters.grad, m, v, lr.contiguous(), step,
            self._alive, self._norms, self._losses, self._pre, self._stats, self._grads, self._sums, self._errors,
            self._squares, self._counter,
        )  # fmt: skip
        hidden = len(self._constants["LAYERS"])
        launch_phases(
            critic_epoch_kernel, arguments, epochs * minibatches * (2 * hidden + 2), self.programs, self.fused,
            X_ROWS=x.stride(0) // latent, **self._constants, **self._options,
        )  # fmt: skip
        step += self._alive[1:].sum(0)
        return EpochResult((self._losses.sum(2) / self._divisor).mean(0), self._norms[-1], self._alive[-1] != 0)
