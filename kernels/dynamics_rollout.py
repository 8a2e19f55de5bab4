"""H imagined steps z' = F(z, a), a = tanh(mu(z) + sigma eps) in one launch, and their gradient in one (PWM Eq. 6).

`dynamics_rollout` is the definition; `DynamicsRollout` plans the persistent kernels (`rollout_forward`,
`rollout_backward`) for one shape and runs them. Weights are read from the second-level cache by every phase: 48M's
dynamics (12.3 MB in bfloat16) stay there.

Cost model, all on paper and unmeasured. Forward: H (actor layers + dynamics layers) + 1 phases, 113 for H = 16;
backward H (dynamics layers) + 1 = 49 (113 where the actors' input is not detached). A phase costs one barrier (about 1
microsecond) plus ceil(tiles / programs) (BM + BN) K operands read by one program at about 100 GB/s: 64 rows of
1792 x 1792 in bfloat16, 230 KB, 2.1 microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pwm_fast.kernels.grid_barrier import launch_phases, new_counter, resident_programs
from pwm_fast.kernels.mish_layernorm import mish_layernorm
from pwm_fast.kernels.normed_linear import EPS, Norm, Statistics, activate, dot_options
from pwm_fast.kernels.normed_tiles import KINDS
from pwm_fast.kernels.rollout_backward import rollout_backward_kernel
from pwm_fast.kernels.rollout_forward import rollout_forward_kernel
from pwm_fast.kernels.rollout_layers import FrozenRow, plan_rollout
from pwm_fast.kernels.triton_support import interpreting, refusal

KIND_OF = {"mish": "layernorm_mish", "simnorm": "layernorm_simnorm", "none": "none"}


class Frozen(Protocol):
    """A layer of the world model: W [out, in], bias [P or 1, out], activation of `KIND_OF`, the norm's affine part."""

    weight: Tensor
    bias: Tensor
    activation: str
    ln_weight: Tensor | None
    ln_bias: Tensor | None


class Parameters(Protocol):
    """Actors' parameters: rows `flat` [P, n], views into them by name (`{i}.weight` [P, out, in], `log_std` ...)."""

    flat: Tensor

    def __getitem__(self, name: str) -> Tensor: ...


def dynamics_rollout(
    z: Tensor,
    noise: Tensor,
    actor: Mapping[str, Tensor] | Parameters,
    depth: int,
    dynamics: Sequence[Frozen],
    residual: bool = False,
    detach: bool = True,
    nudge: Tensor | None = None,
    group: int = 8,
) -> tuple[Tensor, Tensor]:
    """The definition: states and actions side by side [H, P, B, Z + A] and z_H [P, B, Z], under autograd.

    z [P, B, Z], noise [P, H, B, A]; `depth` linear layers of the actors. `nudge` [P, H, B, A] is added to the actions:
    its gradient is theirs. `residual` dynamics give z's change; `detach`ed actors see z as a constant.
    """
    inputs = []
    for h in range(noise.shape[1]):
        x = z.detach() if detach else z
        for i in range(depth):
            x = torch.einsum("pbi,poi->pbo", x, actor[f"{i}.weight"]) + actor[f"{i}.bias"][:, None]
            if i < depth - 1:
                x = mish_layernorm(x, actor[f"{i}.ln.weight"], actor[f"{i}.ln.bias"])
        action = torch.tanh(x + actor["log_std"].exp()[:, None] * noise[:, h])
        action = action if nudge is None else action + nudge[:, h]
        y = torch.cat([z, action], -1)
        inputs.append(y)
        for layer in dynamics:
            y = torch.einsum("pbi,oi->pbo", y, layer.weight) + layer.bias[:, None]
            if layer.activation != "none":
                assert layer.ln_weight is not None and layer.ln_bias is not None
                affine = (t.expand(len(y), -1) for t in (layer.ln_weight, layer.ln_bias))
                y = activate(y, Norm(KIND_OF[layer.activation], *affine), group)
        z = z + y if residual else y
    return torch.stack(inputs), z


class ActorRows(NamedTuple):
    """What one hidden layer of the actors left, for their backward pass in one batch over all steps."""

    pre: Tensor  # [P, H * B, out]
    mean: Tensor  # [P, H * B] of mish(pre)
    rstd: Tensor  # [P, H * B]


class DynamicsRollout:
    """The persistent rollout for P policies, H steps, B states, on fixed buffers: fit for capture in a CUDA graph.

    `dynamics` are the world model's frozen layers, the tasks folded into their biases; they are copied, W in bfloat16
    where `precision` is "bf16". The buffers' dtype is that of `actor.flat` (float32; float64 in the interpreter).
    `inputs` [H + 1, P, B, Z + A] holds z_h and a_h side by side (a_H is unused), `latents` [P, H + 1, B, Z] the same
    states, `d_action` [P, H, B, A] the actions' gradients; each call overwrites them. `fused` launches once per
    direction, else once per phase (the default in the interpreter); `programs` must all fit on the device at once.
    """

    def __init__(
        self,
        dynamics: Sequence[Frozen],
        actor: Parameters,
        actor_widths: Sequence[int],
        policies: int,
        horizon: int,
        batch: int,
        residual: bool = False,
        group: int = 8,
        precision: str = "fp32",
        programs: int | None = None,
        fused: bool | None = None,
    ):
        flat = actor.flat
        if reason := refusal(flat, float64=True):
            raise RuntimeError(reason)
        z, a = actor_widths[0], actor_widths[-1]
        self._check(dynamics, z, a, policies, residual, group)
        if flat.dtype not in (torch.float32, torch.float64) or flat.shape[0] != policies:
            raise ValueError(f"actors must be float32 rows of {policies} policies, got {flat.dtype} {(*flat.shape,)}")
        self.programs = resident_programs(flat.device) if programs is None else programs
        self.fused = not interpreting if fused is None else fused
        self._shape = {"P": policies, "H": horizon, "B": batch, "Z": z, "A": a, "GROUP": group, "EPS": EPS}
        self._options = dot_options(flat.dtype, precision)
        kept = torch.bfloat16 if precision == "bf16" and flat.dtype is torch.float32 else flat.dtype
        self._world, self._vectors, rows = self._pack(dynamics, flat, kept)

        def offset(name: str) -> int:
            return (actor[name].data_ptr() - flat.data_ptr()) // flat.element_size()

        plan = plan_rollout(actor_widths, offset, flat.stride(0), rows, policies, horizon, batch, self.programs)
        self._actor_layers, self._log_std, self._dz = plan.actor, offset("log_std"), plan.dz
        self._constants = {"ACTOR": tuple(map(tuple, plan.actor)), "DYNAMICS": tuple(map(tuple, plan.dynamics))}
        new = flat.new_zeros
        self.inputs = new(horizon + 1, policies, batch, z + a)
        self.latents = new(policies, horizon + 1, batch, z)
        self.d_action = new(policies, horizon, batch, a)
        self._pre = new(plan.sizes["pre"], dtype=kept)
        self._stats, self._sums, self._grads = (new(plan.sizes[name]) for name in ("stats", "sums", "grads"))
        if (largest := max(t.numel() for t in (self._pre, self.inputs, self.latents))) >= 2**31:
            raise ValueError(f"a buffer of {largest} elements exceeds 2^31: lower policies, batch or horizon")
        self._counter = new_counter(flat.device)

    @staticmethod
    def _check(dynamics: Sequence[Frozen], z: int, a: int, policies: int, residual: bool, group: int) -> None:
        widths = [z + a, *(layer.weight.shape[0] for layer in dynamics)]
        kinds = [layer.activation for layer in dynamics]
        last = "none" if residual else "simnorm"
        if len(kinds) < 2 or kinds != ["mish"] * (len(kinds) - 1) + [last] or widths[-1] != z:
            raise ValueError(f"dynamics must be mish layers and a {last} layer of width {z}, got {kinds} {widths[1:]}")
        if last == "simnorm" and (z % group or group & (group - 1) or group > 16):
            raise ValueError(f"the simnorm group must be 2, 4, 8 or 16 and divide {z} columns, got {group}")
        for k, layer in zip(widths, dynamics):
            if layer.weight.shape[1] != k or len(layer.bias) not in (1, policies):
                raise ValueError(
                    f"W must be [out, {k}] and its bias one row or {policies}, got {tuple(layer.weight.shape)} and "
                    f"{tuple(layer.bias.shape)}"
                )

    def load(self, dynamics: Sequence[Frozen]) -> None:
        """Go on with other weights of the same shapes, copied to where the old ones were."""
        weights, vectors, _ = self._pack(dynamics, self.inputs, self._world.dtype)
        self._world.copy_(weights)
        self._vectors.copy_(vectors)

    @staticmethod
    def _pack(dynamics: Sequence[Frozen], flat: Tensor, kept: torch.dtype) -> tuple[Tensor, Tensor, list[FrozenRow]]:
        """All W in one buffer and all vectors in another; where each begins."""
        weights, vectors, rows = [], [], []
        w = v = 0
        for layer in dynamics:
            n, k = layer.weight.shape
            own = [layer.bias, *(t for t in (layer.ln_weight, layer.ln_bias) if t is not None)]
            affine = v + layer.bias.numel()
            per_policy = n if len(layer.bias) > 1 else 0
            rows.append(FrozenRow(k, n, KIND_OF[layer.activation], (w, v, per_policy, affine, affine + n)))
            weights.append(layer.weight.reshape(-1).to(flat.device, kept))
            vectors += [t.reshape(-1).to(flat) for t in own]
            w, v = w + layer.weight.numel(), v + sum(t.numel() for t in own)
        return torch.cat(weights), torch.cat(vectors), rows

    def _flat(self, actor: Parameters) -> Tensor:
        policies, stride = self._shape["P"], self._actor_layers[0].member_stride
        flat = actor.flat
        if flat.shape[0] != policies or flat.stride() != (stride, 1) or flat.dtype is not self.inputs.dtype:
            raise ValueError(
                f"actors must be {self.inputs.dtype} rows of {policies} policies, {stride} apart, as planned; got "
                f"{flat.dtype} {tuple(flat.shape)} with strides {flat.stride()}"
            )
        return flat

    def _expect(self, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(value.shape) != shape or value.dtype is not self.inputs.dtype:
            raise ValueError(f"{name} must be {self.inputs.dtype} {shape}, got {value.dtype} {tuple(value.shape)}")
        return value.contiguous()

    @torch.no_grad()
    def forward(self, z: Tensor, noise: Tensor, actor: Parameters) -> tuple[Tensor, Tensor]:
        """Imagine from z [P, B, Z] with standard normal noise [P, H, B, A]; returns `inputs` and `latents`.

        Raises ValueError on shapes other than the planned ones.
        """
        p, h, b, width, a = (self._shape[name] for name in "PHBZA")
        z = self._expect("z", z, (p, b, width))
        noise = self._expect("noise", noise, (p, h, b, a))
        self.inputs[0, ..., :width] = z
        self.latents[:, 0] = z
        layers = len(self._constants["ACTOR"]) + len(self._constants["DYNAMICS"])
        arguments = (
            self.inputs, self.latents, noise, self._flat(actor), self._world, self._vectors, self._pre, self._stats,
            self._counter,
        )  # fmt: skip
        phases = h * layers + (KINDS["none"] != self._constants["DYNAMICS"][-1][2])
        launch_phases(
            rollout_forward_kernel, arguments, phases, self.programs, self.fused, LOG_STD=self._log_std,
            **self._constants, **self._shape, **self._options,
        )  # fmt: skip
        return self.inputs, self.latents

    @torch.no_grad()
    def backward(self, d_inputs: Tensor, d_last: Tensor, actor: Parameters, detach: bool = True) -> Tensor:
        """Gradients [P, H, B, A] of the last `forward`'s actions, given those at its inputs from elsewhere (rewards).

        d_inputs [H, P, B, Z + A] is left as it is; d_last [P, B, Z] is the gradient at z_H. `detach` cuts the actors'
        own dependence on z. Raises ValueError on shapes other than the planned ones.
        """
        p, h, b, width, a = (self._shape[name] for name in "PHBZA")
        d_inputs = self._expect("d_inputs", d_inputs, (h, p, b, width + a))
        d_last = self._expect("d_last", d_last, (p, b, width))
        actors, dynamics = (len(self._constants[name]) for name in ("ACTOR", "DYNAMICS"))
        arguments = (
            d_inputs, d_last, self.d_action, self.inputs, self._flat(actor), self._world, self._vectors, self._pre,
            self._stats, self._grads, self._sums, self._counter,
        )  # fmt: skip
        phases = 1 + h * (dynamics if detach else dynamics + actors)
        launch_phases(
            rollout_backward_kernel, arguments, phases, self.programs, self.fused, DZ=self._dz, DETACH=detach,
            **self._constants, **self._shape, **self._options,
        )  # fmt: skip
        return self.d_action

    def actor_rows(self) -> list[ActorRows]:
        """Per hidden layer what the last `forward` kept of the actors, rows ordered (step, batch) within a policy."""
        p, h, b = (self._shape[name] for name in "PHB")
        out = []
        for layer in self._actor_layers[:-1]:
            rows, tiles = p * h * b, -(-layer.n // layer.tile)
            pre = self._pre[layer.pre :][: rows * layer.n].view(p, h * b, layer.n)
            stats = self._stats[layer.stats :][: 2 * rows * tiles].view(2, p, h * b, tiles)
            out.append(ActorRows(pre, *Statistics(stats, layer.tile).merged(layer.n)))
        return out
