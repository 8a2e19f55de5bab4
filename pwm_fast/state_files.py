"""Files that are whole or absent: atomic writes, and nested state in safetensors without pickle.

A write goes to a hidden `.NAME.part` beside its target, is flushed to the disk, and is renamed over the target; a
process killed at any moment leaves the old file or the new one. A full disk removes the part and names the path.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

STATE_FORMAT = "pwm_fast.state.1"
PART = ".part"
_TENSOR, _ARRAY = "__tensor__", "__array__"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields the path of a part to write; when the block ends well, the part replaces `path`, else it is removed.

    Raises OSError that names `path`, the reason and the mend when the file system refuses.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}{PART}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())  # safetensors makes files that only their owner can read
        os.replace(part, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise write_error(path, error) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """An open binary file whose content replaces `path` when the block ends well."""
    with replacing(path) as part, open(part, "wb") as file:
        yield file


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` atomically as indented JSON."""
    text = json.dumps(content, indent=2) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def read_json(path: str | Path) -> Any:
    """Content of a JSON file; raises FileNotFoundError, or ValueError that says where it is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_error(path: Path, error: Exception) -> OSError:
    """The error of a failed write, told with its path and a mend."""
    number = getattr(error, "errno", None)
    if number is None:  # safetensors reports the system's number in its text only
        found = re.search(r"os error (\d+)", str(error))
        number = int(found.group(1)) if found else errno.EIO
    reason = os.strerror(number) if number else str(error)
    mend = {
        errno.ENOSPC: "free some space, then go on with --resume",
        errno.EDQUOT: "free some space, then go on with --resume",
        errno.EFBIG: "raise the file size limit (ulimit -f), then go on with --resume",
    }.get(number, "choose another --out")
    return OSError(number, f"cannot write {path}: {reason}; {mend}")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_folder(path: Path) -> None:
    """Make a rename durable where the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def save_state(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write a nested dict atomically as one safetensors file; structure and scalars lie as JSON in its header.

    Leaves: tensors, numpy arrays, int, float, bool, str, None, and lists of them. Keys are strings. Raises TypeError
    that names the place of anything else, and OSError when the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()

    def encode(value: Any, place: str) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or key in (_TENSOR, _ARRAY):
                    raise TypeError(f"key {key!r} at {place or 'the top'} must be a string other than {_TENSOR}")
            return {key: encode(item, f"{place}/{key}" if place else key) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [encode(item, f"{place}/{i}") for i, item in enumerate(value)]
        if isinstance(value, (Tensor, np.ndarray)):
            mark = _TENSOR if isinstance(value, Tensor) else _ARRAY
            tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
            tensor = tensor.detach().contiguous()
            if tensor.untyped_storage().data_ptr() in storages:  # the format holds no views of one another
                tensor = tensor.clone()
            storages.add(tensor.untyped_storage().data_ptr())
            tensors[place] = tensor
            return {mark: place}
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"state at {place} must be a tensor, number, string or container, got {type(value).__name__}")

    structure = json.dumps(encode(tree, ""))
    with replacing(path) as part:
        save_file(tensors, part, metadata={"format": STATE_FORMAT, "tree": structure})


def load_state(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The dict that `save_state` wrote, exactly (tuples come back as lists, numpy arrays as numpy arrays).

    Raises FileNotFoundError, or ValueError that says what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"state file {path} does not exist")

    def decode(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {_TENSOR}:
                return file.get_tensor(value[_TENSOR])
            if value.keys() == {_ARRAY}:
                return file.get_tensor(value[_ARRAY]).cpu().numpy()
            return {key: decode(item) for key, item in value.items()}
        return [decode(item) for item in value] if isinstance(value, list) else value

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("format") != STATE_FORMAT:
                raise ValueError(f"{path} holds no state of pwm_fast (format {header.get('format')!r})")
            return decode(json.loads(header["tree"]))
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"state file {path} is damaged: {error}") from error
