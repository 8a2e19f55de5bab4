"""Device buffers and launches for a contiguous part of the batch, run by one thread.

Environments travel in bundles: torch's [N, k] becomes [groups, k, LANES], environment n being lane n % LANES of group
n // LANES. Lanes beyond the batch rest in the start pose and are never read.
"""

import torch
import warp as wp
from torch import Tensor

from pwm_fast.envs.dflex import dynamics
from pwm_fast.envs.dflex.lanes import algebra
from pwm_fast.envs.dflex.model import RobotModel
from pwm_fast.envs.dflex.structs import Features, Model, model_to_warp, scratch_struct

LANES = 16  # one AVX-512 register, two of AVX2, four of NEON


def _torch(array: wp.array) -> Tensor:
    return wp.to_torch(array, requires_grad=False)


class Tape:
    """One control step of a slice: q, qd of every substep and the factor of every refresh of the mass matrix."""

    def __init__(self, part: "BatchSlice", with_gradients: bool = False):
        model, groups, substeps = part.model, part.groups, part.substeps
        shapes = {
            "q": (substeps + 1, groups, model.nq),
            "qd": (substeps + 1, groups, model.nqd),
            "motor": (groups, model.nqd),
            "tension": (groups, max(len(model.tension), 1)),
            "L": (substeps // part.refresh, groups, part.entries),
        }
        lane = algebra(LANES).Lane
        self.arrays = {k: wp.zeros(shape, dtype=lane, requires_grad=with_gradients) for k, shape in shapes.items()}
        self.q, self.qd, self.motor, self.tension, self.factor = map(_torch, self.arrays.values())
        self.q[0] = torch.from_numpy(model.start_q)[None, :, None]
        self.origin = torch.zeros(groups, part.origin_size, LANES)
        arguments = [part.tables, part.dt, part.refresh, *self.arrays.values(), part.scratch]
        self.launch = wp.launch(part.kernels.control_step, groups, inputs=arguments, record_cmd=True)

    def copy_from(self, other: "Tape") -> None:
        for mine, theirs in zip(
            (self.q[:-1], self.qd[:-1], self.motor, self.tension, self.factor),
            (other.q[:-1], other.qd[:-1], other.motor, other.tension, other.factor),
        ):
            mine.copy_(theirs)


class BatchSlice:
    """Scratch arrays shared by all steps, and the pool of tapes. Not safe for two threads at once."""

    def __init__(self, model: RobotModel, num_envs: int, substeps: int, refresh: int, control_step: float):
        self.model, self.n, self.substeps, self.refresh = model, num_envs, substeps, refresh
        self.dt = control_step / substeps
        self.groups = -(-num_envs // LANES)
        self.kernels = dynamics.kernels(Features.of(model), LANES)
        self.tables = model_to_warp(model)
        self.entries = self.tables.ancestor.shape[0]
        self.origin_size = 2 if model.has_free_root else 1
        self.scratch, self.scratch_grad = self._scratch()
        self.work = Tape(self, with_gradients=True)  # what the adjoint runs on, and steps that nobody differentiates
        self.free_tapes: list[Tape] = []
        # gradients must be the arrays' own: only then does Warp's adjoint of a store clear what it has consumed
        self.grad = {name: _torch(array.grad) for name, array in self.work.arrays.items()}
        self._adjoint: list | None = None

    def _scratch(self):
        """Working arrays and their gradients; one row, since the groups of a slice run one after another."""
        struct = scratch_struct(LANES)
        primal, gradient = struct(), struct()
        own = {"H", "H_grad", "tau_grad", "qdd_grad", "y"}
        per_dof = {"tau", "qdd", "axis_w", "axis_v", "dof_torque", "dof_force"}
        shapes = {
            name: (1, self.model.nqd if name in per_dof else self.model.num_links + 1)
            for name in struct.vars
            if name not in own
        }
        shapes["H"] = (self.groups, self.entries)
        for name, shape in shapes.items():
            array = wp.zeros(shape, dtype=struct.vars[name].type.dtype, requires_grad=True)
            setattr(primal, name, array)
            setattr(gradient, name, array.grad)
        primal.H_grad, primal.tau_grad, primal.qdd_grad = gradient.H, gradient.tau, gradient.qdd
        primal.y = wp.zeros(shapes["tau"], dtype=algebra(LANES).Lane)
        return primal, gradient

    # -- layout --------------------------------------------------------------------------------------------------------

    def pack(self, x: Tensor, into: Tensor) -> None:
        """x [n, k] -> into [groups, k, LANES]."""
        full, rest = divmod(self.n, LANES)
        if full:
            into[:full].copy_(x[: full * LANES].view(full, LANES, -1).transpose(1, 2))
        if rest:
            into[full, :, :rest].copy_(x[full * LANES :].T)

    def unpack(self, x: Tensor, into: Tensor) -> None:
        """x [groups, k, LANES] -> into [n, k]."""
        full, rest = divmod(self.n, LANES)
        if full:
            into[: full * LANES].view(full, LANES, -1).copy_(x[:full].transpose(1, 2))
        if rest:
            into[full * LANES :].copy_(x[full, :, :rest].T)

    def _move(self, q: Tensor, qd: Tensor, origin: Tensor, sign: float) -> None:
        """Coordinates relative to (o_x, 0, o_z) for sign -1 and back for +1: p + sign o, v - sign omega x o."""
        x = origin[:, 0]
        q[:, 0].add_(x, alpha=sign)
        if self.origin_size == 2:
            z = origin[:, 1]
            q[:, 2].add_(z, alpha=sign)
            qd[:, 3].addcmul_(qd[:, 1], z, value=-sign)
            qd[:, 4].addcmul_(qd[:, 2], x, value=-sign).addcmul_(qd[:, 0], z, value=sign)
            qd[:, 5].addcmul_(qd[:, 1], x, value=sign)

    def _move_adjoint(self, qd_grad: Tensor, origin: Tensor, sign: float) -> None:
        """Adjoint of _move: omega's gradient loses sign o x (v's gradient)."""
        if self.origin_size == 2:
            x, z = origin[:, 0], origin[:, 1]
            qd_grad[:, 0].addcmul_(z, qd_grad[:, 4], value=sign)
            qd_grad[:, 1].addcmul_(z, qd_grad[:, 3], value=-sign).addcmul_(x, qd_grad[:, 5], value=sign)
            qd_grad[:, 2].addcmul_(x, qd_grad[:, 4], value=-sign)

    # -- running -------------------------------------------------------------------------------------------------------

    def lease(self) -> Tape:
        """A tape that nobody uses; give it back by appending it to ``free_tapes``."""
        return self.free_tapes.pop() if self.free_tapes else Tape(self)

    def forward(self, tape: Tape, q: Tensor, qd: Tensor, command: Tensor, origin: Tensor | None, out) -> None:
        """One control step from q, qd [n, .]; the result goes to out = (q, qd)."""
        self.pack(q, tape.q[0])
        self.pack(qd, tape.qd[0])
        driven = tape.tension if len(self.model.tension) else tape.motor
        self.pack(command, driven[:, driven.shape[1] - command.shape[1] :])
        if origin is None:
            tape.origin.zero_()
        else:
            self.pack(origin, tape.origin)
            self._move(tape.q[0], tape.qd[0], tape.origin, -1.0)
        tape.launch.launch()
        if origin is not None:
            self._move(tape.q[-1], tape.qd[-1], tape.origin, 1.0)
        self.unpack(tape.q[-1], out[0])
        self.unpack(tape.qd[-1], out[1])

    def backward(self, tape: Tape, grad_q1: Tensor, grad_qd1: Tensor, out) -> None:
        """Adjoint of forward(): the gradients of q1, qd1 become those of q, qd, command in ``out``."""
        work, grad = self.work, self.grad
        if tape is not work:
            work.copy_from(tape)
        for name in ("q", "qd"):
            grad[name][0].zero_()
        grad["motor"].zero_()
        grad["tension"].zero_()
        self.pack(grad_q1, grad["q"][-1])
        self.pack(grad_qd1, grad["qd"][-1])
        self._move_adjoint(grad["qd"][-1], tape.origin, 1.0)
        assert self._adjoint is not None, "prepare_backward() comes first"
        for launch in self._adjoint:
            launch.launch()
        self._move_adjoint(grad["qd"][0], tape.origin, -1.0)
        driven = grad["tension"] if len(self.model.tension) else grad["motor"]
        self.unpack(grad["q"][0], out[0])
        self.unpack(grad["qd"][0], out[1])
        self.unpack(driven[:, driven.shape[1] - out[2].shape[1] :], out[2])

    def prepare_backward(self) -> None:
        """Record the adjoint launches, last substep first. Each replays its kernel: no forward launch is needed.

        Call it on one thread for all slices: Warp compiles and loads a kernel at its first launch, and two threads that
        load the same one at once leave the first with code that is gone.
        """
        if self._adjoint is not None:
            return
        a, none = self.work.arrays, Model()
        grad = {name: array.grad for name, array in a.items()}
        launches = []

        def record(kernel, arguments, adjoints):
            launches.append(
                wp.launch(kernel, self.groups, inputs=arguments, adj_inputs=adjoints, adjoint=True, record_cmd=True)
            )

        for i in reversed(range(self.substeps)):
            before, after = [a["q"][i], a["qd"][i]], [a["q"][i + 1], a["qd"][i + 1]]
            middle = [a["motor"], a["tension"], a["L"]]
            grad_before, grad_after = [grad["q"][i], grad["qd"][i]], [grad["q"][i + 1], grad["qd"][i + 1]]
            grad_middle = [grad["motor"], grad["tension"], grad["L"]]
            record(
                self.kernels.substep,
                [self.tables, self.dt, i // self.refresh, *before, *middle, self.scratch, *after],
                [none, 0.0, 0, *grad_before, *grad_middle, self.scratch_grad, *grad_after],
            )
            if i % self.refresh == 0:
                record(
                    self.kernels.mass_matrix,
                    [self.tables, a["q"][i], self.scratch],
                    [none, grad["q"][i], self.scratch_grad],
                )
        self._adjoint = launches
