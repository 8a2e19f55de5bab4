"""How commands end: a one-line error and exit code 2, an interruption and exit code 130, or 0.

The library raises ValueError, OSError or RuntimeError with texts that name the value, the limit and the mend;
`run_command` shows that text alone. `--debug` or PWM_FAST_DEBUG=1 shows the traceback too.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
DEBUG_VARIABLE = "PWM_FAST_DEBUG"

Options = TypeVar("Options")


class Interrupted(Exception):
    """Ctrl-C was pressed and the work is saved; the text says how to go on."""

    def __init__(self, text: str, code: int = INTERRUPTED):
        super().__init__(text)
        self.code = code


def positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a finite number above 0."""
    if not value > 0 or not math.isfinite(value):
        finite = "" if math.isfinite(value) else " and finite"
        raise ValueError(f"{name} must be > 0{finite}, got {value:g}")


def check_device(device: str, precision: str, on_cpu: Sequence[str] = ("fp32",)) -> None:
    """Raises ValueError for a GPU that is not there, and without one for a `precision` other than those `on_cpu`."""
    import torch  # commands that need no device start without it

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch {torch.__version__} sees no GPU; use --device cpu")
    if precision not in on_cpu and not device.startswith("cuda"):
        needed = "a GPU (--device cuda)" + (" or a CPU with AMX" if precision == "tf32" else "")
        raise ValueError(
            f"precision {precision} needs {needed}, got --device {device}: use {' or '.join(on_cpu)} there"
        )


def nearest(kind: str, name: str, known: Iterable[str], hint: str = "") -> str:
    """The text for an unknown name: "unknown task 'humaniod'; did you mean 'humanoid'? (hint)"."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    advice = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}; {advice}" + (f" ({hint})" if hint else "")


def one_line(error: BaseException) -> str:
    """The text of an error on one line, with the file and the system's reason for operating-system errors."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def run_command(
    options: type[Options],
    function: Callable[[Options], int | None],
    name: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command line: parse `argv` into the dataclass `options`, call `function`, return the exit code.

    `name` is the module (`pwm_fast.extract`); the dataclass's docstring is the help text. Errors of a user's making are
    one line on stderr; anything else (a defect) keeps its traceback.
    """
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    if "--debug" in arguments:
        arguments = [argument for argument in arguments if argument != "--debug"]
        debug = True
    try:
        about = f"{options.__doc__}\n\n--debug, or {DEBUG_VARIABLE}=1, shows the traceback of an error."
        parsed = tyro.cli(options, args=arguments, prog=f"python -m {name}", description=about)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE_ERROR
    return run(lambda: function(parsed), debug=debug)


def run(function: Callable[[], int | None], *, debug: bool = False) -> int:
    """Call `function` and return the exit code that fits how it ended."""
    try:
        return function() or 0
    except Interrupted as interruption:
        print(f"\n{one_line(interruption)}", file=sys.stderr)
        return interruption.code
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("\nstopped at once; the run's last checkpoint stays valid", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has gone: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {one_line(error)}{'' if debug else _advice(error)}", file=sys.stderr)
        return USAGE_ERROR


def _advice(error: Exception) -> str:
    """Errors that the library words itself need no more; one that some other library raised may be a defect."""
    frames = traceback.extract_tb(error.__traceback__)
    own = os.path.dirname(os.path.abspath(__file__))
    worded = bool(frames) and os.path.abspath(frames[-1].filename).startswith(own)
    return "" if worded else f" ({type(error).__name__}; --debug shows where)"
