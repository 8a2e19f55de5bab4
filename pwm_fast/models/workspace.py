"""Memory that is asked for once: passes of a few MB spend up to a tenth of their time on fresh pages otherwise."""

from __future__ import annotations

from torch import Tensor


class Workspace:
    """Tensors by name and shape that passes share one after the other: each overwrites what the last one left there."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._parts: dict[str, Workspace] = {}

    def tensor(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """The tensor of this name and shape, of the type of `like`; its content is anything."""
        key = (name, shape)
        if key not in self._tensors:
            self._tensors[key] = like.new_empty(shape)
        return self._tensors[key]

    def part(self, name: str) -> Workspace:
        """A workspace within this one, for passes whose memory must not meet."""
        if name not in self._parts:
            self._parts[name] = Workspace()
        return self._parts[name]
