"""Finds what would make a device wait for the host, on machines with and without one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Operations whose result, or its shape, the host must know; equal and index by a mask ask on the quiet.
ASKING = {
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive",
    "repeat_interleave.Tensor", "bincount",
}  # fmt: skip
COPIES = {"copy_", "_to_copy", "_copy_from"}


class NoHostRequests(TorchDispatchMode):
    """Raises AssertionError, with the operation's name, where a device's work would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        short = name.split(".")[0]
        if name in ASKING or short in ASKING:
            raise AssertionError(f"{name} makes the host wait for the device")
        if short in ("index", "index_put_") and any(i is not None and i.dtype is torch.bool for i in args[1]):
            raise AssertionError(f"{name} by a mask is a nonzero: it makes the host wait for the device")
        out = func(*args, **(kwargs or {}))
        if short in COPIES:
            source = args[1] if short == "copy_" else args[0]
            if source.device.type != out.device.type:
                raise AssertionError(f"{name} copies from {source.device} to {out.device}")
        return out


@contextmanager
def _without_device_guard() -> Iterator[None]:
    """Tensor methods that ask a CPU-only torch for CUDA's device guard become operations that do not ask."""

    def set_item(x: Tensor, key: Any, value: Any) -> None:
        place = _index(x, key)
        aten.copy_(place, value) if isinstance(value, Tensor) else place.fill_(value)

    methods = {
        "__getitem__": _index,
        "__setitem__": set_item,
        "__invert__": lambda x: torch.bitwise_not(x),
        "contiguous": _contiguous,
        "copy_": lambda x, *args, **kwargs: aten.copy_(x, *args, **kwargs),
        "to": _to,
    }
    for name, function in methods.items():
        setattr(Tensor, name, function)
    try:
        yield
    finally:
        for name in methods:
            delattr(Tensor, name)  # torch's own are the base class's


def _index(x: Tensor, key: Any) -> Tensor:
    """x[key] for integers, slices, None, one ellipsis and index tensors."""
    keys = list(key) if isinstance(key, tuple) else [key]
    used = sum(k is not None and k is not Ellipsis for k in keys)
    if any(k is Ellipsis for k in keys):
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        keys[at : at + 1] = [slice(None)] * (x.dim() - used)
    dim = 0
    for k in keys:
        if k is None:
            x = aten.unsqueeze(x, dim)
        elif isinstance(k, int):
            x = aten.select(x, dim, k)
            continue
        elif isinstance(k, slice):
            if k != slice(None):
                x = aten.slice(x, dim, k.start, k.stop, k.step or 1)
        else:
            x = aten.index(x, [None] * dim + [k])
        dim += 1
    return x


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else aten.clone(x, memory_format=memory_format)


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, (str, torch.device)) and torch.device(value).type != x.device.type:
            raise AssertionError(f"to({value}) copies from {x.device}")
        if isinstance(value, torch.dtype):
            x = aten._to_copy(x, dtype=value) if value is not x.dtype else x
    return x


class _Copying(TorchFunctionMode):
    """While something is deep-copied, its tensors become fake ones on CUDA that share storages as the originals do."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self._mode, self._storages = mode, {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        with torch._C.DisableTorchFunction(), self._mode:
            key = tensor.untyped_storage()._cdata
            if key not in self._storages:
                numel = tensor.untyped_storage().nbytes() // tensor.element_size()
                self._storages[key] = torch.empty(numel, dtype=tensor.dtype, device="cuda")
            fake = self._storages[key].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        memo[id(tensor)] = fake
        return fake


@contextmanager
def fake_cuda(*originals: Any) -> Iterator[tuple[Any, ...]]:
    """Copies whose tensors are on a CUDA device without data; inside, every operation on them is checked.

    Reading one back, mixing devices and copying between them raise; no GPU is needed.
    """
    mode = FakeTensorMode()
    with _Copying(mode):
        copies = copy.deepcopy(originals)
    with mode, NoHostRequests(), _without_device_guard():
        yield copies


def move_module(module: nn.Module) -> nn.Module:
    """Inside `fake_cuda`: gives `module` parameters and buffers on the device without data."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cuda"))
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return module
