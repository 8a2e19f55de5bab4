"""A run folder keeps one run, whole, and goes on from its checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pwm_fast.errors import Interrupted
from pwm_fast.run_folder import RunFolder, latest_path, new_path, read_summary, versions


def test_a_new_run_writes_and_reads_back(tmp_path: Path):
    with RunFolder(tmp_path / "runs" / "hopper") as folder:
        folder.begin({"task": "hopper", "steps": 5})
        folder.add_metrics({"step": 0, "loss": 0.5})
        folder.add_metrics({"step": 1, "loss": 0.25, "note": "best"})
        folder.write_summary({"task": "hopper"})
    assert folder.metrics() == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25, "note": "best"}]
    assert folder.file("metrics.csv").read_text() == "step,loss,note\n0,0.5,\n1,0.25,best\n"
    assert folder.options() == {"task": "hopper", "steps": 5}
    assert read_summary(folder.path) == {"task": "hopper"}


def test_another_run_is_not_overwritten(tmp_path: Path):
    with RunFolder(tmp_path / "run") as folder:
        folder.begin({"task": "hopper"})
    with pytest.raises(FileExistsError, match=r"run holds another run; .*--resume.*--out"):
        RunFolder(tmp_path / "run")


def test_a_folder_with_other_files_is_used(tmp_path: Path):
    (tmp_path / "job.log").write_text("started")
    with RunFolder(tmp_path) as folder:
        folder.begin({})
    assert (tmp_path / "job.log").read_text() == "started"


def test_resuming_nothing_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing to resume in .*absent"):
        RunFolder(tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("error", "kept"),
    [(ValueError(), False), (Interrupted("resume"), True), (KeyboardInterrupt(), True)],
    ids=["error", "ctrl-c", "ctrl-c twice"],
)
def test_a_run_that_fails_before_any_work_leaves_nothing(tmp_path: Path, error: BaseException, kept: bool):
    with pytest.raises(type(error)), RunFolder(tmp_path / "run") as folder:
        folder.begin({})
        raise error
    assert (tmp_path / "run").exists() == kept


def test_a_run_that_fails_later_keeps_everything(tmp_path: Path):
    with pytest.raises(ValueError), RunFolder(tmp_path / "run") as folder:
        folder.begin({})
        folder.add_metrics({"step": 1})
        raise ValueError
    with pytest.raises(ValueError), RunFolder(tmp_path / "run", resume=True) as folder:
        raise ValueError
    assert folder.options() == {}


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/1/run"])
def test_unwritable_places_are_refused_before_work_begins(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another --out"):
        RunFolder(tmp_path / place)


def test_resume_needs_the_options_the_run_was_begun_with(tmp_path: Path):
    with RunFolder(tmp_path / "run") as folder:
        folder.begin({"task": "hopper", "steps": 5, "out": "run", "seeds": (1, 2), "data": Path("d")})
    with RunFolder(tmp_path / "run", resume=True) as folder:
        folder.begin(
            {"task": "hopper", "steps": 5, "out": "elsewhere", "seeds": (1, 2), "data": Path("d")}, free=("out",)
        )
        with pytest.raises(ValueError, match=r"was begun with --steps 5, got 7; .*--out"):
            folder.begin({"task": "hopper", "steps": 7})


def test_resume_cuts_the_metrics_to_the_checkpoint(tmp_path: Path):
    with RunFolder(tmp_path / "run") as folder:
        folder.begin({})
        for step in range(3):
            folder.add_metrics({"step": step})
        folder.save_checkpoint({"step": 3, "weights": torch.arange(3.0)})
        folder.add_metrics({"step": 3, "late": 1.0})
        with open(folder.file("metrics.csv"), "a") as file:
            file.write("4,2.")  # a row torn by a kill
    with RunFolder(tmp_path / "run", resume=True) as folder:
        state = folder.load_checkpoint()
        assert state["step"] == 3 and torch.equal(state["weights"], torch.arange(3.0))
        assert [row["step"] for row in folder.metrics()] == [0, 1, 2]
        folder.add_metrics({"step": 3})
        assert [row["step"] for row in folder.metrics()] == [0, 1, 2, 3]


def test_resume_before_the_first_checkpoint_starts_again(tmp_path: Path):
    with RunFolder(tmp_path / "run") as folder:
        folder.begin({})
        folder.add_metrics({"step": 0})
    with RunFolder(tmp_path / "run", resume=True) as folder:
        assert folder.load_checkpoint() is None
        assert folder.metrics() == []
        folder.add_metrics({"loss": 1})
    assert folder.metrics() == [{"loss": 1}]


def test_missing_metrics_rows_are_named(tmp_path: Path):
    with RunFolder(tmp_path / "run") as folder:
        folder.begin({})
        folder.add_metrics({"step": 0})
        folder.add_metrics({"step": 1})
        folder.save_checkpoint({})
        folder.file("metrics.csv").write_text("step\n0\n")
    with (
        RunFolder(tmp_path / "run", resume=True) as folder,
        pytest.raises(ValueError, match="holds 1 rows, the checkpoint expects 2"),
    ):
        folder.load_checkpoint()


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path):
    with RunFolder(tmp_path / "run") as folder:
        folder.begin({})
    (tmp_path / "run" / ".checkpoint.safetensors.part").write_bytes(b"half")
    (tmp_path / "run" / ".policy.part").mkdir()
    (tmp_path / "run" / ".policy.part" / "policy.json").write_text("{")
    RunFolder(tmp_path / "run", resume=True).close()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", ".lock"}


def test_two_processes_cannot_share_a_run(tmp_path: Path):
    program = "import sys; from pwm_fast.run_folder import RunFolder; RunFolder(sys.argv[1], resume=True)"
    with RunFolder(tmp_path / "run") as folder:
        folder.begin({})
        held = subprocess.run([sys.executable, "-c", program, str(folder.path)], capture_output=True, text=True)
    free = subprocess.run([sys.executable, "-c", program, str(folder.path)], capture_output=True, text=True)
    assert "another process is at work on" in held.stderr
    assert free.returncode == 0, free.stderr


class Brittle:
    """A policy whose second file cannot be written."""

    def save(self, path: Path) -> None:
        (path / "policy.json").write_text("new")
        raise OSError(28, "No space left on device")


def test_policies_are_saved_per_seed_and_best_at_the_top(tmp_path: Path, tiny_policies):
    from pwm_fast.models.policy import Policy

    with RunFolder(tmp_path / "run") as folder:
        for policy, seed in zip(tiny_policies, (3, 4)):
            folder.save_policy(policy, seed=seed)
        folder.save_policy(tiny_policies[1])
    obs = torch.randn(6, 11)
    for path, policy in (("seed_3", tiny_policies[0]), ("seed_4", tiny_policies[1]), (".", tiny_policies[1])):
        assert torch.equal(Policy.load(folder.path / path).act(obs), policy.act(obs))


def test_a_failed_save_keeps_the_old_policy(tmp_path: Path):
    with RunFolder(tmp_path / "run") as folder:
        folder.file("policy.json").write_text("old")
        with pytest.raises(
            OSError, match=r"cannot write .*policy.safetensors: No space left on device; free some space"
        ):
            folder.save_policy(Brittle())
        assert folder.file("policy.json").read_text() == "old"
        assert {p.name for p in folder.path.iterdir()} == {"policy.json", ".lock"}


def test_run_names_count_up_and_the_latest_is_found(tmp_path: Path):
    assert new_path("ant", tmp_path) == tmp_path / "ant"
    for _ in range(11):
        new_path("ant", tmp_path).mkdir()
    (tmp_path / "ant-seeds").mkdir()
    assert latest_path("ant", tmp_path) == tmp_path / "ant-11"
    with pytest.raises(FileNotFoundError, match="no run of hopper"):
        latest_path("hopper", tmp_path)


def test_summaries_say_where_they_are_missing_or_damaged(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"task": ')
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        read_summary(tmp_path)


def test_versions_are_json():
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found
