"""What is shown while a command works, and how it stops."""

import io
import os
import signal
import threading

import pytest
from rich.console import Console

from pwm_fast.errors import Interrupted
from pwm_fast.progress import Interrupt, Phases, Progress, clock_text, number_text, resume_command


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain() -> Console:
    return Console(file=io.StringIO(), width=160, force_terminal=False)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (485, "8:05"), (3723, "1:02:03"), (float("inf"), "-")]
)
def test_times_read_like_a_clock(seconds: float, text: str):
    assert clock_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(5812.4, "5,812"), (70.31, "70.3"), (0.0341, "0.0341"), (3e-5, "3.0e-05"), (0, "0")]
)
def test_numbers_have_the_digits_a_reader_wants(value: float, text: str):
    assert number_text(value) == text


def test_phases_add_up_to_the_time_that_passed(clock: Clock):
    phases = Phases({"loading": 1.0}, clock=clock)
    with phases("extraction"):
        clock.now += 5
        with phases("evaluation"):
            clock.now += 2
            assert phases.seconds["evaluation"] == 2
        clock.now += 1
    clock.now += 100  # outside of every phase
    with phases("extraction"):
        clock.now += 3
    assert phases.seconds == {"loading": 1.0, "extraction": 9.0, "evaluation": 2.0}


def test_a_phase_that_fails_is_counted(clock: Clock):
    phases = Phases(clock=clock)
    with pytest.raises(ValueError), phases("a"), phases("b"):
        clock.now += 4
        raise ValueError
    assert phases.seconds == {"a": 0.0, "b": 4.0}


def test_plain_output_has_a_line_now_and_then(clock: Clock):
    console = plain()
    with Progress("extracting", 1000, references={"random": 70, "paper": None}, console=console, clock=clock) as show:
        for step in range(1, 401):
            clock.now = step / 10
            show.update(step, imagined=step / 2, real=4812.0 if step == 150 else None)
        show.note("seed 2 diverged")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "extracting · random 70.0"
    assert lines[1] == "  step 100/1,000 · 10.0 steps/s · imagined 50.0 · 0:10 passed · 1:30 left"
    assert lines[2].startswith("  step 200/1,000 · 10.0 steps/s · imagined 100.0 · real 4,812 ·")
    assert lines[-2:] == ["  seed 2 diverged", "extracting: " + show.line()]
    assert len(lines) == 1 + 4 + 2


def test_time_left_is_the_sooner_of_steps_and_minutes(clock: Clock):
    show = Progress("x", 1000, start=500, minutes=1.0, console=plain(), clock=clock)
    clock.now += 10
    show.update(600)
    assert show.rate() == pytest.approx(10) and show.time_left() == pytest.approx(40)
    clock.now += 30
    show.update(610)
    assert show.time_left() == pytest.approx(20)
    assert show.fraction() == pytest.approx(40 / 60)
    clock.now += 30
    assert show.time_left() == 0 and show.fraction() == 1


def test_the_rate_is_that_of_the_last_half_minute(clock: Clock):
    show = Progress("x", 10_000, console=plain(), clock=clock)
    for second in range(1, 101):
        clock.now = second
        show.update(second if second <= 50 else 50 + 20 * (second - 50))
    assert show.rate() == pytest.approx(20, rel=0.05)


def test_nothing_is_known_before_the_first_step(clock: Clock):
    show = Progress("x", 10, console=plain(), clock=clock)
    assert show.line() == "step 0/10 · 0 steps/s · 0:00 passed · - left"


def test_a_terminal_shows_bar_values_and_references(clock: Clock):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    show = Progress("extracting humanoid", 100, references={"paper": 8661}, console=console, clock=clock)
    clock.now += 5
    show.update(50, imagined=12.5, real=4812)
    with console.capture() as capture:
        console.print(show._render())
    text = capture.get()
    for part in ("extracting humanoid", "50/100", "10.0 steps/s", "0:05 left", "4,812", "paper 8,661"):
        assert part in text


def test_the_first_ctrl_c_sets_a_flag_and_the_second_stops(capfd):
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt
        interrupt.raise_if_set("nothing happens")
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    with pytest.raises(Interrupted, match="resume with: X") as stopped:
        interrupt.raise_if_set("saved; resume with: X")
    assert stopped.value.code == 130


def test_termination_is_a_clean_stop_too():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        interrupt.raise_if_set("saved")
    assert stopped.value.code == 143


def test_other_threads_go_without_signals():
    seen = []

    def work():
        with Interrupt() as interrupt:
            seen.append(bool(interrupt))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--task", "ant"], "python -m pwm_fast.extract --task ant --out 'my runs/ant' --resume"),
        (["--out", "r", "--resume"], "python -m pwm_fast.extract --out r --resume"),
        (["--out=r"], "python -m pwm_fast.extract --out=r --resume"),
    ],
)
def test_the_resume_command_is_complete(given: list[str], expected: str):
    assert resume_command("pwm_fast.extract", "my runs/ant", given) == expected
