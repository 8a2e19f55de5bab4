"""Bad input and faults of `extract` and `pretrain`: a one-line error and exit code 2, or an exact resume."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pwm_fast.state_files import load_state

COMMANDS = ("extract", "pretrain")
ROUNDS = ["--rounds.cycles", "5", "--rounds.extraction-steps", "2", "--rounds.model-steps", "1"]
ROUNDS += ["--rounds.model-batch-size", "8", "--rounds.practice-envs", "8", "--rounds.practice-steps", "16"]
ROUNDS += ["--rounds.warm-up-steps", "20", "--rounds.capacity", "400", "--rounds.evaluation-episodes", "2"]
ROUNDS += ["--start", "scratch"]
SMALL = {"extract": ["--steps", "10", *ROUNDS], "pretrain": ["--size", "1M", "--steps", "2", "--batch-size", "8"]}
LONG = {
    "extract": ["--steps", "50", "--seeds", "2", *ROUNDS],
    "pretrain": ["--size", "1M", "--steps", "8", "--batch-size", "32", "--checkpoint-minutes", "1e-5"],
}
RESULT = {"extract": "policy.safetensors", "pretrain": "world_model.safetensors"}


@pytest.fixture
def arguments(tmp_path: Path, tiny_world_model: Path, tiny_store: Path):
    """A command's smallest valid arguments, changed by `options`; None leaves an option out."""

    def build(command: str, options: dict[str, object] | None = None) -> list[str]:
        values: dict[str, object] = {"--task": "hopper", "--data": tiny_store, "--out": tmp_path / "run"}
        if command == "extract":
            values["--world-model"] = tiny_world_model
        values |= dict(zip(SMALL[command][::2], SMALL[command][1::2]))
        values |= options or {}
        flat = [str(part) for pair in values.items() if pair[1] is not None for part in pair]
        return flat

    return build


@pytest.fixture
def refused(arguments, call, capsys):
    """Run a command that must refuse; returns its one-line error."""

    def run(command: str, options: dict[str, object]) -> str:
        code = call(command, *arguments(command, options))
        shown = capsys.readouterr()
        assert code == 2, shown.err or shown.out
        error = shown.err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: "), shown.err
        return error[0]

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_task_suggests_the_nearest(command: str, refused, tmp_path: Path):
    assert "unknown task 'hoper'; did you mean 'hopper'?" in refused(command, {"--task": "hoper"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    ("command", "option"),
    [("extract", "steps"), ("extract", "seeds"), ("extract", "minutes"), ("pretrain", "steps")],
)
def test_counts_and_times_must_be_positive(command: str, option: str, value: int, refused, tmp_path: Path):
    assert f"{option} must be > 0, got {value}" in refused(command, {f"--{option}": value})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "truncated", "pickle", "policy"])
def test_a_wrong_world_model_file_is_named(kind: str, refused, tmp_path: Path, tiny_world_model: Path, tiny_policies):
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "policy":
        path = tiny_policies[0].save(tmp_path / "policy")
    elif kind != "missing":
        content = {
            "text": b"these are my weights",
            "empty": b"",
            "truncated": tiny_world_model.read_bytes()[:-500],
            "pickle": b"\x80\x04cposix\nsystem\n(S'touch hacked'\ntR.",
        }
        path.write_bytes(content[kind])
    error = refused("extract", {"--world-model": path})
    assert str(path) in error
    assert not (tmp_path / "hacked").exists() and not Path("hacked").exists()


def test_a_world_model_with_nan_is_refused(refused, tmp_path: Path, tiny_world_model: Path):
    from pwm_fast.models.world_model import WorldModel

    model = WorldModel.load(tiny_world_model)
    with torch.no_grad():
        model._reward[0].bias[3] = float("nan")
    model.save(tmp_path / "nan.safetensors")
    assert "NaN" in refused("extract", {"--world-model": tmp_path / "nan.safetensors"})


def test_a_world_model_of_another_task_is_refused(refused, tmp_path: Path):
    error = refused("extract", {"--task": "ant"})
    assert "11" in error and "37" in error, "the error names both observation sizes"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["missing", "empty folder", "file", "truncated", "torn header", "nan", "other task"])
def test_bad_data_is_named(command: str, kind: str, refused, tmp_path: Path, make_tiny_store):
    path = tmp_path / "data"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("data")
    elif kind == "other task":
        make_tiny_store(path, 37, 8, "ant")
    elif kind != "missing":
        make_tiny_store(path)
        column, header = path / "obs.f32", path / "meta.json"
        if kind == "truncated":
            column.write_bytes(column.read_bytes()[:-400])
        elif kind == "torn header":
            header.write_text(header.read_text()[:30])
        else:
            values = np.fromfile(column, "<f4")
            values[1000] = np.nan
            values.tofile(column)
    error = refused(command, {"--data": path})
    assert str(path) in error or "37" in error
    if kind == "nan":
        assert "NaN" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unwritable_output_is_refused_before_work_begins(command: str, refused, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    error = refused(command, {"--out": tmp_path / "file" / "run"})
    assert str(tmp_path / "file") in error and "--out" in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
def test_another_run_is_not_overwritten(command: str, refused, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step\n1\n")
    error = refused(command, {})
    assert "holds another run" in error and "--resume" in error and "--out" in error
    assert (tmp_path / "run" / "metrics.csv").read_text() == "step\n1\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_resuming_nothing_is_refused(command: str, arguments, call, capsys):
    assert call(command, *arguments(command), "--resume") == 2
    assert "nothing to resume" in capsys.readouterr().err


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_leaves_nothing_half_written(command: str, arguments, command_environment, tmp_path: Path):
    program = [sys.executable, "-c", LIMITED, "30000", f"pwm_fast.{command}", *arguments(command)]
    done = subprocess.run(program, env=command_environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: cannot write ") and "File too large" in error and "Traceback" not in done.stderr
    assert not list((tmp_path / "run").rglob("*.part"))
    assert not (tmp_path / "run" / RESULT[command]).exists()


class Running:
    """A command in a process of its own."""

    def __init__(self, command: str, arguments: list[str], environment: dict[str, str], log: Path):
        self.log = log
        self._file = open(log, "w")
        program = [sys.executable, "-m", f"pwm_fast.{command}", *arguments]
        self.process = subprocess.Popen(program, env=environment, stdout=self._file, stderr=self._file)

    def wait_for(self, path: Path) -> None:
        """Until a checkpoint lies at `path`; fails when the process ends before."""
        while not path.exists():
            assert self.process.poll() is None, f"ended before its first checkpoint: {self.log.read_text()}"
            time.sleep(0.005)

    def finish(self) -> int:
        """Its exit code; ends it where it does not end by itself."""
        try:
            return self.process.wait(timeout=240)
        finally:
            self.process.kill()
            self._file.close()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_world_model: Path, tiny_store: Path):
    """Runs a command once without interruption; returns its arguments (without --out) and its result's path."""
    finished: dict[str, tuple[list[str], Path]] = {}

    def build(command: str, environment: dict[str, str]) -> tuple[list[str], Path]:
        if command not in finished:
            given = ["--task", "hopper", "--data", str(tiny_store), *LONG[command]]
            if command == "extract":
                given += ["--world-model", str(tiny_world_model)]
            folder = tmp_path_factory.mktemp(command)
            run = Running(command, [*given, "--out", str(folder / "run")], environment, folder / "log")
            assert run.finish() == 0, run.log.read_text()
            finished[command] = given, folder / "run" / RESULT[command]
        return finished[command]

    return build


def rows(folder: Path) -> list[tuple[str, str | None]]:
    """Step and seed of each row of a run's metrics."""
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["step"], row.get("seed")) for row in csv.DictReader(file)]


def assert_same_tensors(path: Path, expected: Path) -> None:
    """Equal bit for bit; the files' headers list them in any order."""
    found, wanted = load_file(path), load_file(expected)
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


@pytest.mark.parametrize("how", ["kill -9", "ctrl-c"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_run_resumes_exactly(command: str, how: str, uninterrupted, command_environment, tmp_path: Path):
    given, expected = uninterrupted(command, command_environment)
    out = tmp_path / "run"
    given = [*given, "--out", str(out)]
    run = Running(command, given, command_environment, tmp_path / "log")
    run.wait_for(out / "checkpoint.safetensors")
    run.process.send_signal(signal.SIGKILL if how == "kill -9" else signal.SIGINT)
    code = run.finish()
    text = run.log.read_text()
    if how == "kill -9":
        assert code == -signal.SIGKILL
    else:
        assert code == 130 and "Traceback" not in text
        assert f"resume with: python -m pwm_fast.{command}" in text and text.rstrip().endswith("--resume")
    assert not (out / RESULT[command]).exists() or how == "kill -9", "the run was to be interrupted in the middle"
    load_state(out / "checkpoint.safetensors")
    again = Running(command, [*given, "--resume"], command_environment, tmp_path / "log2")
    assert again.finish() == 0, again.log.read_text()
    assert_same_tensors(out / RESULT[command], expected)
    assert rows(out) == rows(expected.parent), "the metrics have the rows of an uninterrupted run, none twice"
