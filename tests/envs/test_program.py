"""Programs of recorded launches, and crews of threads that run them."""

import os
import threading
import time
import weakref

import pytest
import warp as wp

from pwm_fast.envs.dflex.program import ASLEEP, STATE, Call, Copy, Crew, Program
from pwm_fast.envs.dflex.warp_setup import start_warp


@pytest.fixture(scope="module")
def add():
    """Kernel: x = 3 x + amount, so that order and number of runs show."""
    start_warp()

    @wp.kernel(enable_backward=False)
    def add(x: wp.array(dtype=int), amount: int):
        x[wp.tid()] = 3 * x[wp.tid()] + amount

    return add


def call(add, x, amount):
    return Call(wp.launch(add, len(x), inputs=[x, amount], record_cmd=True))


def test_a_program_runs_its_calls_in_order_with_rewritten_arguments(add):
    x = wp.zeros(3, dtype=int)
    first = call(add, x, 1)
    program = Program([first, call(add, x, 2)])
    crew = Crew(0)
    crew.run([program])
    assert x.numpy().tolist() == [5, 5, 5]
    first.arguments.amount = 10
    crew.run([program])
    assert x.numpy().tolist() == [77, 77, 77]


@pytest.mark.parametrize(
    "pause, runs", [(0.0, 5000), (3e-4, 2000), (0.02, 30)], ids=["watching", "falling asleep", "asleep"]
)
def test_every_program_runs_exactly_once_whoever_runs_it(add, pause, runs):
    """Helpers that watch, that sleep, and that are late: the leader may take over what they have not begun."""
    crew, arrays = Crew(3), [wp.zeros(2, dtype=int) for _ in range(4)]
    programs = [Program([call(add, x, 1)]) for x in arrays]
    expected = 0
    for _ in range(runs):
        crew.run(programs)
        expected = (3 * expected + 1) % 2**32
        assert all(int(x.numpy()[0]) % 2**32 == expected for x in arrays)
        time.sleep(pause)


def test_helpers_sleep_when_there_is_nothing_to_do_and_leave_with_their_crew(add):
    before, crew = set(threading.enumerate()), Crew(2)
    assert set(threading.enumerate()) <= before  # nobody comes before the first run
    crew.run([Program([call(add, wp.zeros(1, dtype=int), 1)]) for _ in range(3)])
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 2
    deadline = time.monotonic() + 20
    while (crew._mailbox[:, STATE] != ASLEEP).any() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (crew._mailbox[:, STATE] == ASLEEP).all()
    del crew
    for helper in helpers:
        helper.join(deadline - time.monotonic())
        assert not helper.is_alive()


def test_helpers_keep_what_they_watch_when_their_crew_goes(add):
    """A helper looks at its mailbox for a while after a run: freed, the memory would be someone else's by then."""
    crew = Crew(1)
    crew.run([Program([call(add, wp.zeros(1, dtype=int), 1)]) for _ in range(2)])
    mailbox = weakref.ref(crew._mailbox)
    helper = next(t for t in threading.enumerate() if any(a is crew._mailbox for a in getattr(t, "_args", ())))
    del crew
    assert mailbox() is not None or not helper.is_alive()
    helper.join(20)
    assert not helper.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_helpers_of_its_own(add):
    crew, arrays = Crew(1), [wp.zeros(1, dtype=int) for _ in range(2)]
    programs = [Program([call(add, x, 1)]) for x in arrays]
    crew.run(programs)
    child = os.fork()
    if child == 0:
        crew.run(programs)
        os._exit(0 if [int(x.numpy()[0]) for x in arrays] == [4, 4] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_copy_copies_whole_arrays():
    start_warp()
    sources = [wp.array([1, 2, 3], dtype=int), wp.array([4], dtype=int)]
    targets = [wp.zeros(3, dtype=int), wp.zeros(1, dtype=int)]
    copy = Copy()
    table = Copy.table(list(zip(targets, sources)))
    copy.aim(table)
    Crew(0).run([Program([copy])])
    assert [x.numpy().tolist() for x in targets] == [[1, 2, 3], [4]]


def test_threads_are_limited():
    start_warp()
    with pytest.raises(ValueError, match="threads must be <= 64, got 65"):
        Crew(64)
