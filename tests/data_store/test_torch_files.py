"""Files of torch.save, and archives that torch would not write."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from archives import DATA, tensor_pickle, write_archive

from pwm_fast.data.stored_zip import ForeignFileError, StoredZip
from pwm_fast.data.torch_files import StoredTensor, is_torch_file, open_torch_file, walk

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_as_they_were_saved(dtype, tmp_path):
    whole = (torch.randn(6, 5, 4) * 10).to(dtype)
    tree = {
        "whole": whole,
        "view": whole[1:4, ::2, 1],
        "transposed": whole.permute(2, 0, 1),
        "scalar": whole[0, 0, 0],
        "expanded": whole[0, 0, :1].expand(4),
        "empty": whole[:0],
        "nothing": torch.zeros(0, 3).to(dtype),
        "parameter": torch.nn.Parameter(whole) if dtype.is_floating_point else whole,
    }
    torch.save(tree, tmp_path / "t.pt")
    back = open_torch_file(tmp_path / "t.pt")
    for name, tensor in tree.items():
        assert torch.equal(back[name].torch(), tensor.detach()), name
        assert back[name].torch().dtype == dtype
        assert back[name].numpy().shape == tensor.shape and not back[name].numpy().flags.writeable


def test_the_view_is_the_files_map_and_copies_are_not(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "t.pt")
    stored = open_torch_file(tmp_path / "t.pt")["a"]
    copy = stored.torch()
    copy += 1
    assert stored.numpy().tolist() == [0, 1, 2, 3] and not stored.numpy().flags.owndata


def test_a_tensor_saved_on_a_gpu_is_read_anywhere(tmp_path):
    pickled = tensor_pickle().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    path = write_archive(tmp_path / "t.pt", pickled, {"0": FLOATS})
    assert b"cuda:0" in pickled and open_torch_file(path).torch().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.pt")))
def test_fixtures_give_what_torch_reads(name):
    """Of files without other libraries' objects, torch's own safe loader is the oracle; of all, the raw bytes."""
    tree = open_torch_file(DATA / name)
    tensors = [node for node in walk(tree) if isinstance(node, StoredTensor)]
    with zipfile.ZipFile(DATA / name) as archive:
        root = archive.namelist()[0].split("/")[0]
        for tensor in tensors:
            entry = tensor.storage.entry
            raw = np.frombuffer(archive.read(entry), tensor.storage.dtype)
            assert entry.startswith(f"{root}/data/") and np.array_equal(
                tensor.numpy().ravel(), raw[tensor.offset :][: tensor.numpy().size], equal_nan=True
            )
    if "layout" in name and "omegaconf" not in name:
        expected = torch.load(DATA / name, weights_only=True)["model"]
        assert tree["model"].keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                assert torch.equal(tree["model"][key].torch(), value), key


def test_files_without_checksums_are_read_where_they_are_not_compared(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(4.0)}, tmp_path / "t.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert open_torch_file(tmp_path / "t.pt", verify=False)["a"].torch().tolist() == [0, 1, 2, 3]


def test_archives_of_more_than_4_gb_are_read(tmp_path, monkeypatch):
    """Their directory is of another form, which zipfile writes above a limit of its own."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)
    values = np.arange(40, dtype="<f4")
    path = write_archive(tmp_path / "t.pt", tensor_pickle(count=40), {"0": values.tobytes()})
    content = path.read_bytes()
    assert b"PK\6\6" in content and b"PK\6\7" in content
    assert open_torch_file(path).numpy().tolist() == [0, 1, 2, 3]


FLOATS = np.arange(4, dtype="<f4").tobytes()
HUGE = "\x8a\x08" + (2**46).to_bytes(8, "little").decode("latin1") + "\x85"
BAD_TENSORS = {
    "more elements than bytes": (dict(count=5), "claims 5 elements, but has 16 bytes"),
    "huge count": (dict(count=2**47), "claims 140,737,488,355,328 elements, but has 16 bytes"),
    "negative count": (dict(count=-1), "described in an unknown way"),
    "offset past the end": (dict(offset=1), "needs 5 elements, but its storage has 4"),
    "negative offset": (dict(offset=-4), "a shape that is none"),
    "shape past the end": (dict(shape="K\x05\x85"), "needs 5 elements"),
    "strides past the end": (dict(strides="K\x02\x85"), "needs 7 elements"),
    "huge shape": (dict(shape=HUGE), "elements, but its storage has 4"),
    "huge shape without strides": (dict(shape=HUGE, strides="K\x00\x85"), "larger than the whole file"),
    "more strides than sizes": (dict(strides="K\x01K\x01\x86"), "a shape that is none"),
    "nine dimensions": (dict(shape="(" + "K\x01" * 9 + "t", strides="(" + "K\x01" * 9 + "t"), "a shape that is none"),
    "a shape of text": (dict(shape="U\x014\x85"), "a shape that is none"),
    "unknown storage": (dict(storage="QuantumStorage"), "unknown kind"),
    "missing storage": (dict(key="7"), "member 'a/data/7' is missing"),
    "path out of the archive": (dict(key="../../etc/passwd"), "is missing"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_reach_outside_are_refused(case, tmp_path):
    options, text = BAD_TENSORS[case]
    path = write_archive(tmp_path / "t.pt", tensor_pickle(**options), {"0": FLOATS})
    with pytest.raises(ForeignFileError, match=text) as caught:
        open_torch_file(path)
    assert str(path) in str(caught.value)


def test_the_good_one_of_those_is_read(tmp_path):
    path = write_archive(tmp_path / "t.pt", tensor_pickle(), {"0": FLOATS}, byteorder=b"little")
    assert open_torch_file(path).torch().tolist() == [0, 1, 2, 3]


def archive_bytes(compression: int = zipfile.ZIP_STORED, names: tuple[str, ...] = ("a/data.pkl",)) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in names:
            archive.writestr(name, pickle_of_none() + bytes(1000))
    return buffer.getvalue()


def pickle_of_none() -> bytes:
    return b"\x80\x02N."


def patched(data: bytes, where: bytes, offset: int, value: bytes) -> bytes:
    place = data.rindex(where) + offset
    return data[:place] + value + data[place + len(value) :]


GOOD = archive_bytes()
BAD_FILES = {
    "text": (b"my weights", "is no zip archive"),
    "one byte": (b"P", "is no zip archive"),
    "bare pickle": (b"\x80\x02cos\nsystem\n.", r"bare pickle .* save it anew with torch\.save"),
    "truncated": (GOOD[:-30], "truncated"),
    "no pickle": (archive_bytes(names=("a/code.py",)), "0 members 'data.pkl'"),
    "two pickles": (archive_bytes(names=("a/data.pkl", "b/data.pkl")), "2 members 'data.pkl'"),
    "compressed": (archive_bytes(zipfile.ZIP_DEFLATED), "is compressed"),
    "checksum": (patched(GOOD, b"\x80\x02N.", 500, b"\x01"), "fails its checksum"),
    "directory outside": (patched(GOOD, b"PK\5\6", 16, b"\xff\xff\xff\x7f"), "points outside"),
    "too many members": (patched(GOOD, b"PK\5\6", 10, b"\xff\xff"), "has 1 of 65535 members"),
    "member outside": (patched(GOOD, b"PK\1\2", 42, b"\xff\xff\xff\x7f"), "does not lie where the directory says"),
    "member too long": (patched(patched(GOOD, b"PK\1\2", 20, struct.pack("<II", 2**31, 2**31)), b"PK\1\2", 0, b"PK"),
                        "pickle of 2,147,483,648 bytes; at most"),
    "name not text": (patched(GOOD, b"PK\1\2", 46, b"\xff\xfe"), "directory cannot be read"),
    "name too long": (patched(GOOD, b"PK\1\2", 28, b"\xff\xff"), "runs past the zip directory"),
    "encrypted": (patched(GOOD, b"PK\1\2", 8, b"\x01"), "encrypted"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_archives_are_refused_with_the_reason(case, tmp_path):
    content, text = BAD_FILES[case]
    path = tmp_path / "t.pt"
    path.write_bytes(content)
    with pytest.raises(ForeignFileError, match=text) as caught:
        open_torch_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
    path = tmp_path / "t.pt"
    path.write_bytes(archive_bytes(names=("a/data.pkl", "a/data.pkl")))
    with pytest.raises(ForeignFileError, match=r"two members named 'a/data\.pkl'"):
        StoredZip(path)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt does not exist"):
        open_torch_file(tmp_path / "absent.pt")
    with pytest.raises(ForeignFileError, match="is not a file"):
        open_torch_file(tmp_path)
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ForeignFileError, match=r"empty\.pt is empty"):
        open_torch_file(tmp_path / "empty.pt")
    assert not is_torch_file(tmp_path / "empty.pt") and not is_torch_file(tmp_path)


def test_big_endian_files_are_refused(tmp_path):
    path = write_archive(tmp_path / "t.pt", tensor_pickle(), {"0": FLOATS}, byteorder=b"big")
    with pytest.raises(ForeignFileError, match="byte order b'big'"):
        open_torch_file(path)


def test_the_old_format_of_torch_is_refused_with_the_mend(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "t.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ForeignFileError, match=r"save it anew with torch\.save"):
        open_torch_file(tmp_path / "t.pt")
