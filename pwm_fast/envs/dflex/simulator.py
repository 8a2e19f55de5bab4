"""The torch front of the dynamics: one control step (1/60 s), differentiable in state and command."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
import warp as wp

from pwm_fast.envs.dflex import dynamics
from pwm_fast.envs.dflex.model import RobotModel

CONTROL_STEP = 1.0 / 60.0


def _model_to_warp(model: RobotModel) -> dynamics.Model:
    m = dynamics.Model()
    for name in dynamics.Model.cls.__annotations__:
        value = getattr(model, name, None)
        if value is None:
            continue
        dtype = dynamics.Model.vars[name].type.dtype if isinstance(dynamics.Model.vars[name].type, wp.array) else None
        setattr(m, name, wp.vec3(*value.tolist()) if dtype is None else wp.array(value, dtype=dtype))
    pairs = []
    for d in range(model.nqd):
        a = d
        while a >= 0:
            pairs.append((d, a))
            a = model.dof_parent[a]
    pairs = np.asarray(pairs, np.int32)
    m.pair_dof, m.pair_ancestor = (wp.array(np.ascontiguousarray(pairs[:, i]), dtype=int) for i in (0, 1))
    m.segment_muscle = wp.array(model.segments.muscle, dtype=int)
    m.segment_links = wp.array(model.segments.links, dtype=wp.vec2i)
    m.segment_start = wp.array(model.segments.start, dtype=wp.vec3)
    m.segment_end = wp.array(model.segments.end, dtype=wp.vec3)
    return m


def _adjoint(argument):
    """The gradient arrays of a launch argument, in the form Warp expects for adj_inputs."""
    if isinstance(argument, wp.array):
        return argument.grad
    if hasattr(argument, "_cls"):
        out = argument._cls()
        for name in argument._cls.vars:
            value = getattr(argument, name)
            if isinstance(value, wp.array) and value.grad is not None:
                setattr(out, name, value.grad)
        return out
    return argument


class BatchSlice:
    """Buffers and recorded launches for a contiguous part of the batch, run by one thread."""

    def __init__(self, model: RobotModel, num_envs: int, substeps: int, refresh: int):
        n, links, nd = num_envs, model.num_links + 1, model.nqd
        self.n, self.substeps, self.refresh = n, substeps, refresh
        self.dt = CONTROL_STEP / substeps
        self.kernels = dynamics.kernels(dynamics.Features.of(model))
        self.model = _model_to_warp(model)

        def array(shape, dtype=float):
            return wp.zeros(shape, dtype=dtype, requires_grad=True)

        s = dynamics.Scratch()
        s.rot = array((n, links), wp.quat)
        s.axis_w, s.axis_v = array((n, nd), wp.vec3), array((n, nd), wp.vec3)
        for name in ("pos", "com", "w", "v", "joint_w", "joint_v", "acc_w", "acc_v", "torque", "force"):
            setattr(s, name, array((n, links), wp.vec3))
        s.sum_I, s.sum_C, s.sum_M = (array((n, links), wp.mat33) for _ in range(3))
        H, tau, qdd = array((n, nd, nd)), array((n, nd)), array((n, nd))
        s.H, s.tau, s.qdd = H, tau, qdd
        s.H_grad, s.tau_grad, s.qdd_grad, s.y = H.grad, tau.grad, qdd.grad, wp.zeros((n, nd), dtype=float)
        self.scratch = s
        self._q, self._qd = array((substeps + 1, n, model.nq)), array((substeps + 1, n, nd))
        self._motor, self._tension = array((n, nd)), array((n, max(len(model.tension), 1)))
        self._L = wp.zeros((substeps // refresh, n, nd, nd), dtype=float)
        torch_view = lambda a: wp.to_torch(a, requires_grad=False)  # noqa: E731
        self.q, self.qd, self.motor, self.tension = map(torch_view, (self._q, self._qd, self._motor, self._tension))
        self.L, self.H_grad = torch_view(self._L), torch_view(H.grad)
        self.q_grad, self.qd_grad = torch_view(self._q.grad), torch_view(self._qd.grad)
        self.motor_grad, self.tension_grad = torch_view(self._motor.grad), torch_view(self._tension.grad)
        args = [self.model, self.dt, refresh, self._q, self._qd, self._motor, self._tension, self._L, s]
        self._forward = wp.launch(self.kernels.control_step, n, inputs=args, record_cmd=True)
        self._backward: list | None = None

    def forward(self) -> None:
        self._forward.launch()

    def _record(self, kernel, args):
        """An adjoint launch. It first replays the functions the kernel calls, stores included: no forward launch
        needed."""
        adjoints = [_adjoint(a) for a in args]
        return wp.launch(kernel, self.n, inputs=args, adj_inputs=adjoints, adjoint=True, record_cmd=True)

    def prepare_backward(self) -> None:
        """Record the adjoint launches, once, on the caller's thread: Warp compiles and loads a kernel at its first
        launch, and two threads that load the same one at once leave the first with code that is gone."""
        if self._backward is None:
            self._backward = []
            for i in reversed(range(self.substeps)):
                args = [self.model, self.dt, self._q[i], self._qd[i], self._motor, self._tension]
                args += [self._L[i // self.refresh], self.scratch, self._q[i + 1], self._qd[i + 1]]
                self._backward.append(self._record(self.kernels.substep, args))
                if i % self.refresh == 0:
                    args = [self.model, self._q[i], self.scratch]
                    self._backward.append(self._record(self.kernels.mass_matrix, args))

    def backward(self) -> None:
        """Adjoint of forward(): from q_grad[-1], qd_grad[-1] to q_grad[0], qd_grad[0], motor_grad, tension_grad.

        After `prepare_backward`.
        """
        assert self._backward is not None
        for command in self._backward:
            command.launch()


class Simulator:
    """``num_envs`` copies of one robot; slices of the batch run on ``threads`` threads, with results that do not
    depend on it.

    ``step`` is differentiable in q [N, nq], qd [N, nqd], motor (generalised forces, N m, [N, nqd]) and muscle
    tension (N, [N, M]).
    ``substeps`` per control step; the mass matrix is rebuilt every ``refresh`` substeps (default: once per control
    step).
    """

    def __init__(
        self, model: RobotModel, num_envs: int, substeps: int, refresh: int | None = None, threads: int | None = None
    ):
        if num_envs < 1:
            raise ValueError(f"num_envs must be >= 1, got {num_envs}")
        refresh = refresh or substeps
        if substeps < 1 or substeps % refresh:
            raise ValueError(f"refresh must divide substeps, got refresh={refresh}, substeps={substeps}")
        threads = min(2, os.cpu_count() or 1) if threads is None else threads
        if threads < 1:
            raise ValueError(f"threads must be >= 1, got {threads}")
        wp.init()
        self.model, self.num_envs, self.threads = model, num_envs, min(threads, num_envs)
        bounds = np.linspace(0, num_envs, self.threads + 1).astype(int)
        self.spans = [slice(a, b) for a, b in pairwise(bounds)]
        self.parts = [BatchSlice(model, b.stop - b.start, substeps, refresh) for b in self.spans]
        self.pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._no_motor = torch.zeros(num_envs, model.nqd)
        self._no_tension = torch.zeros(num_envs, self.parts[0].tension.shape[1])

    def each(self, function):
        """function(part, span) for every slice of the batch; grad mode is per thread, so each worker turns it off
        itself."""
        function = torch.no_grad()(function)
        if self.pool is None:
            return [function(self.parts[0], self.spans[0])]
        return list(self.pool.map(function, self.parts, self.spans))

    def step(self, q, qd, motor=None, tension=None):
        """(q, qd) one control step later."""
        motor = self._no_motor if motor is None else motor
        tension = self._no_tension if tension is None else tension
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, qd, motor, tension)):
            return _ControlStep.apply(q, qd, motor, tension, self)
        return self.simulate(q, qd, motor, tension, keep=False)[:2]

    def simulate(self, q, qd, motor, tension, keep):
        """The forward pass; with ``keep``, also what its adjoint needs from each slice."""
        q1, qd1 = torch.empty_like(q), torch.empty_like(qd)
        if keep:
            for part in self.parts:
                part.prepare_backward()

        def run(part, span):
            part.q[0].copy_(q[span])
            part.qd[0].copy_(qd[span])
            part.motor.copy_(motor[span])
            part.tension.copy_(tension[span])
            part.forward()
            q1[span], qd1[span] = part.q[-1], part.qd[-1]
            return [x.clone() for x in (part.q, part.qd, part.motor, part.tension, part.L)] if keep else None

        return q1, qd1, self.each(run)


class _ControlStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, qd, motor, tension, simulator):
        q1, qd1, ctx.saved = simulator.simulate(q, qd, motor, tension, keep=True)
        ctx.simulator = simulator
        return q1, qd1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q1, grad_qd1):
        sim = ctx.simulator
        first = sim.parts[0]
        grads = [
            torch.empty(sim.num_envs, g.shape[-1])
            for g in (first.q_grad, first.qd_grad, first.motor_grad, first.tension_grad)
        ]
        saved = dict(zip((s.start for s in sim.spans), ctx.saved))

        def run(part, span):
            for buffer, value in zip((part.q, part.qd, part.motor, part.tension, part.L), saved[span.start]):
                buffer.copy_(value)
            for gradient in (part.q_grad, part.qd_grad, part.motor_grad, part.tension_grad, part.H_grad):
                gradient.zero_()
            part.q_grad[-1].copy_(grad_q1[span])
            part.qd_grad[-1].copy_(grad_qd1[span])
            part.backward()
            for out, value in zip(grads, (part.q_grad[0], part.qd_grad[0], part.motor_grad, part.tension_grad)):
                out[span] = value

        sim.each(run)
        return *grads, None
