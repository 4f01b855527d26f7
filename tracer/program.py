"""What a program's ELF file says of itself, as far as `target` asks: with `struct` alone, because this happens before
the program starts (pyelftools takes 25 ms to import, numpy 60).

Sizes and places are checked against the file: what does not fit raises ValueError or struct.error.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_LOAD, _DYNAMIC, _INTERP = 1, 2, 3
_SYMTAB, _DYNSYM = 2, 11
_NEEDED, _STRTAB, _STRSZ = 1, 5, 10
_FUNCTION = 2
#: Larger symbol tables are not searched (bytes).
_MAX_SYMTAB = 64 << 20
_MAX_NAME = 4096


@dataclass(slots=True, frozen=True)
class _Segment:
    type: int
    offset: int
    address: int
    size: int


@dataclass(slots=True, frozen=True)
class _Section:
    type: int
    offset: int
    size: int
    link: int


class Program:
    """A mapped ELF file. `bits` and `machine` hold for any; the rest only for little-endian 64-bit ones."""

    def __init__(self, file: BinaryIO) -> None:
        self._data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        ident = self._part(0, 20)
        self.bits = {1: 32, 2: 64}.get(ident[4], 0)
        self.is_big_endian = ident[5] == 2
        self.type, self.machine = struct.unpack_from(">HH" if self.is_big_endian else "<HH", ident, 16)

    def _tables(self) -> tuple[int, int, int, int, int, int]:
        """Offset, entry size and entries of the segments; the same of the sections."""
        fields = _HEADER.unpack(self._part(0, _HEADER.size))
        segments, sections, _, _, segment_size, segment_count, section_size, section_count = fields[5:13]
        return segments, segment_size, segment_count, sections, section_size, section_count

    def close(self) -> None:
        self._data.close()

    def _part(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._data):
            raise ValueError("the file is cut short")
        return self._data[offset : offset + size]

    def _text(self, at: int, end: int) -> bytes:
        stop = self._data.find(b"\0", at, min(end, at + _MAX_NAME))
        if stop < 0:
            raise ValueError("a name has no end")
        return self._data[at:stop]

    def _segments(self) -> list[_Segment]:
        offset, size, count, *_ = self._tables()
        if count and size != _SEGMENT.size:
            raise ValueError("segments of a wrong size")
        found = _SEGMENT.iter_unpack(self._part(offset, size * count))
        return [_Segment(kind, offset, address, size) for kind, _, offset, address, _, size, _, _ in found]

    def interpreter(self) -> str:
        """The loader it asks for; "" for a static program."""
        for segment in self._segments():
            if segment.type == _INTERP:
                return self._text(segment.offset, segment.offset + segment.size).decode()
        return ""

    def needed(self) -> list[str]:
        """The libraries it names (DT_NEEDED)."""
        segments = self._segments()
        for segment in segments:
            if segment.type == _DYNAMIC:
                break
        else:
            return []
        size = segment.size // 16 * 16
        tags = list(struct.iter_unpack("<QQ", self._part(segment.offset, size)))
        known = dict(tags)
        if _STRTAB not in known or not any(tag == _NEEDED for tag, _ in tags):
            return []
        low = self._offset_of(known[_STRTAB], segments)
        high = low + known.get(_STRSZ, 0)
        return [self._text(low + value, high).decode() for tag, value in tags if tag == _NEEDED]

    @staticmethod
    def _offset_of(address: int, segments: list[_Segment]) -> int:
        for segment in segments:
            if segment.type == _LOAD and segment.address <= address < segment.address + segment.size:
                return address - segment.address + segment.offset
        raise ValueError("an address that is not in the file")

    def _sections(self) -> list[_Section]:
        *_, offset, size, count = self._tables()
        if count and size != _SECTION.size:
            raise ValueError("sections of a wrong size")
        found = _SECTION.iter_unpack(self._part(offset, size * count))
        return [_Section(kind, offset, size, link) for _, kind, _, _, offset, size, link, *_ in found]

    def defines(self, name: bytes) -> bool:
        """Whether a function `name` is defined here, exported or not. Looks the name up, then its offset: the symbol
        tables of large programs have 10**5 entries."""
        sections = self._sections()
        for section in sections:
            if section.type not in (_SYMTAB, _DYNSYM) or section.size > _MAX_SYMTAB or section.link >= len(sections):
                continue
            strings = sections[section.link]
            for at in self._find(name + b"\0", strings):  # also where it is the end of a longer name
                if any(kind == _FUNCTION and index for kind, index in self._named(section, at - strings.offset)):
                    return True
        return False

    def _find(self, wanted: bytes, section: _Section) -> Iterator[int]:
        end = section.offset + section.size
        at = self._data.find(wanted, section.offset, end)
        while at >= 0:
            yield at
            at = self._data.find(wanted, at + 1, end)

    def _named(self, section: _Section, name: int) -> Iterator[tuple[int, int]]:
        """(type, section index) of the symbols whose st_name is `name`."""
        for at in self._find(struct.pack("<I", name), section):
            if (at - section.offset) % _SYMBOL.size == 0:
                _, info, _, index, _, _ = _SYMBOL.unpack(self._part(at, _SYMBOL.size))
                yield info & 0xF, index
