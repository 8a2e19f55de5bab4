"""The torch front of the dynamics: one control step (1/60 s), differentiable in state and command."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast.envs.dflex.batch_slice import LANES, BatchSlice, Tape
from pwm_fast.envs.dflex.model import RobotModel
from pwm_fast.envs.dflex.warp_setup import start_warp

CONTROL_STEP = 1.0 / 60.0
_LOADING = Lock()  # Warp compiles and loads kernels while launches are recorded; one thread at a time


class Simulator:
    """``num_envs`` copies of one robot on ``threads`` threads (default 2 where there are two cores).

    Threads share the batch in whole bundles of 16 environments; results do not depend on how many there are.
    The mass matrix is rebuilt every ``refresh`` of the ``substeps`` in a control step (default: once).
    """

    def __init__(
        self,
        model: RobotModel,
        num_envs: int,
        substeps: int,
        refresh: int | None = None,
        threads: int | None = None,
    ):
        if num_envs < 1:
            raise ValueError(f"num_envs must be >= 1, got {num_envs}")
        refresh = substeps if refresh is None else refresh
        if substeps < 1 or refresh < 1 or substeps % refresh:
            raise ValueError(f"refresh must divide substeps, got refresh={refresh}, substeps={substeps}")
        threads = min(2, os.cpu_count() or 1) if threads is None else threads
        if threads < 1:
            raise ValueError(f"threads must be >= 1, got {threads}")
        start_warp()
        groups = -(-num_envs // LANES)
        self.model, self.num_envs, self.threads = model, num_envs, min(threads, groups)
        bounds = np.minimum(np.linspace(0, groups, self.threads + 1).astype(int) * LANES, num_envs)
        self.spans = [slice(a, b) for a, b in pairwise(bounds.tolist())]
        with _LOADING:
            self.parts = [BatchSlice(model, s.stop - s.start, substeps, refresh, CONTROL_STEP) for s in self.spans]
        self.pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def step(self, q: Tensor, qd: Tensor, command: Tensor, origin: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(q [N, nq], qd [N, nqd]) one control step later, differentiable in q, qd and command.

        command [N, C]: muscle tensions (N), or torques (N m) on the last C freedoms, held over the step.
        origin [N, 2] (x, z; a robot without a free root: [N, 1], x): simulate relative to this place, held constant.
        The same dynamics, since the ground is homogeneous, but float32 keeps its digits far from the world's origin.
        """
        if torch.is_grad_enabled() and (q.requires_grad or qd.requires_grad or command.requires_grad):
            return _ControlStep.apply(q, qd, command, origin, self)
        out = torch.empty_like(q), torch.empty_like(qd)
        self.each(lambda part, span: part.forward(part.work, *_rows(span, q, qd, command, origin), _rows(span, *out)))
        return out

    def each(self, function: Callable[[BatchSlice, slice], Any]) -> list:
        """function(part, span) for every slice of the batch; grad mode is per thread, so each worker turns it off."""
        function = torch.no_grad()(function)
        if self.pool is None:
            return [function(self.parts[0], self.spans[0])]
        return list(self.pool.map(function, self.parts, self.spans))


def _rows(span: slice, *tensors: Tensor | None) -> list:
    return [None if x is None else x[span] for x in tensors]


class _Lease:
    """Keeps a tape out of the pool for as long as the graph that needs it lives."""

    def __init__(self, part: BatchSlice):
        self.part, self.tape = part, part.lease()

    def __del__(self):
        self.part.free_tapes.append(self.tape)


class _ControlStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, qd, command, origin, simulator):
        out = torch.empty_like(q), torch.empty_like(qd)
        with _LOADING:
            for part in simulator.parts:
                part.prepare_backward()
            leases = [_Lease(part) for part in simulator.parts]
        tapes: dict[int, Tape] = {span.start: lease.tape for span, lease in zip(simulator.spans, leases)}

        def run(part, span):
            part.forward(tapes[span.start], *_rows(span, q, qd, command, origin), _rows(span, *out))

        simulator.each(run)
        ctx.simulator, ctx.leases, ctx.tapes, ctx.width = simulator, leases, tapes, command.shape[1]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q1, grad_qd1):
        grads = torch.empty_like(grad_q1), torch.empty_like(grad_qd1), grad_q1.new_empty(len(grad_q1), ctx.width)

        def run(part, span):
            part.backward(ctx.tapes[span.start], *_rows(span, grad_q1, grad_qd1), _rows(span, *grads))

        ctx.simulator.each(run)
        return *grads, None, None
