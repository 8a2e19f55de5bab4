"""Files that `torch.save` wrote, opened without running anything in them and without reading the tensors.

A tensor comes back as a `StoredTensor`: shape, strides and a map of its bytes, with every index that it can reach
inside its storage. See `safe_unpickling.py` for what becomes of other objects.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast.data.safe_unpickling import MAX_BYTES, Global, Inert, unpickle
from pwm_fast.data.stored_zip import ForeignFileError, StoredZip

MAX_DIMS = 8
# bfloat16 has no numpy type: its bits are kept as uint16
STORAGES = {
    "torch.FloatStorage": "<f4",
    "torch.DoubleStorage": "<f8",
    "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": "<u2",
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "|i1",
    "torch.ByteStorage": "|u1",
    "torch.BoolStorage": "|u1",
}


@dataclass(frozen=True)
class Storage:
    """One storage of a file: its elements' type and number, and where they lie."""

    archive: StoredZip
    entry: str
    kind: str
    count: int
    verify: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(STORAGES[self.kind])


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Its bytes are read, and their checksum compared, when they are asked for."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.storage.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """A read-only view of the file's bytes (bool as uint8, bfloat16 as its bits)."""
        s = self.storage
        flat = np.frombuffer(s.archive.view(s.entry, s.verify), s.dtype, s.count)
        strides = [step * s.dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)

    def torch(self) -> Tensor:
        """A copy."""
        array = np.array(self.numpy(), order="C")
        if self.storage.kind == "torch.BoolStorage":
            return torch.from_numpy(array) != 0
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if self.storage.kind == "torch.BFloat16Storage" else tensor


def open_torch_file(path: str | os.PathLike[str], verify: bool = True) -> Any:
    """The object that was saved at `path`: dicts, lists, numbers, strings, StoredTensors, Inert records.

    `verify` compares the checksum of what is read; some programs write files without them.
    Raises FileNotFoundError, or ForeignFileError for a file that is damaged, of torch before 1.6, or would run code.
    """
    path = Path(path)
    refuse_pickle(path)
    archive = StoredZip(path)
    roots = [name[: -len("/data.pkl")] for name in archive.names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ForeignFileError(f"{path} is no file of torch.save: its archive has {len(roots)} members 'data.pkl'")
    root = roots[0]
    if f"{root}/byteorder" in archive:
        order = bytes(archive.view(f"{root}/byteorder", verify)[:16])
        if order != b"little":
            raise ForeignFileError(f"{path} has byte order {order!r}; only b'little' is read")
    if archive.size_of(f"{root}/data.pkl") > MAX_BYTES:
        raise ForeignFileError(
            f"{path} has a pickle of {archive.size_of(f'{root}/data.pkl'):,} bytes; at most {MAX_BYTES:,} are read"
        )

    def storage(identity: Any) -> Storage:
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise ForeignFileError("a storage is described in an unknown way")
        _, kind, key, _, count = identity
        if not isinstance(kind, Global) or kind.name not in STORAGES:
            raise ForeignFileError(f"a storage is of an unknown kind ({getattr(kind, 'name', type(kind).__name__)})")
        if not isinstance(key, str) or not _whole(count):
            raise ForeignFileError("a storage is described in an unknown way")
        entry = f"{root}/data/{key[:100]}"
        found = Storage(archive, entry, kind.name, count, verify)
        if count * found.dtype.itemsize > archive.size_of(entry):
            raise ForeignFileError(
                f"storage {key[:100]} claims {count:,} elements, but has {archive.size_of(entry):,} bytes"
            )
        return found

    def tensor(args: tuple[Any, ...]) -> StoredTensor:
        if len(args) < 4 or not isinstance(args[0], Storage):
            raise ForeignFileError("a tensor is described in an unknown way")
        source, offset, shape, strides = args[:4]
        shapes_ok = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_DIMS
        if not shapes_ok or not all(map(_whole, (offset, *shape, *strides))):
            raise ForeignFileError("a tensor has a shape that is none")
        made = StoredTensor(source, offset, shape, strides)
        numel = 1
        for size in shape:
            numel *= size
        last = offset + sum((size - 1) * step for size, step in zip(shape, strides))
        if numel and last >= source.count:
            raise ForeignFileError(
                f"a tensor of shape {shape} needs {last + 1:,} elements, but its storage has {source.count:,}"
            )
        if numel * source.dtype.itemsize > archive.size or offset > source.count:
            raise ForeignFileError(f"a tensor of shape {shape} is larger than the whole file")
        return made

    try:
        return unpickle(
            bytes(archive.view(f"{root}/data.pkl", verify)), {"torch._utils._rebuild_tensor_v2": tensor}, storage
        )
    except ForeignFileError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def refuse_pickle(path: Path) -> None:
    """Raises ForeignFileError, with the mend, where a bare pickle lies at `path`: torch's own format before 1.6."""
    if path.is_file():
        with open(path, "rb") as file:
            begin = file.read(2)
        if begin[:1] == pickle.PROTO and begin[1:] <= b"\5":
            raise ForeignFileError(
                f"{path} is a bare pickle (torch's format before 1.6), which is not read; save it anew with torch.save"
            )


def is_torch_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` begins as a zip archive or a pickle does."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        begin = file.read(4)
    return begin == b"PK\3\4" or (begin[:1] == pickle.PROTO and begin[1:2] <= b"\5")


def walk(tree: Any) -> Iterator[Any]:
    """Every container and object in what `open_torch_file` gave, once each, outermost first."""
    seen: set[int] = set()
    level = [tree]
    while level:
        below: list[Any] = []
        for node in level:
            if id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            if isinstance(node, dict):
                below.extend(node.values())
            elif isinstance(node, (list, tuple)) and not isinstance(node, Global):
                below.extend(node)
            elif isinstance(node, Inert):
                below.extend(node.children())
        level = below


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48
