"""Little-endian numbers off a block of bytes, with every read checked against the end.

This file, and the others that `_amalgamate.py` lists, run interpreted and compiled alike. Their C types stand in
`_types.pxd`; nothing here imports Cython.
"""

from __future__ import annotations

from array import array

from heapledger.tracer.symbols.damaged import DamagedError


class Cursor:
    """A position in `data`. Reads move it forward; a read past `end` raises DamagedError and moves nothing."""

    __slots__ = ("data", "end", "pos")

    def __init__(self, data: bytes, pos: int = 0) -> None:
        self.data = data
        self.end = len(data)
        if pos < 0 or pos > self.end:
            raise DamagedError("offset outside the section")
        self.pos = pos

    def seek(self, pos: int) -> None:
        """Move to `pos`, which must lie within the data."""
        if pos < 0 or pos > self.end:
            raise DamagedError("offset outside the section")
        self.pos = pos

    def skip(self, count: int) -> None:
        """Move `count` bytes forward."""
        if count > self.end - self.pos:
            raise DamagedError("runs past the end")
        self.pos += count

    def u8(self) -> int:
        if self.pos >= self.end:
            raise DamagedError("runs past the end")
        value = self.data[self.pos]
        self.pos += 1
        return value

    def fixed(self, size: int) -> int:
        """An unsigned number of `size` bytes, at most 8."""
        if size > self.end - self.pos:
            raise DamagedError("runs past the end")
        data = self.data
        at = self.pos + size
        self.pos = at
        value = 0
        while size > 0:
            at -= 1
            size -= 1
            value = (value << 8) | data[at]
        return value

    def uleb(self) -> int:
        """An unsigned LEB128 number; bits past the 64th are dropped."""
        data = self.data
        at = self.pos
        end = self.end
        result = 0
        shift = 0
        while at < end:
            byte = data[at]
            at += 1
            part = byte & 0x7F
            if shift < 64:
                result |= part << shift
            if byte < 0x80:
                self.pos = at
                return result
            shift += 7
        raise DamagedError("runs past the end")

    def sleb(self) -> int:
        """A signed LEB128 number of at most 64 bits."""
        data = self.data
        at = self.pos
        end = self.end
        result = 0
        shift = 0
        one = 1
        while at < end:
            byte = data[at]
            at += 1
            part = byte & 0x7F
            if shift < 64:
                result |= part << shift
            shift += 7
            if byte < 0x80:
                self.pos = at
                if byte & 0x40 and shift < 64:
                    result -= one << shift
                return result
        raise DamagedError("runs past the end")

    def skip_leb(self) -> None:
        """Move over one LEB128 number of any length."""
        data = self.data
        at = self.pos
        end = self.end
        while at < end:
            byte = data[at]
            at += 1
            if byte < 0x80:
                self.pos = at
                return
        raise DamagedError("runs past the end")

    def skip_string(self) -> None:
        """Move over one string and its NUL."""
        data = self.data
        at = self.pos
        end = self.end
        while at < end:
            if data[at] == 0:
                self.pos = at + 1
                return
            at += 1
        raise DamagedError("runs past the end")

    def string(self) -> bytes:
        """The bytes up to the next NUL, without it."""
        start = self.pos
        self.skip_string()
        return self.data[start : self.pos - 1]


def first_at_least(values: array[int], wanted: int) -> int:
    """Index of the first of the ascending `values` that is >= `wanted`; their number where there is none."""
    low = 0
    high = len(values)
    while low < high:
        middle = (low + high) >> 1
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low
