"""Address ranges of a DIE: .debug_ranges (DWARF 4) and .debug_rnglists (DWARF 5)."""

from __future__ import annotations

from heapledger.tracer.symbols.cursor import Cursor
from heapledger.tracer.symbols.damaged import DamagedError
from heapledger.tracer.symbols.units import Unit

FORM_RNGLISTX = 0x23
# Ranges read for one file. A damaged file can point every DIE at one endless list; no honest one comes near this.
BUDGET = 50_000_000


class RangeReader:
    """Reads range lists of one file. `left` is what remains of its budget."""

    def __init__(self, ranges: bytes, rnglists: bytes) -> None:
        self.ranges = ranges
        self.rnglists = rnglists
        self.left = BUDGET

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise DamagedError("too many address ranges")

    def read(self, unit: Unit, form: int, value: int) -> list[int]:
        """The ranges of a DW_AT_ranges attribute: low, high, low, high... Empty ones are left out."""
        if unit.version < 5:
            return self.read_ranges(unit, value)
        if form == FORM_RNGLISTX:
            value = self.indexed(unit, value)
        return self.read_rnglist(unit, value)

    def indexed(self, unit: Unit, index: int) -> int:
        """The offset of a range list from the offset table that `rnglists_base` points at."""
        size = unit.offset_size
        if index >= len(self.rnglists):
            raise DamagedError("range list index")
        return unit.rnglists_base + Cursor(self.rnglists, unit.rnglists_base + index * size).fixed(size)

    def read_ranges(self, unit: Unit, offset: int) -> list[int]:
        """Pairs of addresses relative to a base, at first the unit's low_pc; (all ones, base) moves it; (0, 0) ends."""
        found: list[int] = []
        size = unit.address_size
        top = 0xFFFFFFFFFFFFFFFF if size == 8 else 0xFFFFFFFF
        base = unit.low_pc
        if offset > len(self.ranges):
            raise DamagedError("range list offset")
        cur = Cursor(self.ranges, offset)
        while True:
            self.spend()
            low = cur.fixed(size)
            high = cur.fixed(size)
            if low == 0 and high == 0:
                return found
            if low == top:
                base = high
            elif low < high:
                found.append((base + low) & top)
                found.append((base + high) & top)

    def read_rnglist(self, unit: Unit, offset: int) -> list[int]:
        """DW_RLE_* entries (DWARF 5 section 7.25)."""
        found: list[int] = []
        size = unit.address_size
        base = unit.low_pc
        if offset > len(self.rnglists):
            raise DamagedError("range list offset")
        cur = Cursor(self.rnglists, offset)
        while True:
            self.spend()
            kind = cur.u8()
            if kind == 0:
                return found
            if kind == 1:
                base = unit.address(cur.uleb())
                continue
            if kind == 5:
                base = cur.fixed(size)
                continue
            if kind == 2:
                low = unit.address(cur.uleb())
                high = unit.address(cur.uleb())
            elif kind == 3:
                low = unit.address(cur.uleb())
                high = low + cur.uleb()
            elif kind == 4:
                low = base + cur.uleb()
                high = base + cur.uleb()
            elif kind == 6:
                low = cur.fixed(size)
                high = cur.fixed(size)
            elif kind == 7:
                low = cur.fixed(size)
                high = low + cur.uleb()
            else:
                raise DamagedError("unknown range list entry")
            if low < high:
                found.append(low)
                found.append(high)
