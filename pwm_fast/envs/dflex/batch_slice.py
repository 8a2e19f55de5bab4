"""Device buffers and launches for a contiguous part of the batch, run by one thread.

Environments travel in bundles: torch's [N, k] becomes [groups, k, LANES], environment n of the slice being lane
n % LANES of group n // LANES. Lanes beyond the batch rest in the start pose and are never read.
"""

import ctypes

import torch
import warp as wp
from torch import Tensor

from pwm_fast.envs.dflex import dynamics
from pwm_fast.envs.dflex.lanes import algebra
from pwm_fast.envs.dflex.model import RobotModel
from pwm_fast.envs.dflex.program import Call, Copy, Program
from pwm_fast.envs.dflex.rows import Bundles, Rows, Stages
from pwm_fast.envs.dflex.stages import kernels as stage_kernels
from pwm_fast.envs.dflex.structs import Features, Model, model_to_warp, scratch_struct

LANES = 16  # one AVX-512 register, two of AVX2, four of NEON


def _torch(array: wp.array) -> Tensor:
    return wp.to_torch(array, requires_grad=False)


class Tape:
    """One control step of a slice: q, qd of every substep and the factor of every refresh of the mass matrix.

    ``program`` runs the step forward; ``arguments`` are those of its stages before and after the dynamics.
    """

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
        self.origin = wp.zeros((groups, 2, LANES), dtype=float)
        self.ended = wp.zeros(part.n, dtype=int)
        self.bundles = part.ends(self.arrays, self.origin, self.ended)
        inputs = [part.tables, part.dt, part.refresh, *self.arrays.values(), part.scratch]
        simulate = Call(wp.launch(part.kernels.control_step, groups, inputs=inputs, record_cmd=True))
        arrive = part.stage(part.stages.arrive, self.bundles, self.bundles)
        depart = part.stage(part.stages.depart, self.bundles, self.bundles, arrive.arguments)
        self.program, self.arguments = Program([arrive, simulate, depart]), arrive.arguments
        self.history = (
            None
            if with_gradients
            else Copy.table([(part.work.arrays[name], array) for name, array in self.arrays.items()])
        )


class BatchSlice:
    """Environments ``first`` .. ``first + num_envs - 1``: scratch arrays shared by all steps, and the pool of tapes.
    Not safe for two threads at once. ``rows`` shows the widths of torch's arrays; their addresses change every step."""

    def __init__(
        self,
        model: RobotModel,
        first: int,
        num_envs: int,
        substeps: int,
        refresh: int,
        control_step: float,
        stages: Stages,
        rows: Rows,
    ):
        self.model, self.first, self.n, self.substeps, self.refresh = model, first, num_envs, substeps, refresh
        self.terms, self.rows = stages.make_terms(), rows
        self.dt = control_step / substeps
        self.groups = -(-num_envs // LANES)
        self.kernels = dynamics.kernels(Features.of(model), LANES)
        self.stages = stage_kernels(LANES, model.has_free_root, stages.observes)
        self.tables = model_to_warp(model)
        self.entries = self.tables.ancestor.shape[0]
        self.scratch, self.scratch_grad = self._scratch()
        self.finished_and_bad = wp.zeros(2, dtype=int)
        self.status = self.finished_and_bad.numpy().data  # finished environments, non-finite actions of the last step
        self.work = Tape(self, with_gradients=True)  # what the adjoint runs on, and steps that nobody differentiates
        self.free_tapes: list[Tape] = []
        # gradients must be the arrays' own: only then does Warp's adjoint of a store clear what it has consumed
        self.grad = {name: array.grad for name, array in self.work.arrays.items()}
        self._adjoint: Adjoint | None = None

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

    def ends(self, arrays: dict[str, wp.array], origin: wp.array, ended: wp.array) -> Bundles:
        """What the stages see of a tape, or of its gradients: views of the same memory, lane by lane."""

        def view(array: wp.array) -> wp.array:
            return wp.array(ptr=array.ptr, shape=(*array.shape, LANES), dtype=float, copy=False)

        bundles = Bundles()
        bundles.q0, bundles.q1 = view(arrays["q"][0]), view(arrays["q"][self.substeps])
        bundles.qd0, bundles.qd1 = view(arrays["qd"][0]), view(arrays["qd"][self.substeps])
        bundles.driven = view(arrays["tension" if len(self.model.tension) else "motor"])
        bundles.origin, bundles.ended = origin, ended
        return bundles

    def stage(self, kernel: wp.Kernel, tape: Bundles, grad: Bundles, arguments: ctypes.Structure | None = None) -> Call:
        """A call of a kernel of ``stages`` for all environments of the slice."""
        inputs = [self.first, self.terms, self.rows, tape, grad, self.finished_and_bad]
        return Call(wp.launch(kernel, self.n, inputs=inputs, record_cmd=True), arguments)

    # -- running -------------------------------------------------------------------------------------------------------

    def lease(self) -> Tape:
        """A tape that nobody uses; give it back by appending it to ``free_tapes``."""
        return self.free_tapes.pop() if self.free_tapes else Tape(self)

    @property
    def has_adjoint(self) -> bool:
        return self._adjoint is not None

    def adjoint_of(self, tape: Tape) -> "Adjoint":
        """The adjoint of the step on ``tape``, until it is asked for another's."""
        assert self._adjoint is not None, "prepare_backward() comes first"
        self._adjoint.aim(tape)
        return self._adjoint

    def prepare_backward(self) -> None:
        """Record the adjoint. Call it on one thread for all slices: Warp compiles and loads a kernel at its first
        launch, and two threads that load the same one at once leave the first with code that is gone."""
        if self._adjoint is None:
            self._adjoint = Adjoint(self)


class Adjoint:
    """Launches for gradients of the results to gradients of the inputs, last substep first, on the slice's work tape.

    Each replays its kernel: no forward launch is needed.
    """

    def __init__(self, part: BatchSlice):
        work, tables, scratch, dt, refresh = part.work, part.tables, part.scratch, part.dt, part.refresh
        a, grad, none = work.arrays, part.grad, Model()
        ends = part.ends(grad, work.origin, work.ended)
        begin, self._fetch = part.stage(part.stages.depart_adjoint, work.bundles, ends), Copy()
        self.arguments = begin.arguments
        calls = [begin, self._fetch]

        def record(kernel: wp.Kernel, arguments: list, adjoints: list) -> None:
            launch = wp.launch(
                kernel, part.groups, inputs=arguments, adj_inputs=adjoints, adjoint=True, record_cmd=True
            )
            calls.append(Call(launch))

        for i in reversed(range(part.substeps)):
            before, after = [a["q"][i], a["qd"][i]], [a["q"][i + 1], a["qd"][i + 1]]
            middle = [a["motor"], a["tension"], a["L"]]
            grad_before, grad_after = [grad["q"][i], grad["qd"][i]], [grad["q"][i + 1], grad["qd"][i + 1]]
            grad_middle = [grad["motor"], grad["tension"], grad["L"]]
            record(
                part.kernels.substep,
                [tables, dt, i // refresh, *before, *middle, scratch, *after],
                [none, 0.0, 0, *grad_before, *grad_middle, part.scratch_grad, *grad_after],
            )
            if i % refresh == 0:
                record(part.kernels.mass_matrix, [tables, a["q"][i], scratch], [none, grad["q"][i], part.scratch_grad])
        end = part.stage(part.stages.arrive_adjoint, work.bundles, ends, self.arguments)
        self.program = Program([*calls, end])

    def aim(self, tape: Tape) -> None:
        """Differentiate the step on ``tape``."""
        self.arguments.t = tape.arguments.t
        self._fetch.aim(tape.history)
