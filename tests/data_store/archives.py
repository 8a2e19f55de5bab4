"""Archives like those of torch.save, made by hand: what torch itself would not write."""

import zipfile
from pathlib import Path

DATA = Path(__file__).parent.parent / "data" / "tdmpc2"


def write_archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> Path:
    """A stored zip of data.pkl, storages data/KEY and other members, checksums right."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for key, content in (storages or {}).items():
            archive.writestr(f"a/data/{key}", content)
        for name, content in members.items():
            archive.writestr(f"a/{name}", content)
    return path


def tensor_pickle(
    storage: str = "FloatStorage", key: str = "0", count: int = 4, offset: int = 0, shape: str = "K\x04\x85",
    strides: str = "K\x01\x85",
) -> bytes:  # fmt: skip
    """A pickle of one tensor; `shape` and `strides` are opcodes that push a tuple."""
    numbers = [b"\x8a\x08" + value.to_bytes(8, "little", signed=True) for value in (count, offset)]
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"
        + storage.encode() + b"\nX" + len(key).to_bytes(4, "little") + key.encode() + b"X\x03\x00\x00\x00cpu"
        + numbers[0] + b"tQ" + numbers[1] + shape.encode("latin1") + strides.encode("latin1")
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip
