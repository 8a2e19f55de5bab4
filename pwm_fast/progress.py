"""What a command shows while it works: live progress, time by phase, and a clean stop on Ctrl-C."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pwm_fast.errors import Interrupted

RATE_WINDOW_S = 30.0


def make_console(**options: Any) -> Console:
    """A console on stdout; lines are 110 wide where nobody's terminal says otherwise."""
    console = Console(highlight=False, **options)
    if not console.is_terminal and "width" not in options and "COLUMNS" not in os.environ:
        console.width = 110
    return console


def clock_text(seconds: float) -> str:
    """`8:05`, `1:02:03`; `-` for what is unknown."""
    if not 0 <= seconds < 1e8:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def number_text(value: float) -> str:
    """A number at the precision a reader wants: 5,812 · 70.3 · 0.034 · 3.0e-05."""
    size = abs(value)
    if size != size or size == float("inf"):
        return str(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1e-3 or size == 0:
        return f"{value:.3g}"
    return f"{value:.1e}"


class Phases:
    """Seconds by phase. A phase inside another pauses the outer one, so the sum is the time that passed.

    >>> phases = Phases()
    >>> with phases("extraction"):
    ...     with phases("evaluation"): ...
    """

    def __init__(self, seconds: Mapping[str, float] | None = None, clock: Callable[[], float] = time.perf_counter):
        self._seconds = dict(seconds or {})
        self._clock = clock
        self._stack: list[str] = []
        self._since = 0.0

    def _settle(self) -> None:
        now = self._clock()
        if self._stack:
            name = self._stack[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    @property
    def seconds(self) -> dict[str, float]:
        """Time so far, the running phase included; in order of first use."""
        self._settle()
        return dict(self._seconds)


class Progress:
    """A live display on terminals, a line now and then elsewhere.

    `total` counts steps, `minutes` bounds the time (either may end the work); `references` are shown beside the values
    (random 70, paper 8,661). `update` is cheap enough for every step.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        start: int = 0,
        minutes: float | None = None,
        references: Mapping[str, float | None] | None = None,
        console: Console | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.title, self.total, self.minutes = title, total, minutes
        self.console = console or make_console()
        self._references = {k: v for k, v in (references or {}).items() if v is not None}
        self._every, self._clock = every, clock
        self._values: dict[str, float] = {}
        self._begun = clock()
        self._printed = self._begun
        self._first = self.step = start
        self._history = deque([(self._begun, start)])
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live.start()
        else:
            self.console.print(self.title + self._reference_text())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._live.stop()
        self.console.print(Text(f"{self.title}: {self.line()}"), soft_wrap=True)

    def update(self, step: int, **values: float | None) -> None:
        """Tell the step reached and whatever values are new (`real=4812.0`); None leaves a value as it was."""
        now = self._clock()
        self.step = step
        self._history.append((now, step))
        while len(self._history) > 2 and now - self._history[1][0] > RATE_WINDOW_S:
            self._history.popleft()
        self._values.update({k: float(v) for k, v in values.items() if v is not None})
        if not self.console.is_terminal and now - self._printed >= self._every:
            self._printed = now
            self.console.print(Text("  " + self.line()), soft_wrap=True)

    def note(self, text: str) -> None:
        """A lasting line above the display."""
        self.console.print(Text("  " + text), soft_wrap=True)

    @property
    def elapsed(self) -> float:
        return self._clock() - self._begun

    def rate(self) -> float:
        """Steps per second over the last half minute."""
        (t0, s0), (t1, s1) = self._history[0], self._history[-1]
        return (s1 - s0) / (t1 - t0) if t1 > t0 else 0.0

    def time_left(self) -> float:
        """Seconds until the steps or the minutes are used up, whichever is sooner; inf when unknown."""
        rate = self.rate()
        left = (self.total - self.step) / rate if rate > 0 else float("inf")
        return left if self.minutes is None else max(min(left, 60 * self.minutes - self.elapsed), 0.0)

    def fraction(self) -> float:
        """Of the work that is done, 0 to 1; the larger of steps and time."""
        done = self.step / max(self.total, 1)
        return min(done if self.minutes is None else max(done, self.elapsed / (60 * self.minutes)), 1.0)

    def _reference_text(self) -> str:
        return "".join(f" · {k} {number_text(v)}" for k, v in self._references.items())

    def line(self) -> str:
        parts = [f"step {self.step:,}/{self.total:,}", f"{number_text(self.rate())} steps/s"]
        parts += [f"{name.replace('_', ' ')} {number_text(value)}" for name, value in self._values.items()]
        parts.append(f"{clock_text(self.elapsed)} passed")
        if self.step < self.total:
            parts.append(f"{clock_text(self.time_left())} left")
        return " · ".join(parts)

    def _render(self) -> Group:
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=1.0, completed=self.fraction()),
            Text.assemble(
                (f"{self.step:,}/{self.total:,}", "cyan"),
                f"  {number_text(self.rate())} steps/s  ",
                (f"{clock_text(self.time_left())} left", "yellow"),
            ),
        )
        values = Text("  ")
        for name, value in self._values.items():
            values.append(f"{name.replace('_', ' ')} ", style="dim")
            values.append(f"{number_text(value)}   ", style="bold green" if name in ("real", "best") else "")
        values.append(self._reference_text().removeprefix(" · "), style="dim")
        return Group(bar, values)


class Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) within its block into a flag; the second stops at once.

    >>> with Interrupt() as interrupt:
    ...     while not finished and not interrupt:
    ...         step()
    ... save()
    ... interrupt.raise_if_set("saved; resume with: ...")

    Outside the main thread signals cannot be caught: there it never sets.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._signal is not None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self:
            raise KeyboardInterrupt
        self._signal = number
        # os.write, since the signal may arrive in the middle of a print
        os.write(2, b"\nstopping: the state is being saved (Ctrl-C again stops at once)\n")

    def raise_if_set(self, text: str) -> None:
        """Raises `Interrupted` with `text` if a signal came; `pwm_fast.errors.run` makes exit code 130 of it."""
        if self._signal is not None:
            raise Interrupted(text, code=128 + self._signal)


def resume_command(module: str, out: str | os.PathLike[str], argv: Sequence[str] | None = None) -> str:
    """The command line that continues a run: the one that began it, with --out and --resume made explicit."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not any(argument == "--out" or argument.startswith("--out=") for argument in given):
        given += ["--out", os.fspath(out)]
    if "--resume" not in given:
        given.append("--resume")
    return shlex.join(["python", "-m", module, *given])
