"""The torch front of the physics: one control step (1/60 s), bare or as a task's whole environment step."""

import os
from itertools import pairwise
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
import warp as wp
from torch import Tensor

from pwm_fast.envs.dflex.batch_slice import LANES, BatchSlice, Tape
from pwm_fast.envs.dflex.model import RobotModel
from pwm_fast.envs.dflex.program import Crew
from pwm_fast.envs.dflex.rows import Rows, Stages
from pwm_fast.envs.dflex.warp_setup import start_warp

CONTROL_STEP = 1.0 / 60.0
DTYPES = {float: torch.float32, wp.float32: torch.float32, wp.int64: torch.long, wp.uint8: torch.bool}
_LOADING = Lock()  # Warp compiles and loads kernels while launches are recorded; one thread at a time


class Front(NamedTuple):
    """Names of ``Rows``: what a step reads, what it is differentiable in, its differentiable and its other results, and
    the inputs that its adjoint reads."""

    reads: tuple[str, ...]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    facts: tuple[str, ...]
    kept: tuple[str, ...]


BARE = Front((), ("q0", "qd0", "action"), ("q1", "qd1"), (), ())
TASK = Front(
    reads=("progress0", "episode", "starts_q", "starts_qd"),
    inputs=("q0", "qd0", "action", "obs0"),
    results=("q1", "qd1", "obs1", "reward", "final_obs"),
    facts=("action1", "progress1", "final_q", "terminated", "truncated"),
    kept=("action", "obs0"),
)


class Simulator:
    """``num_envs`` copies of one robot on ``threads`` threads (default 2 where there are two cores).

    Threads share the batch in whole bundles of 16 environments; results do not depend on how many there are.
    The mass matrix is rebuilt every ``refresh`` of the ``substeps`` in a control step (default: once).
    ``stages``: what surrounds the dynamics (default: nothing). With a task's, call ``run``, else ``step``.
    Not for two threads at once.
    """

    def __init__(
        self,
        model: RobotModel,
        num_envs: int,
        substeps: int,
        refresh: int | None = None,
        threads: int | None = None,
        stages: Stages | None = None,
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
        with _LOADING, wp.ScopedDevice("cpu"):
            stages = stages or Stages()
            rows = stages.rows(model)
            self.parts = [
                BatchSlice(model, a, b - a, substeps, refresh, CONTROL_STEP, stages, rows)
                for a, b in pairwise(bounds.tolist())
            ]
            self.crew = Crew(self.threads - 1)
        self._rows = type(self.parts[0].work.arguments.r).from_buffer_copy(rows.__ctype__())
        self._words = np.frombuffer(self._rows, np.uint64).data
        self._width = stages.widths[0]
        self.front = BARE if stages.observes is None else TASK
        self._shapes = {
            name: ((num_envs, *getattr(rows, name).shape[1:]), DTYPES[var.type.dtype])
            for name, var in Rows.vars.items()
            if isinstance(var.type, wp.array)
        }
        self._no_gradients = [(f"g_{name}", torch.zeros(self._shapes[name][0])) for name in self.front.results]
        self._results = [(name, self._shapes[name]) for name in self.front.results + self.front.facts]
        self._word = {name: getattr(type(self._rows), name).offset // 8 for name in Rows.vars}

    def step(self, q: Tensor, qd: Tensor, command: Tensor, origin: Tensor | None = None) -> tuple[Tensor, ...]:
        """(q [N, nq], qd [N, nqd]) one control step later, differentiable in q, qd and command.

        command [N, C]: muscle tensions (N), or torques (N m) on the last C freedoms, held over the step.
        origin [N, 2] (x, z; a robot without a free root: [N, 1], x): simulate relative to this place, held constant.
        The same dynamics, since the ground is homogeneous, but float32 keeps its digits far from the world's origin.
        Raises ValueError for a wrong shape.
        """
        widest = self.model.num_commands
        if command.ndim != 2 or len(command) != self.num_envs or command.shape[1] > widest:
            raise ValueError(f"command must have shape ({self.num_envs}, at most {widest}), got {tuple(command.shape)}")
        reads = {} if origin is None else {"origin": origin.detach().float()}
        inputs = {"q0": q.float(), "qd0": qd.float(), "action": command.float()}
        self._shapes["action"] = tuple(command.shape), torch.float32
        found = self.run(reads, inputs, recentre=int(origin is not None))
        return found["q1"], found["qd1"]

    def run(
        self, reads: dict[str, Tensor], inputs: dict[str, Tensor], recentre: int, show: int = 0
    ) -> dict[str, Tensor]:
        """One step, differentiable in ``inputs``; all its results (see ``Front`` and ``Rows``), by name.

        Raises ValueError for a wrong shape or type: the kernels check nothing."""
        for name, x in (*reads.items(), *inputs.items()):
            shape, dtype = self._shapes[name]
            if x.shape != shape or x.dtype != dtype:
                raise ValueError(f"{name} must be {shape} of {dtype}, got {tuple(x.shape)} of {x.dtype}")
        front = self.front
        others = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self._results}
        others.update(reads)
        self._rows.recentre, self._rows.show = recentre, show
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs.values()):
            results = _Step.apply(self, others, *inputs.values())
            return {**others, **dict(zip(front.results, results))}
        self._run([part.work.program for part in self.parts], [part.work for part in self.parts], {**inputs, **others})
        return others

    def _lease(self) -> list["_Lease"]:
        """A tape for every slice, which is ready to be differentiated."""
        if not all(part.free_tapes and part.has_adjoint for part in self.parts):
            with _LOADING, wp.ScopedDevice("cpu"):
                for part in self.parts:
                    part.prepare_backward()
                return [_Lease(part) for part in self.parts]
        return [_Lease(part) for part in self.parts]

    def status(self) -> tuple[int, int]:
        """How many environments the last task step finished, and how many entries of its actions were not finite."""
        return sum(part.status[0] for part in self.parts), sum(part.status[1] for part in self.parts)

    def _run(self, programs: list, targets: list, tensors: dict[str, Tensor]) -> None:
        """Aim the ``targets`` (tapes or adjoints) at torch's memory and run."""
        held = [x.contiguous() for x in tensors.values()]
        for name, x in zip(tensors, held):
            self._words[self._word[name]] = x.data_ptr()
        width = tensors["g_action" if "g_action" in tensors else "action"].shape[1]
        if width != self._width:
            self._width = width
            for array in (self._rows.action, self._rows.g_action):
                array.shape[1], array.strides[0] = width, 4 * width
        for target in targets:
            target.arguments.r = self._rows
        self.crew.run(programs)


class _Lease:
    """Keeps a tape out of the pool for as long as the graph that needs it lives."""

    def __init__(self, part: BatchSlice):
        self.part, self.tape = part, part.lease()

    def __del__(self):
        self.part.free_tapes.append(self.tape)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, simulator, others, *inputs):
        ctx.leases = simulator._lease()
        tapes: list[Tape] = [lease.tape for lease in ctx.leases]
        front, ctx.simulator, ctx.show = simulator.front, simulator, simulator._rows.show
        tensors = dict(zip(front.inputs, inputs))
        ctx.shapes = [(f"g_{name}", x.shape) for name, x in tensors.items()]
        ctx.save_for_backward(*(tensors[name] for name in front.kept))
        ctx.set_materialize_grads(False)
        simulator._run([tape.program for tape in tapes], tapes, {**tensors, **others})
        return tuple(others[name] for name in front.results)

    @staticmethod
    def backward(ctx, *grads):
        if (
            torch.is_grad_enabled()
        ):  # torch's own guard, once_differentiable, takes as long as the rest of this function
            raise RuntimeError("the physics is differentiable once, not twice: leave out create_graph=True")
        simulator, front = ctx.simulator, ctx.simulator.front
        adjoints = [part.adjoint_of(lease.tape) for part, lease in zip(simulator.parts, ctx.leases)]
        tensors = {name: torch.empty(shape) for name, shape in ctx.shapes}
        results = tuple(tensors.values())
        tensors.update(zip(front.kept, ctx.saved_tensors))
        for (name, zeros), grad in zip(simulator._no_gradients, grads):
            tensors[name] = zeros if grad is None else grad
        simulator._rows.show = ctx.show
        simulator._run([adjoint.program for adjoint in adjoints], adjoints, tensors)
        return None, None, *results
