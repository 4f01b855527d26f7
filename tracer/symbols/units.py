"""Units of .debug_info: headers, root attributes, single DIEs, and which unit an address belongs to.

DWARF 4    length 4 (or ffffffff, 8)   version 2   abbrev offset 4/8   address size 1
DWARF 5    length 4 (or ffffffff, 8)   version 2   unit type 1   address size 1   abbrev offset 4/8
           then, by unit type: skeleton and split_compile an 8-byte id; type units 8 bytes of signature and an offset
"""

from __future__ import annotations

from array import array

from heapledger.tracer.symbols.abbrevs import (
    ATTR,
    CHILDREN,
    COUNT,
    FIRST,
    FIXED,
    FORM,
    FORM_GNU_ADDR_INDEX,
    FORM_IMPLICIT_CONST,
    INFO,
    OP,
    OP_BLOCK,
    OP_BLOCK1,
    OP_BLOCK2,
    OP_BLOCK4,
    OP_INDIRECT,
    OP_LEB,
    OP_STRING,
    OP_UNKNOWN,
    SKIP_COUNT,
    SKIP_FIRST,
    SPEC,
    TAG,
    AbbrevTable,
    form_op,
)  # fmt: skip
from heapledger.tracer.symbols.cursor import Cursor, first_at_least
from heapledger.tracer.symbols.damaged import DamagedError

FORM_ADDR = 0x01
FORM_SDATA = 0x0D
FORM_INDIRECT = 0x16
FORM_ADDRX = 0x1B
FORM_ADDRX1 = 0x29
FORM_ADDRX4 = 0x2C

Die = dict[int, tuple[int, int]]


def unit_length(head: bytes) -> tuple[int, int]:
    """(bytes of the whole unit with its length field, offset size) from the first 12 bytes of any unit."""
    cur = Cursor(head)
    length = cur.fixed(4)
    if length == 0xFFFFFFFF:
        return cur.fixed(8) + 12, 8
    if length >= 0xFFFFFFF0:
        raise DamagedError("reserved unit length")
    return length + 4, 4


def is_address_form(form: int) -> bool:
    """Whether a DW_AT_high_pc of this form is an address (otherwise it is a size)."""
    return form in (FORM_ADDR, FORM_ADDRX, FORM_GNU_ADDR_INDEX) or FORM_ADDRX1 <= form <= FORM_ADDRX4


class Unit:
    """One unit's bytes and what its header says. Offsets of DIEs count from the start of the unit.

    The bases and `low_pc` are filled in from the root DIE by whoever made it (`dwarf.open_unit`).
    """

    def __init__(self, data: bytes, offset: int) -> None:
        self.data = data
        self.offset = offset
        self.cur = Cursor(data)
        cur = self.cur
        length = cur.fixed(4)
        self.offset_size = 4
        if length == 0xFFFFFFFF:
            cur.skip(8)
            self.offset_size = 8
        self.version = cur.fixed(2)
        self.unit_type = 1
        if self.version < 2 or self.version > 5:
            raise DamagedError("unknown DWARF version")
        if self.version >= 5:
            self.unit_type = cur.u8()
            self.address_size = cur.u8()
            self.abbrev_offset = cur.fixed(self.offset_size)
            if self.unit_type == 4 or self.unit_type == 5:
                cur.skip(8)
            elif self.unit_type == 2 or self.unit_type == 6:
                cur.skip(8 + self.offset_size)
        else:
            self.abbrev_offset = cur.fixed(self.offset_size)
            self.address_size = cur.u8()
        if self.address_size != 4 and self.address_size != 8:
            raise DamagedError("address size")
        self.root = cur.pos
        self.low_pc = 0
        self.str_offsets_base = 0
        self.addr_base = 0
        self.rnglists_base = 0
        self.addresses = b""

    def use_abbrevs(self, table: AbbrevTable) -> None:
        self.table = table

    def address(self, index: int) -> int:
        """Entry `index` of this unit's part of .debug_addr."""
        size = self.address_size
        if index >= len(self.addresses):
            raise DamagedError("address index")
        return Cursor(self.addresses, self.addr_base + index * size).fixed(size)

    def to_address(self, form: int, value: int) -> int:
        """The address that an attribute of an address form means."""
        return value if form == FORM_ADDR else self.address(value)

    def skip_op(self, op: int) -> None:
        """Move over one attribute, or a merged run of them."""
        cur = self.cur
        if op < OP_LEB:
            cur.skip(op)
        elif op == OP_LEB:
            cur.skip_leb()
        elif op == OP_BLOCK:
            cur.skip(cur.uleb())
        elif op == OP_STRING:
            cur.skip_string()
        elif op == OP_BLOCK1:
            cur.skip(cur.u8())
        elif op == OP_BLOCK2:
            cur.skip(cur.fixed(2))
        elif op == OP_BLOCK4:
            cur.skip(cur.fixed(4))
        elif op == OP_INDIRECT:
            self.skip_op(self.indirect_op(cur.uleb()))
        else:
            raise DamagedError("unknown form")

    def indirect_op(self, form: int) -> int:
        """The operation of a form that stands in the data; it may not be indirect again."""
        op = OP_UNKNOWN
        if form < 0xFFFF and form != FORM_INDIRECT:
            op = form_op(self.table.ops, form, self.offset_size)
        return op

    def skip_die(self, code: int) -> None:
        """Move over the attributes of a DIE whose abbreviation code has just been read."""
        table = self.table
        row = code * INFO
        fixed = table.info[row + FIXED]
        if fixed >= 0:
            self.cur.skip(fixed)
            return
        at = table.info[row + SKIP_FIRST]
        end = at + table.info[row + SKIP_COUNT]
        while at < end:
            self.skip_op(table.skips[at])
            at += 1

    def value(self, form: int, op: int) -> int:
        """One attribute's value as a number. Of strings and blocks: where their bytes start in the unit."""
        cur = self.cur
        if op <= 8:
            return cur.fixed(op)
        if op == OP_LEB:
            if form == FORM_SDATA:
                return cur.sleb()
            return cur.uleb()
        start = cur.pos
        self.skip_op(op)
        return start

    def checked_code(self) -> int:
        """The abbreviation code of the next DIE, 0 for the end of a list of siblings."""
        code = self.cur.uleb()
        if code > self.table.codes:
            raise DamagedError("no such abbreviation")
        return code

    def read_die(self, offset: int) -> Die:
        """All attributes of the DIE at `offset`: {attribute: (form, value)}; key 0 is (tag, has children)."""
        cur = self.cur
        cur.seek(offset)
        code = self.checked_code()
        if code == 0:
            return {}
        table = self.table
        row = code * INFO
        die = {0: (table.info[row + TAG], table.info[row + CHILDREN])}
        at = table.info[row + FIRST]
        end = at + table.info[row + COUNT]
        while at < end:
            attr = table.specs[at * SPEC + ATTR]
            form = table.specs[at * SPEC + FORM]
            op = table.specs[at * SPEC + OP]
            if op == OP_INDIRECT:
                form = cur.uleb() & 0xFFFF
                op = self.indirect_op(form)
            if form == FORM_IMPLICIT_CONST:
                die[attr] = (form, table.consts.get(at, 0))
            else:
                die[attr] = (form, self.value(form, op))
            at += 1
        return die


def lookup_aranges(data: bytes, targets: array[int]) -> tuple[list[int], list[int]]:
    """.debug_aranges: the offset of the unit of each of the ascending `targets` (-1: none), and all units named in it.

        length 4   version 2   .debug_info offset 4   address size 1   segment size 1   padding to 2 * address size
        (address, length)...   0 0

    Of several units that claim an address the one with the smallest range has it.
    """
    count = len(targets)
    units = array("q", [-1]) * count
    sizes = array("Q", [0]) * count
    seen = []
    start = 0
    total = len(data)
    cur = Cursor(data)
    while start + 12 <= total:
        cur.seek(start)
        length = cur.fixed(4)
        offset_size = 4
        if length == 0xFFFFFFFF:
            length = cur.fixed(8)
            offset_size = 8
        end = cur.pos + length
        if length > total or end > total:
            break
        version = cur.fixed(2)
        unit = cur.fixed(offset_size)
        address_size = cur.u8()
        segment_size = cur.u8()
        if version == 2 and segment_size == 0 and (address_size == 4 or address_size == 8):
            seen.append(unit)
            pair = 2 * address_size
            at = start + ((cur.pos - start + pair - 1) // pair) * pair
            while at + pair <= end:
                cur.seek(at)
                low = cur.fixed(address_size)
                size = cur.fixed(address_size)
                at += pair
                if size == 0:
                    continue
                k = first_at_least(targets, low)
                while k < count and targets[k] - low < size:
                    if units[k] < 0 or size < sizes[k]:
                        units[k] = unit
                        sizes[k] = size
                    k += 1
        start = end
    return list(units), seen
