"""Pickles are read as data: the same data as Python's own unpickler gives where that is harmless, else refused."""

import collections
import functools
import operator
import os
import pickle
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwm_fast.data.safe_unpickling import MAX_BYTES, Global, Inert, Refused, unpickle

scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary()
)
keys = st.text() | st.integers(-(2**50), 2**50) | st.booleans() | st.none() | st.binary()
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@settings(max_examples=40, deadline=None)
@given(tree=trees)
def test_plain_data_comes_back_as_pythons_unpickler_gives_it(protocol, tree):
    data = pickle.dumps(tree, protocol)
    if b"_codecs" in data or b"__builtin__" in data:  # bytes before protocol 3 are made by calls
        return
    assert unpickle(data) == pickle.loads(data)


def test_shared_and_cyclic_containers_keep_their_identity():
    inner = [1]
    tree = {"a": inner, "b": inner}
    tree["self"] = tree
    back = unpickle(pickle.dumps(tree))
    assert back["a"] is back["b"] and back["self"] is back


def test_ordered_dicts_sets_and_sizes_become_plain_containers():
    import torch

    tree = [collections.OrderedDict(a=1, b=2), {3}, frozenset([4]), torch.Size([5, 6]), torch.device("cuda:1")]
    back = unpickle(pickle.dumps(tree, 2))
    assert back == [{"a": 1, "b": 2}, [3], [4], (5, 6), "cuda:1"] and list(back[0]) == ["a", "b"]


def test_a_name_that_is_only_mentioned_is_harmless():
    assert unpickle(pickle.dumps([os.system, eval, "x"])) == [Global("posix.system"), Global("builtins.eval"), "x"]


def test_objects_of_known_libraries_become_records():
    data = b"\x80\x02comegaconf.dictconfig\nDictConfig\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    back = unpickle(data)
    assert isinstance(back, Inert) and back.name == "omegaconf.dictconfig.DictConfig" and back.state == {"a": 1}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.reduction = function, args

    def __reduce__(self):
        return self.reduction


MARK = "should_not_exist"
HOSTILE = {
    "os.system": (Call(os.system, f"touch {MARK}"), "posix.system"),
    "eval": (Call(eval, f"open('{MARK}', 'w')"), "builtins.eval"),
    "exec": (Call(exec, f"open('{MARK}', 'w')"), "builtins.exec"),
    "open": (Call(open, MARK, "w"), "open"),
    "getattr": (Call(getattr, "x", "upper"), "builtins.getattr"),
    "import": (Call(__import__, "antigravity"), "builtins.__import__"),
    "subprocess": (Call(subprocess.Popen, ["touch", MARK]), "subprocess.Popen"),
    "partial": (Call(functools.partial, os.system, MARK), "functools.partial"),
    "nested reduce": (Call(map, Call(operator.attrgetter, "system"), [Call(os.getcwd)]), "operator.attrgetter"),
    "inside a list": ([1, {"a": (Call(os.system, f"touch {MARK}"),)}], "posix.system"),
    "exit": (Call(sys.exit, 3), "sys.exit"),
    "argument of a known call": (Call(collections.OrderedDict, [(1, Call(os.getpid))]), "posix.getpid"),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("name", HOSTILE)
def test_calls_are_refused_with_their_name(name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree, called = HOSTILE[name]
    with pytest.raises(Refused, match=rf"calls '[\w.]*{called.split('.')[-1]}'; it would run code"):
        unpickle(pickle.dumps(tree, protocol))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"(S'touch x'\nios\nsystem\n.", "calls 'os.system'"),  # INST
        (b"(cos\nsystem\nS'touch x'\no.", "calls 'os.system'"),  # OBJ
        (b"cos\nsystem\n(S'touch x'\ntR.", "calls 'os.system'"),  # REDUCE
        (b"\x80\x02cbuiltins\nobject\n)\x81.", "calls 'builtins.object'"),  # NEWOBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93)}\x92.", "calls 'os.system'"),  # NEWOBJ_EX
        (b"\x80\x02cos\nsystem\n}b.", "sets the state of something the name 'os.system'"),  # BUILD
        (b"\x80\x02U\x03abc)R.", "calls something of type str"),
        (b"\x80\x02}(I1\nI2\nI3\nu.", "key without a value"),
        (b"\x80\x02}cos\nsystem\nK\x01s.", "a dictionary key is the name 'os.system'"),
        (b"\x80\x02}(K\x01K\x02\x86K\x03u.", "a dictionary key is of type tuple"),
        (b"\x80\x02K\x01K\x02a.", "appends to something of type int"),
        (b"\x82\x01.", "opcode EXT1 is refused"),
        (b"\x80\x05\x97.", "opcode NEXT_BUFFER is refused"),
        (b"P12\n.", "data outside itself"),
        (b"\x80\x07.", "protocol 7 is unknown"),
        (b"", "damaged"),
        (b"\x80\x02K\x01", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02(\x85.", "a value is missing"),
        (b"\xff\xff", "damaged"),
    ],
)
def test_bad_pickles_are_refused_with_the_reason(data, text):
    with pytest.raises(Refused, match=text):
        unpickle(data)


def seconds(data: bytes) -> float:
    begun = time.process_time()
    try:
        unpickle(data)
    except Refused:
        pass
    return time.process_time() - begun


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a string of 2 GB
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",  # of 9 EB
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",  # a frame of 9 EB
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # slot 2^31 of the memo
        b"\x80\x02" + b"(" * 200_000 + b".",
        b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",  # nested as deep
        b"\x80\x02]q\x00" + b"h\x00h\x00\x86q\x00" * 10_000 + b".",  # 2^10000 leaves, if anybody looked
        b"\x80\x02cbuiltins\nlist\nq\x00]("
        + b"N" * 100_000
        + b"eq\x01"
        + b"h\x00h\x01\x85R" * 100_000
        + b".",  # copies
        b"}("
        + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 60_000))
        + b"u.",
    ],
    ids=["string", "long string", "frame", "memo", "marks", "nested", "laughs", "copies", "equal hashes"],
)
def test_small_pickles_cost_little(data):
    import tracemalloc

    tracemalloc.start()
    try:
        assert seconds(data) < 20  # seconds of CPU, with the tracing; anything quadratic takes minutes
        assert tracemalloc.get_traced_memory()[1] < 400e6
    finally:
        tracemalloc.stop()


def test_long_pickles_are_refused_unread():
    with pytest.raises(Refused, match=f"at most {MAX_BYTES:,} are read"):
        unpickle(bytes(MAX_BYTES + 1))
