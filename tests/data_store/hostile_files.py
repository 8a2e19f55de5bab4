"""Feeds mutated files to the readers; run as a program by `test_hostile_files.py`, in a process with little memory.

    python hostile_files.py COUNT SEED FILE...

Bytes of a file are flipped, overwritten, removed, inserted or cut off: the reader must refuse it or give the same data.
Or its pickle is changed and its checksums made right again: any data may come, but nothing else. Whatever Python
reports to its audit hooks while a file is read (imports, calls of the system, files opened for writing, the real
unpickler) is a failure. Prints how each kind ended, as JSON.
"""

import codecs
import io
import json
import random
import resource
import signal
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

from pwm_fast.data.conversion import open_episodes
from pwm_fast.data.stored_zip import ForeignFileError
from pwm_fast.data.torch_files import StoredTensor, open_torch_file, walk
from pwm_fast.models.tdmpc2_checkpoints import find_checkpoint, load_checkpoint

MEMORY = 200_000_000  # bytes that reading may add to the process
SECONDS = 20  # of CPU for one file
HARMLESS = ("open", "builtins.id", "mmap.__new__", "object.__getattr__", "os.stat", "os.fspath")
OPCODES = b"cRb\x81\x92io\x93Q\x94qrhj(tu\x85\x86se}])0122\x8a\x8b\x8c\x8dBXT\x95."
CALLS = (b"cos\nsystem\n(X\x04\x00\x00\x00exittR", b"cbuiltins\neval\n(X\x03\x00\x00\x001+1tR", b"cos\nsystem\n",
         b"(X\x04\x00\x00\x00exitios\nsystem\n", b"(cos\nsystem\nX\x04\x00\x00\x00exito")  # fmt: skip


def contents(path: Path) -> dict[str, np.ndarray]:
    """What a user would read from the file, as named arrays: a world model's tensors, or the table's columns."""
    tree = open_torch_file(path)
    if find_checkpoint(tree, path) is not None:
        return {name: value.numpy() for name, value in load_checkpoint(path).state_dict().items()}
    source, read = open_episodes(path), {}
    for done, episodes in source.episodes(0, None):
        for episode in episodes:
            read.update({f"{done}.{i}": np.array(value) for i, value in enumerate(episode)})
    return read


def everything(path: Path) -> None:
    """Every tensor that the file names, at all."""
    for node in walk(open_torch_file(path)):
        if isinstance(node, StoredTensor):
            node.torch()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file with a few bytes changed, anywhere or in its directory."""
    changed = bytearray(data)
    low = 0 if rng.random() < 0.5 else max(0, len(data) - 9000)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(low, len(changed))
        kind = rng.randrange(6)
        if kind <= 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 3:
            del changed[at : at + rng.randrange(1, 4096)]
        elif kind == 4:
            changed[at:at] = rng.randbytes(rng.randrange(1, 64))
        else:
            return bytes(changed[:at])
        if not changed:
            return b""
        low = min(low, len(changed) - 1)
    return bytes(changed)


def repickled(data: bytes, rng: random.Random) -> bytes:
    """The file with a changed pickle and right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("/data.pkl"):
                pickled = bytearray(content)
                for _ in range(rng.choice((1, 2, 5))):
                    at = rng.randrange(2, len(pickled))
                    kind = rng.randrange(5)
                    if kind == 0:
                        pickled[at] ^= 1 << rng.randrange(8)
                    elif kind == 1:
                        pickled[at] = rng.choice(OPCODES)
                    elif kind == 2:
                        pickled[at:at] = rng.choice(CALLS)
                    elif kind == 3:  # a number becomes huge
                        at = pickled.find(b"M", at)
                        if at >= 0:
                            pickled[at : at + 3] = b"J" + rng.choice((b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"))
                    else:
                        del pickled[at : at + rng.randrange(1, 9)]
                content = bytes(pickled)
            target.writestr(name, content)
    return buffer.getvalue()


def main(count: int, seed: int, paths: list[Path]) -> None:
    rng = random.Random(seed)
    originals = {path: (path.read_bytes(), contents(path)) for path in paths}
    for path in paths:
        everything(path)
    codecs.lookup("raw_unicode_escape")  # Python imports this codec of old pickles' strings on first use
    watching, seen = False, []

    def hook(event: str, arguments: tuple) -> None:
        if watching and (event not in HARMLESS or (event == "open" and arguments[1] not in ("r", "rb", None))):
            seen.append(f"{event} {arguments}"[:200])

    sys.addaudithook(hook)
    with open("/proc/self/status") as status:
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
    signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} s")))
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            path = paths[i % len(paths)]
            content, expected = originals[path]
            kind = "damaged" if i // len(paths) % 2 else "repickled"
            mutated = (damaged if kind == "damaged" else repickled)(content, rng)
            target = Path(folder) / f"{i}.pt"
            target.write_bytes(mutated)
            watching = True
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                found = contents(target)
                same = found.keys() == expected.keys() and all(
                    np.array_equal(found[name], expected[name], equal_nan=True) for name in expected
                )
                if kind == "repickled":
                    everything(target)
                elif not same:
                    raise AssertionError(f"file {i}, a mutation of {path.name}, gave other data")
                end = "same" if same else "other"
            except ForeignFileError as error:
                assert str(target) in str(error), f"file {i}: the error does not name the file: {error}"
                end = "refused"
            except ValueError as error:  # the name of the file does not tell the task
                assert "give --task NAME" in str(error), f"file {i}: {error!r}"
                end = "refused"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                watching = False
            target.unlink()
            ends[f"{kind} {end}"] += 1
            assert not seen, f"file {i}, a mutation of {path.name}, made Python do {seen}"
    print(json.dumps(ends))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
