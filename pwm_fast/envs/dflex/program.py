"""Recorded launches as one native call that holds no interpreter lock, and a crew that runs several such calls at once.

A launch from Python costs about 20 us with the lock held, as much as a whole substep of a small robot: threads that
launch one by one mostly wait for each other. Here the calling thread posts the others' programs through shared memory
and runs its own. Helpers look out for the next post for a moment, about as long as a step's Python takes, then sleep.
"""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from weakref import finalize

import numpy as np
import warp as wp

from pwm_fast.envs.dflex.lanes import COMPILER_FLAGS

WATCH = 200  # looks at the mailbox, a microsecond or two apart, before a helper sleeps
STATE, TABLE, ROWS, WOKEN, TURN, DONE, LINE = 0, 1, 2, 3, 4, 5, 8  # a helper's part of the mailbox: one cache line
ASLEEP, WATCHING, POSTED, RUNNING = range(4)

# rows of a table: function, bounds, arguments, adjoint arguments or 0, as Warp's entry points on a CPU take them
CALL = """
    auto call = [](const wp::uint64* p, wp::uint64 rows) {
        for (; rows > 0; --rows, p += 4) {
            if (p[3]) ((void (*)(void*, void*, void*))p[0])((void*)p[1], (void*)p[2], (void*)p[3]);
            else ((void (*)(void*, void*))p[0])((void*)p[1], (void*)p[2]);
        }
    };
    auto rest = [=] {
        #if defined(__x86_64__)
        for (int i = 0; i < 64; ++i) __builtin_ia32_pause();
        #endif
        if (give_way) ((void (*)())give_way)();
    };
    auto exchange = [](wp::uint64* x, wp::uint64* from, wp::uint64 to) {
        return __atomic_compare_exchange_n(x, from, to, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    };"""

# Both sides claim a posted program by one compare-and-exchange, so the leader runs what no helper has begun by the time
# its own part is done: on a busy machine two threads are never much slower than one. States alone do not tell a helper
# that has not begun from one that is done and looks out or sleeps again; the number of the run it has done last does.
LEAD = f"""{CALL}
    const int helpers = mailbox.shape[0] / {LINE};
    for (int i = 0; i < helpers; ++i) {{
        auto* line = mailbox.data + i * {LINE};
        wp::uint64 now = {WATCHING};  // one that was seen watching may have fallen asleep since, and stays so
        if (!line[{WOKEN}]) exchange(line + {STATE}, &now, {POSTED});
    }}
    call(table.data, table.shape[0]);
    for (int i = 0; i < helpers; ++i) {{
        auto* line = mailbox.data + i * {LINE};
        wp::uint64 now = {POSTED};
        bool mine = exchange(line + {STATE}, &now, {WATCHING});
        if (!mine && now == {RUNNING})
            while (__atomic_load_n(line + {STATE}, __ATOMIC_ACQUIRE) == {RUNNING}) rest();
        if (mine || __atomic_load_n(line + {DONE}, __ATOMIC_ACQUIRE) != line[{TURN}])
            call((const wp::uint64*)line[{TABLE}], line[{ROWS}]);
    }}"""

FOLLOW = f"""{CALL}
    auto* line = mailbox.data;
    for (int look = 0; ; ++look) {{
        wp::uint64 now = {POSTED};
        if (exchange(line + {STATE}, &now, {RUNNING})) {{
            call((const wp::uint64*)line[{TABLE}], line[{ROWS}]);
            __atomic_store_n(line + {DONE}, line[{TURN}], __ATOMIC_RELEASE);
            __atomic_store_n(line + {STATE}, (wp::uint64){WATCHING}, __ATOMIC_RELEASE);
            look = 0;
        }}
        now = {WATCHING};
        if (look > {WATCH} && exchange(line + {STATE}, &now, {ASLEEP})) return;
        rest();
    }}"""


class Call:
    """A recorded launch. ``arguments`` (ctypes fields named as the kernel's) may be rewritten between runs, and shared
    with calls whose kernels have the same arguments."""

    def __init__(self, launch: wp.Launch, arguments: ctypes.Structure | None = None):
        self.launch = launch  # keeps the code and what the arguments point to
        self.bounds, *values = launch.params
        labels = [argument.label for argument in launch.kernel.adj.args]
        own, adjoint = values[: len(labels)], values[len(labels) :]
        self.arguments = _structure(labels, own) if arguments is None else arguments
        self.adjoint = _structure(labels, adjoint) if launch.adjoint else None
        self.function = launch.hooks.backward if launch.adjoint else launch.hooks.forward

    def row(self) -> list[int]:
        structures = (self.bounds, self.arguments, self.adjoint)
        function = ctypes.cast(self.function, ctypes.c_void_p).value
        return [function or 0, *(0 if s is None else ctypes.addressof(s) for s in structures)]


def _structure(labels: list[str], values: list) -> ctypes.Structure:
    fields = [(label, type(value)) for label, value in zip(labels, values)]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})(*values)


class Program:
    """Calls that one thread makes in order."""

    def __init__(self, calls: Sequence[Call]):
        self.calls = list(calls)
        self._table = np.array([call.row() for call in calls], np.uint64)
        self.address, self.rows = self._table.ctypes.data, len(calls)


@cache
def _kernels() -> SimpleNamespace:
    table = wp.array(dtype=wp.uint64)
    module = wp.get_module(f"{__name__}.kernels")
    wp.set_module_options({"cpu_compiler_flags": COMPILER_FLAGS, "enable_backward": False}, module)

    @wp.func_native(LEAD)
    def run(table: table, mailbox: table, give_way: wp.uint64): ...

    @wp.func_native(FOLLOW)
    def watch(mailbox: table, give_way: wp.uint64): ...

    @wp.kernel(module=module)
    def lead(table: table, mailbox: table, give_way: wp.uint64):
        run(table, mailbox, give_way)

    @wp.kernel(module=module)
    def follow(mailbox: table, give_way: wp.uint64):
        watch(mailbox, give_way)

    @wp.func_native("""
        for (int i = 0; i < table.shape[0]; i += 3)
            __builtin_memcpy((void*)table.data[i], (const void*)table.data[i + 1], table.data[i + 2]);""")
    def copy_blocks(table: table): ...

    @wp.kernel(module=module)
    def copy(table: table):
        copy_blocks(table)

    return SimpleNamespace(lead=lead, follow=follow, copy=copy)


def _give_way() -> int:
    """Address of sched_yield, so that a waiting thread leaves its core to others; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0


def _help(call: Call, orders: SimpleQueue, mailbox: np.ndarray) -> None:
    """A helper's life. It holds the mailbox, which it may still be watching when its crew is gone."""
    while orders.get():
        call.function(ctypes.byref(call.bounds), ctypes.byref(call.arguments))


def _dismiss(queues: list[SimpleQueue]) -> None:
    for orders in queues:
        orders.put(False)


class Crew:
    """The calling thread and ``helpers`` more, started with the first run. One run at a time."""

    def __init__(self, helpers: int):
        if not 0 <= helpers < 64:
            raise ValueError(f"threads must be <= 64, got {helpers + 1}")
        none, give_way = wp.zeros(1, dtype=wp.uint64), _give_way()

        def record(kernel: wp.Kernel, inputs: list) -> Call:
            return Call(wp.launch(kernel, 1, inputs=inputs, record_cmd=True))

        self._mailbox = np.zeros((max(helpers, 1), LINE), np.uint64)
        self._lines = self._mailbox.reshape(-1).data
        self._lead = record(_kernels().lead, [none, none, give_way])
        self._follow = [record(_kernels().follow, [none, give_way]) for _ in range(helpers)]
        self._lead.arguments.mailbox.data = self._mailbox.ctypes.data
        self._lead.arguments.mailbox.shape[0] = helpers * LINE
        for call, line in zip(self._follow, self._mailbox):
            call.arguments.mailbox.data = line.ctypes.data
        self._call = (ctypes.byref(self._lead.bounds), ctypes.byref(self._lead.arguments))
        self._process = self._turn = 0
        self._queues: list[SimpleQueue] = []

    def _start(self) -> None:
        """A process that was forked has the memory, but not the threads."""
        self._process = os.getpid()
        self._mailbox[:, STATE] = ASLEEP
        self._queues = [SimpleQueue() for _ in self._follow]
        for call, orders in zip(self._follow, self._queues):
            Thread(target=_help, args=(call, orders, self._mailbox), daemon=True, name="pwm_fast physics").start()
        finalize(self, _dismiss, self._queues)

    def run(self, programs: Sequence[Program]) -> None:
        """Run the programs, one per thread; returns when all have ended."""
        if self._process != os.getpid():
            self._start()
        lines, self._turn = self._lines, self._turn + 1
        for i, (program, orders) in enumerate(zip(programs[1:], self._queues)):
            line = i * LINE
            lines[line + TABLE] = program.address
            lines[line + ROWS] = program.rows
            lines[line + TURN] = self._turn
            asleep = lines[line + STATE] == ASLEEP
            lines[line + WOKEN] = asleep
            if asleep:
                lines[line + STATE] = POSTED
                orders.put(True)
        table = self._lead.arguments.table
        table.data, table.shape[0] = programs[0].address, programs[0].rows
        self._lead.function(*self._call)


class Copy(Call):
    """A call that copies whole arrays; ``aim`` chooses them."""

    def __init__(self) -> None:
        none = wp.zeros(1, dtype=wp.uint64)
        super().__init__(wp.launch(_kernels().copy, 1, inputs=[none], record_cmd=True))

    @staticmethod
    def table(blocks: Sequence[tuple[wp.array, wp.array]]) -> np.ndarray:
        """(to, from) of equal sizes; the arrays must outlive the table, and the table the runs aimed at it."""
        return np.array([(to.ptr, source.ptr, source.capacity) for to, source in blocks], np.uint64).reshape(-1)

    def aim(self, table: np.ndarray) -> None:
        self.arguments.table.data, self.arguments.table.shape[0] = table.__array_interface__["data"][0], len(table)
