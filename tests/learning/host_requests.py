"""Finds what would make a device wait for the host, on machines with and without one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result or result's shape the host must know.
ASKING = {
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive",
    "repeat_interleave.Tensor", "bincount",
}  # fmt: skip


class NoHostRequests(TorchDispatchMode):
    """Raises AssertionError, with the operation's name, where a device's work would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name in ASKING or name.split(".")[0] in ASKING:
            raise AssertionError(f"{name} makes the host wait for the device")
        out = func(*args, **(kwargs or {}))
        if name.split(".")[0] in ("copy_", "_to_copy", "_copy_from"):
            source = args[1] if name.split(".")[0] == "copy_" else args[0]
            if source.device.type != out.device.type:
                raise AssertionError(f"{name} copies from {source.device} to {out.device}")
        return out


class _ToFakeCuda(TorchFunctionMode):
    """While something is deep-copied, its tensors become fake ones on CUDA that share storages as the originals do."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self._mode, self._storages = mode, {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        with torch._C.DisableTorchFunction(), self._mode:
            key = tensor.untyped_storage().data_ptr()
            if key not in self._storages:
                numel = tensor.untyped_storage().nbytes() // tensor.element_size()
                self._storages[key] = torch.empty(numel, dtype=tensor.dtype, device="cuda")
            fake = self._storages[key].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        memo[id(tensor)] = fake
        return fake


@contextmanager
def fake_cuda_extraction(extraction: Any, *others: Any) -> Iterator[tuple[Any, ...]]:
    """Copies whose tensors are on a CUDA device without data; inside, every operation on them is checked."""
    mode = FakeTensorMode()
    with _ToFakeCuda(mode):
        copies = copy.deepcopy((extraction, *others))
    copies[0]._device = torch.device("cuda", 0)
    with mode, NoHostRequests():
        yield copies
