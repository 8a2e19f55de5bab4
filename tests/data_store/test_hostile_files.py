"""2,000 mutated files are refused with their name, or give the same data; none runs anything, fills the memory or
takes long. What is fed, and how it is watched, is in `hostile_files.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from archives import DATA, write_archive

PROGRAM = Path(__file__).parent / "hostile_files.py"
CHUNKS = ["mt30_mini_chunk_0_tensordict020.pt", "mt30_mini_chunk_0_tensordict0143.pt"]
MODELS = ["mt30_tiny_new_layout.pt", "mt30_tiny_old_layout_with_omegaconf.pt"]


def feed(count: int, files: list[str], environment: dict[str, str]) -> dict[str, int]:
    paths = [str(DATA / name) for name in files]
    program = [sys.executable, str(PROGRAM), str(count), "0", *paths]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_mutated_data_is_refused_or_the_same(command_environment):
    ends = feed(1700, CHUNKS, command_environment)
    assert sum(ends.values()) == 1700 and "damaged other" not in ends
    assert ends["damaged refused"] > 300 and ends["repickled refused"] > 300, ends
    assert ends["damaged same"] > 0, "not everything in an archive is data"


def test_mutated_models_are_refused_or_the_same(command_environment):
    ends = feed(300, MODELS, command_environment)
    assert sum(ends.values()) == 300 and "damaged other" not in ends
    assert ends["damaged refused"] > 50 and ends["repickled refused"] > 20, ends


@pytest.mark.parametrize("call", [b"cos\nsystem\n(X\x0c\x00\x00\x00touch hackedtR.", b"cos\nsystem\n."])
def test_the_watch_would_see_an_execution(call, tmp_path, command_environment):
    """Python's own unpickler on such a file trips the same audit hook."""
    path = write_archive(tmp_path / "t.pt", b"\x80\x02" + call)
    program = f"""
import sys
import zipfile, pickle
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event))
pickle.loads(zipfile.ZipFile({str(path)!r}).read("a/data.pkl"))
print(seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=command_environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert "pickle.find_class" in done.stdout
    assert (tmp_path / "hacked").exists() == call.endswith(b"R.") == ("os.system" in done.stdout)
