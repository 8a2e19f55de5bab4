"""Zip archives as `torch.save` writes them (members stored, not compressed), read by memory map.

Every number in the archive is checked against the file before it is used, so a damaged or hostile file costs no more
memory than its directory: nothing is ever allocated by a size that the file merely claims.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

MAX_ENTRIES = 100_000  # a checkpoint has hundreds; each costs a Python object
_END, _END64, _LOCATOR, _CENTRAL, _LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
_END_BYTES, _LOCATOR_BYTES, _CENTRAL_BYTES, _LOCAL_BYTES = 22, 20, 46, 30
_CRC_PIECE = 1 << 24


class ForeignFileError(ValueError):
    """A file of another program that cannot be read or must not be; the message says why."""


class Entry(NamedTuple):
    header: int  # offset of the local header
    size: int
    crc: int
    compressed: bool


class StoredZip:
    """A read-only map of an archive. `names` lists its members.

    Raises FileNotFoundError, or ForeignFileError for anything that is no such archive.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if not self.path.is_file():
            raise ForeignFileError(f"{path} is not a file")
        self.size = self.path.stat().st_size
        if self.size == 0:
            raise ForeignFileError(f"{path} is empty")
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._checked: set[str] = set()
        try:
            self._entries = self._directory()
        except (struct.error, UnicodeDecodeError) as error:
            raise ForeignFileError(f"{path} is damaged: its zip directory cannot be read ({error})") from error

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def _directory(self) -> dict[str, Entry]:
        if self._map[:4] not in (_LOCAL, _END):
            raise ForeignFileError(f"{self.path} is no zip archive (it begins with {bytes(self._map[:4])!r})")
        end = self._map.rfind(_END, max(0, self.size - _END_BYTES - 0xFFFF))
        if end < 0:
            raise ForeignFileError(f"{self.path} is truncated: a zip archive's directory is missing at its end")
        count, length, start = struct.unpack_from("<10xHII2x", self._map, end)
        place = end - _LOCATOR_BYTES
        if place >= 0 and self._map[place : place + 4] == _LOCATOR:
            place = struct.unpack_from("<8xQ4x", self._map, place)[0]
            if place + 56 > self.size or self._map[place : place + 4] != _END64:
                raise ForeignFileError(f"{self.path} is damaged: its zip directory points outside the file")
            count, length, start = struct.unpack_from("<32xQQQ", self._map, place)
        if count > MAX_ENTRIES:
            raise ForeignFileError(f"{self.path} has {count:,} members; at most {MAX_ENTRIES:,} are read")
        if start + length > end:
            raise ForeignFileError(f"{self.path} is damaged: its zip directory points outside the file")
        entries: dict[str, Entry] = {}
        for _ in range(count):
            if self._map[start : start + 4] != _CENTRAL:
                raise ForeignFileError(
                    f"{self.path} is damaged: its zip directory has {len(entries)} of {count} members"
                )
            start = self._member(start, end, entries)
        return entries

    def _member(self, start: int, end: int, entries: dict[str, Entry]) -> int:
        """Add one record of the directory; where the next begins."""
        flags, method, crc, packed, size, name_length, extra_length, note_length, header = struct.unpack_from(
            "<8xHH4xIIIHHH8xI", self._map, start
        )
        name_end = start + _CENTRAL_BYTES + name_length
        if name_end + extra_length > end:
            raise ForeignFileError(f"{self.path} is damaged: a member's record runs past the zip directory")
        name = self._map[start + _CENTRAL_BYTES : name_end].decode()
        # zip64: the record's extra field holds, in this order, those of the numbers that did not fit 32 bits
        wide = self._wide(name_end, name_end + extra_length)
        size, packed, header = (next(wide, -1) if value == 0xFFFFFFFF else value for value in (size, packed, header))
        if name in entries:
            raise ForeignFileError(f"{self.path} is damaged: it has two members named {name!r}")
        if min(size, packed, header) < 0 or flags & 1:
            raise ForeignFileError(f"{self.path}: member {name!r} is encrypted or its sizes are missing")
        entries[name] = Entry(header, size, crc, method != 0 or packed != size)
        return name_end + extra_length + note_length

    def _wide(self, start: int, end: int):  # type: ignore[no-untyped-def]
        while start + 4 <= end:
            kind, length = struct.unpack_from("<HH", self._map, start)
            if kind == 1:
                for place in range(start + 4, min(start + 4 + length, end) - 7, 8):
                    yield struct.unpack_from("<Q", self._map, place)[0]
                return
            start += 4 + length

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def size_of(self, name: str) -> int:
        """Bytes of a member. Raises ForeignFileError where there is none."""
        if name not in self._entries:
            raise ForeignFileError(f"{self.path} is damaged: member {name!r} is missing")
        return self._entries[name].size

    def view(self, name: str, verify: bool = True) -> memoryview:
        """A member's bytes, mapped. With `verify`, its checksum is compared once."""
        self.size_of(name)
        entry = self._entries[name]
        if entry.compressed:
            raise ForeignFileError(f"{self.path}: member {name!r} is compressed, which torch.save never does")
        if entry.header + _LOCAL_BYTES > self.size or self._map[entry.header : entry.header + 4] != _LOCAL:
            raise ForeignFileError(f"{self.path} is damaged: member {name!r} does not lie where the directory says")
        begin = entry.header + _LOCAL_BYTES + sum(struct.unpack_from("<26xHH", self._map, entry.header))
        if begin + entry.size > self.size:
            raise ForeignFileError(f"{self.path} is truncated: member {name!r} needs {entry.size:,} bytes past its end")
        data = memoryview(self._map)[begin : begin + entry.size]
        if verify and name not in self._checked:
            crc = 0
            for first in range(0, len(data), _CRC_PIECE):
                crc = zlib.crc32(data[first : first + _CRC_PIECE], crc)
            if crc != entry.crc:
                raise ForeignFileError(f"{self.path} is damaged: member {name!r} fails its checksum")
            self._checked.add(name)
        return data
