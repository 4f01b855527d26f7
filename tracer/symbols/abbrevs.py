"""DWARF abbreviation tables, laid out for skipping.

    .debug_abbrev    01  11 01  25 0e  13 0b  03 1f  00 00      code, tag, has children, (attribute, form)..., 0 0
                     02  24 00  0b 0b  3e 0b  03 0e  00 00
                     00

Most of .debug_info is of no interest to an address, so beside the attributes each abbreviation gets a skip program:
runs of fixed-size forms merged to one number of bytes, and where DW_AT_sibling lies if only fixed-size forms precede
it.
"""

from __future__ import annotations

from array import array

from heapledger.tracer.symbols.cursor import Cursor
from heapledger.tracer.symbols.damaged import DamagedError

MAX_ATTRIBUTES = 256
# No DIE nests deeper, and none of a form's fixed sizes is above 16, so 256 attributes stay below the first of these.
OP_LEB = 0x10000
OP_STRING = 0x10001
OP_BLOCK1 = 0x10002
OP_BLOCK2 = 0x10003
OP_BLOCK4 = 0x10004
OP_BLOCK = 0x10005
OP_INDIRECT = 0x10006
OP_UNKNOWN = 0x10007

FORM_IMPLICIT_CONST = 0x21
FORM_GNU_ADDR_INDEX = 0x1F01
FORM_GNU_STR_INDEX = 0x1F02
FORM_GNU_REF_ALT = 0x1F20
FORM_GNU_STRP_ALT = 0x1F21
AT_SIBLING = 0x01

# Rows of AbbrevTable.info and AbbrevTable.specs.
INFO = 8
TAG, CHILDREN, FIRST, COUNT, SKIP_FIRST, SKIP_COUNT, FIXED, SIBLING_AT = range(8)
SPEC = 3
ATTR, FORM, OP = range(3)
EMPTY_INFO = array("i", bytes(4 * 128 * INFO))
EMPTY_SPECS = array("I", bytes(4 * 1024 * SPEC))
EMPTY_SKIPS = array("I", bytes(4 * 1024))


def form_ops(address_size: int, offset_size: int, version: int) -> array[int]:
    """What skipping each form (DW_FORM_*, DWARF 5 section 7.5.6) takes: bytes, or one of the OP_ codes."""
    ops = array("I", [OP_UNKNOWN]) * 0x2D
    sizes = {
        0: (0x19, 0x21),
        1: (0x0B, 0x0C, 0x11, 0x25, 0x29),
        2: (0x05, 0x12, 0x26, 0x2A),
        3: (0x27, 0x2B),
        4: (0x06, 0x13, 0x1C, 0x28, 0x2C),
        8: (0x07, 0x14, 0x20, 0x24),
        16: (0x1E,),
        OP_LEB: (0x0D, 0x0F, 0x15, 0x1A, 0x1B, 0x22, 0x23),
        OP_BLOCK: (0x09, 0x18),
    }
    for size, forms in sizes.items():
        for form in forms:
            ops[form] = size
    for form in (0x0E, 0x17, 0x1D, 0x1F):
        ops[form] = offset_size
    ops[0x01] = address_size
    ops[0x03] = OP_BLOCK2
    ops[0x04] = OP_BLOCK4
    ops[0x08] = OP_STRING
    ops[0x0A] = OP_BLOCK1
    ops[0x10] = address_size if version <= 2 else offset_size
    ops[0x16] = OP_INDIRECT
    return ops


def form_op(ops: array[int], form: int, offset_size: int) -> int:
    """`form_ops` with the GNU forms, which lie far outside the table."""
    if form < 0x2D:
        return ops[form]
    if form in (FORM_GNU_REF_ALT, FORM_GNU_STRP_ALT):
        return offset_size
    if form in (FORM_GNU_ADDR_INDEX, FORM_GNU_STR_INDEX):
        return OP_LEB
    return OP_UNKNOWN


class AbbrevTable:
    """The abbreviations of one unit. Codes count up from 1 in every producer's output; others are refused.

    `info[code * INFO + ...]`: TAG, CHILDREN, FIRST and COUNT of its attributes, SKIP_FIRST and SKIP_COUNT of its skip
    program, FIXED (its attributes' bytes if all are of fixed size, else -1), SIBLING_AT (where DW_AT_sibling lies
    behind the code, else -1). `specs[attribute * SPEC + ...]`: ATTR, FORM, OP. `skips`: the skip programs.
    `consts`: values of DW_FORM_implicit_const by attribute.
    """

    def __init__(self, data: bytes, offset: int, ops: array[int], offset_size: int) -> None:
        self.ops = ops
        self.offset_size = offset_size
        self.codes = 0
        self.spec_count = 0
        self.skip_count = 0
        self.code_room = len(EMPTY_INFO) // INFO
        self.spec_room = len(EMPTY_SKIPS)
        self.info_array = EMPTY_INFO[:]
        self.spec_array = EMPTY_SPECS[:]
        self.skip_array = EMPTY_SKIPS[:]
        self.bind()
        self.consts: dict[int, int] = {}
        self.parse(Cursor(data, offset))

    def bind(self) -> None:
        """Point the typed views at the arrays, which growing replaces."""
        self.info = self.info_array
        self.specs = self.spec_array
        self.skips = self.skip_array

    def grow_codes(self) -> None:
        self.info_array = self.info_array + self.info_array
        self.code_room *= 2
        self.bind()

    def grow_specs(self) -> None:
        self.spec_array = self.spec_array + self.spec_array
        self.skip_array = self.skip_array + self.skip_array
        self.spec_room *= 2
        self.bind()

    def parse(self, cur: Cursor) -> None:
        while True:
            code = cur.uleb()
            if code == 0:
                return
            if code != self.codes + 1:
                raise DamagedError("abbreviation codes do not count up")
            if code + 1 >= self.code_room:
                self.grow_codes()
            if self.spec_count + MAX_ATTRIBUTES + 1 >= self.spec_room:
                self.grow_specs()
            self.codes = code
            tag = cur.uleb()
            if tag > 0xFFFF:
                raise DamagedError("tag out of range")
            self.info[code * INFO + TAG] = tag
            self.info[code * INFO + CHILDREN] = cur.u8()
            self.parse_attributes(cur, code * INFO)

    def parse_attributes(self, cur: Cursor, row: int) -> None:
        """Read one abbreviation's attributes into `specs` and `skips`, and where they are into its row of `info`."""
        first = self.spec_count
        at = first
        skip = self.skip_count
        self.info[row + SKIP_FIRST] = skip
        self.info[row + SIBLING_AT] = -1
        total = 0
        run = 0
        varies = False
        while True:
            attr = cur.uleb()
            form = cur.uleb()
            if attr == 0 and form == 0:
                break
            if attr > 0xFFFF or form > 0xFFFF or at - first >= MAX_ATTRIBUTES:
                raise DamagedError("attribute out of range")
            op = form_op(self.ops, form, self.offset_size)
            if op == OP_UNKNOWN:
                raise DamagedError("unknown form")
            if form == FORM_IMPLICIT_CONST:
                self.consts[at] = cur.sleb()
            self.specs[at * SPEC + ATTR] = attr
            self.specs[at * SPEC + FORM] = form
            self.specs[at * SPEC + OP] = op
            at += 1
            if attr == AT_SIBLING and not varies and op == 4:
                self.info[row + SIBLING_AT] = total
            if op < OP_LEB:
                total += op
                run += op
                continue
            varies = True
            if run > 0:
                self.skips[skip] = run
                skip += 1
                run = 0
            self.skips[skip] = op
            skip += 1
        if run > 0:
            self.skips[skip] = run
            skip += 1
        self.info[row + FIRST] = first
        self.info[row + COUNT] = at - first
        self.info[row + SKIP_COUNT] = skip - self.skip_count
        self.info[row + FIXED] = -1 if varies else total
        self.spec_count = at
        self.skip_count = skip
