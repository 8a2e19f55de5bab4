"""Reading pickles without running them: a pickle machine that can only build data.

Python's unpickler looks names up and calls them, so a pickle is a program. This one never imports, looks up or calls
anything that a pickle names. A few names have a meaning of their own here (`MEANINGS`: containers, torch's sizes and
devices; the caller adds tensors); objects of known libraries (`INERT`) become `Inert` records of their arguments and
state; calling anything else is refused with its name. A name that is merely mentioned is harmless: a `Global`.

Bounds: the length of the pickle bounds memory and steps, for no opcode costs more than its own bytes, and dictionary
keys are scalars, whose hashes are cheap and cannot be made to collide at will.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pwm_fast.data.stored_zip import ForeignFileError

MAX_BYTES = 1 << 22  # the largest published checkpoint's pickle has 34 kB
HIGHEST_PROTOCOL = 5
MAX_KEY = 1 << 60  # beyond, integers with equal hashes are easy to make

# Libraries whose objects lie beside the weights and data that we read: kept as records, never used.
INERT = (
    "tensordict.",
    "omegaconf.",
    "pathlib.",
    "numpy.",
    "_codecs.encode",
    "pwm.utils.running_mean_std.",
    "torch._utils._rebuild_meta_tensor_no_storage",
)


class Refused(ForeignFileError):
    """A pickle that would run code, or is no pickle."""


class Global(NamedTuple):
    """A name that a pickle mentions; never looked up."""

    name: str


@dataclass(eq=False)
class Inert:
    """What would have been an object of another library: how it would have been made, as data."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def children(self) -> Iterator[Any]:
        """Everything directly inside."""
        yield from self.args
        yield self.state
        yield from self.items.values()
        yield from self.elements


Meaning = Callable[[tuple[Any, ...]], Any]


def _sequence(args: tuple[Any, ...]) -> Any:
    """The list or tuple itself: a copy per call would let a short pickle fill the memory."""
    if len(args) > 1 or not isinstance(args[0] if args else [], (list, tuple)):
        raise Refused("a container is made of something other than its elements")
    return args[0] if args else []


def _empty_dict(args: tuple[Any, ...]) -> Any:
    if not all(isinstance(argument, Global) for argument in args):  # of a defaultdict: the name of its default
        raise Refused("a dictionary is made of something other than its items")
    return {}


MEANINGS: dict[str, Meaning] = {
    "collections.OrderedDict": _empty_dict,
    "collections.defaultdict": _empty_dict,
    "builtins.dict": _empty_dict,
    "builtins.list": _sequence,
    "builtins.set": _sequence,
    "builtins.frozenset": _sequence,
    "torch.Size": _sequence,
    "torch.device": lambda args: ":".join(str(part)[:32] for part in args),
    "torch._utils._rebuild_parameter": lambda args: args[0],
}


def _key(key: Any) -> Any:
    if key is None or isinstance(key, (str, bytes, float, bool)) or (isinstance(key, int) and abs(key) < MAX_KEY):
        return key
    raise Refused(f"a dictionary key is {_brief(key)}; only short numbers and strings are read")


def _brief(value: Any) -> str:
    return f"the name {value.name!r}" if isinstance(value, Global) else f"of type {type(value).__name__}"


def unpickle(
    data: bytes, meanings: Mapping[str, Meaning] | None = None, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The data in a pickle: dicts, lists, tuples, numbers, strings, `Global`s, `Inert`s and what the arguments make.

    `meanings` adds to MEANINGS: a function of the argument tuple for a name. `persistent` resolves persistent ids.
    Raises Refused, with the name, for a pickle that calls anything else, and for bytes that are no pickle.
    """
    if len(data) > MAX_BYTES:
        raise Refused(f"the pickle has {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    machine = _Machine({**MEANINGS, **(meanings or {})}, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except Refused:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"the pickle is damaged ({type(error).__name__}: {reason})") from error
    raise Refused("the pickle is damaged: it has no end")


class _Mark:
    """Where a tuple, list or dictionary begins on the stack."""


_MARK = _Mark()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list
}  # fmt: skip
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_PUT, _GET = frozenset(("PUT", "BINPUT", "LONG_BINPUT")), frozenset(("GET", "BINGET", "LONG_BINGET"))
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and memo of one pickle."""

    def __init__(self, meanings: Mapping[str, Meaning], persistent: Callable[[Any], Any] | None):
        self._meanings, self._persistent = meanings, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise Refused("the pickle is damaged: a value is missing on its stack")
        return value

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise Refused("the pickle is damaged: a value is missing on its stack")
        return self._stack[-1]

    def _to_mark(self) -> list[Any]:
        """Pop everything above the last mark, and the mark."""
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def step(self, name: str, argument: Any) -> None:
        push = self._stack.append
        if name in _LITERALS:
            push(argument)
        elif name in _PUT:
            self._memo[argument] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in _GET:
            push(self._memo[argument])
        elif name == "MARK":
            push(_MARK)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name == "TUPLE":
            push(tuple(self._to_mark()))
        elif name in _SHORT_TUPLES:
            push(tuple(self.pop() for _ in range(_SHORT_TUPLES[name]))[::-1])
        elif name in ("LIST", "FROZENSET"):
            push(self._to_mark())
        elif name == "DICT":
            pairs = self._pairs(self._to_mark())
            push({})
            self._set_items(pairs)
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            self._set_items([(key, value)])
        elif name == "SETITEMS":
            self._set_items(self._pairs(self._to_mark()))
        elif name == "APPEND":
            value = self.pop()
            self._extend([value])
        elif name in ("APPENDS", "ADDITEMS"):
            self._extend(self._to_mark())
        elif name in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD"):
            self._objects(name, argument)
        elif name in ("PERSID", "BINPERSID"):
            self._resolve(argument if name == "PERSID" else self.pop())
        elif name == "POP":
            self._stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            push(self._top())
        elif name == "PROTO":
            if argument > HIGHEST_PROTOCOL:
                raise Refused(f"pickle protocol {argument} is unknown; the highest is {HIGHEST_PROTOCOL}")
        elif name != "FRAME":
            raise Refused(f"pickle opcode {name} is refused")

    @staticmethod
    def _pairs(values: list[Any]) -> list[tuple[Any, Any]]:
        if len(values) % 2:
            raise Refused("the pickle is damaged: a dictionary has a key without a value")
        return list(zip(values[::2], values[1::2]))

    def _set_items(self, pairs: list[tuple[Any, Any]]) -> None:
        target = self._top()
        if isinstance(target, Inert):
            target = target.items
        if not isinstance(target, dict):
            raise Refused(f"the pickle sets items of something {_brief(target)}")
        for key, value in pairs:
            target[_key(key)] = value

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Inert):
            target = target.elements
        if not isinstance(target, list):
            raise Refused(f"the pickle appends to something {_brief(target)}")
        target.extend(values)

    def _objects(self, name: str, argument: Any) -> None:
        """The opcodes by which pickles name, call and fill objects."""
        if name == "GLOBAL":
            self._stack.append(_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            self._stack.append(_global(module, attribute))
        elif name == "INST":
            args = tuple(self._to_mark())
            self._stack.append(self._call(_global(*argument.split(" ", 1)), args))
        elif name == "OBJ":
            called, *rest = self._to_mark()
            self._stack.append(self._call(called, tuple(rest)))
        elif name == "BUILD":
            state, target = self.pop(), self._top()
            if isinstance(target, Inert):
                target.state = state
            elif not isinstance(target, (dict, list)):  # of those two, the extra attributes are of no interest
                raise Refused(f"the pickle sets the state of something {_brief(target)}")
        else:  # REDUCE, NEWOBJ, NEWOBJ_EX
            keywords = self.pop() if name == "NEWOBJ_EX" else {}
            args, called = self.pop(), self.pop()
            if keywords != {} or not isinstance(args, tuple):
                raise Refused(f"the pickle calls {_brief(called)} in a way that is refused")
            self._stack.append(self._call(called, args))

    def _call(self, called: Any, args: tuple[Any, ...]) -> Any:
        if not isinstance(called, Global):
            raise Refused(f"the pickle calls something {_brief(called)}; it would run code and is refused")
        if called.name in self._meanings:
            return self._meanings[called.name](args)
        if called.name.startswith(INERT):
            return Inert(called.name, args)
        raise Refused(f"the pickle calls {called.name!r}; it would run code and is refused")

    def _resolve(self, identity: Any) -> None:
        if self._persistent is None:
            raise Refused("the pickle refers to data outside itself, and there is none")
        self._stack.append(self._persistent(identity))


def _global(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise Refused("the pickle names something by other than strings")
    # Python 2's name of the module, which protocol 2 still writes
    return Global(f"{'builtins' if module == '__builtin__' else module}.{name}"[:200])
