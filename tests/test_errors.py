"""How commands end."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from pwm_fast.errors import Interrupted, nearest, one_line, positive, run, run_command


@dataclass(frozen=True)
class Options:
    """Count."""

    steps: int = 3
    """How far."""


def fail(error: BaseException):
    def function(options: Options) -> int:
        raise error

    return function


@pytest.mark.parametrize("value", [-1, 0, -0.5, math.nan])
def test_what_must_be_positive_is_named_with_its_value(value):
    with pytest.raises(ValueError, match=f"^minutes must be > 0.*, got {value:g}$"):
        positive("minutes", value)


def test_infinity_is_refused_and_positive_numbers_pass():
    with pytest.raises(ValueError, match="minutes must be > 0 and finite, got inf"):
        positive("minutes", math.inf)
    positive("steps", 1)
    positive("minutes", 0.25)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("humaniod", "unknown task 'humaniod'; did you mean 'humanoid'? (see the list)"),
        ("ANT", "unknown task 'ANT'; did you mean 'ant'? (see the list)"),
        ("zzz", "unknown task 'zzz'; known: ant, humanoid (see the list)"),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, text: str):
    assert nearest("task", name, ["ant", "humanoid"], "see the list") == text


def test_a_command_parses_its_options_and_returns_0():
    seen = []
    assert run_command(Options, lambda o: seen.append(o.steps), "pwm_fast.count", ["--steps", "7"]) == 0
    assert seen == [7]


@pytest.mark.parametrize("arguments", [["--stepz", "7"], ["--steps", "many"]], ids=["option", "type"])
def test_options_that_do_not_parse_return_2(arguments, capsys):
    assert run_command(Options, fail(AssertionError()), "pwm_fast.count", arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("steps must be > 0,\n got 0"), "error: steps must be > 0, got 0"),
        (FileNotFoundError(2, "No such file", "x.txt"), "error: No such file: x.txt"),
        (OSError(28, "cannot write a: disk full"), "error: cannot write a: disk full"),
        (RuntimeError("no native module"), "error: no native module"),
        (FloatingPointError("gradient is nan"), "error: gradient is nan"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_a_users_making_are_one_line_and_exit_code_2(error, text, capsys):
    assert run_command(Options, fail(error), "pwm_fast.count", []) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(text) and shown.count("\n") == 1


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debug_shows_the_traceback(how: str, capsys, monkeypatch):
    if how == "variable":
        monkeypatch.setenv("PWM_FAST_DEBUG", "1")
    arguments = ["--debug"] if how == "option" else []
    assert run_command(Options, fail(ValueError("bad")), "pwm_fast.count", arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("error: bad\n")


def test_defects_keep_their_traceback():
    with pytest.raises(AttributeError):
        run_command(Options, fail(AttributeError("a defect")), "pwm_fast.count", [])


@pytest.mark.parametrize(
    ("stop", "code", "text"),
    [
        (Interrupted("saved; resume with: X"), 130, "saved; resume with: X"),
        (Interrupted("saved; resume with: X", code=143), 143, "saved; resume with: X"),
        (KeyboardInterrupt(), 130, "last checkpoint stays valid"),
    ],
    ids=["ctrl-c", "terminated", "ctrl-c twice"],
)
def test_interruptions_say_how_to_go_on(stop, code: int, text: str, capsys):
    def function():
        raise stop

    assert run(function) == code
    shown = capsys.readouterr().err
    assert text in shown and "Traceback" not in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what a computer without a GPU is told")
@pytest.mark.parametrize(
    "command, options, text",
    [
        ("extract", {"--device": "cuda"}, "sees no GPU; use --device cpu"),
        ("pretrain", {"--data": "x", "--device": "cuda:1"}, "sees no GPU; use --device cpu"),
        ("pretrain", {"--data": "x", "--precision": "bf16"}, "got --device cpu: use fp32 "),
        (
            "extract",
            {"--precision": "tf32"},
            "tf32 needs a GPU (--device cuda) or a CPU with AMX, got --device cpu: use fp32 or bf16 there",
        ),
    ],
)
def test_what_only_a_gpu_can_is_refused_without_one(
    command: str, options: dict, text: str, call, capsys, monkeypatch: pytest.MonkeyPatch
):
    if options.get("--precision") == "tf32":  # as on a CPU without AMX
        monkeypatch.setattr("pwm_fast.backend.native", None)
    assert call(command, "--task", "hopper", *(part for pair in options.items() for part in pair)) == 2
    assert text in capsys.readouterr().err.replace("\n", " ")


def test_a_closed_pipe_is_no_error():
    program = (
        "import sys; from pwm_fast.errors import run\n"
        "sys.exit(run(lambda: [print('x' * 1000) for _ in range(10000)] and None))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_an_error_without_text_has_its_name():
    assert one_line(ValueError()) == "ValueError"
    assert one_line(OSError(13, os.strerror(13), "/srv/x")) == "Permission denied: /srv/x"
