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

    By code: `tag`, `children`, `first` and `count` of its attributes, `skip_first` and `skip_count` of its skip
    program, `fixed` (its attributes' bytes if all are of fixed size, else -1), `sibling_at` (where DW_AT_sibling lies
    behind the code, else -1). By attribute: `attr`, `form`, `op`, `const`.
    """

    def __init__(self, data: bytes, offset: int, ops: array[int], offset_size: int) -> None:
        self.ops = ops
        self.offset_size = offset_size
        self.codes = 0
        self.specs = 0
        self.skips = 0
        self.code_room = 128
        self.spec_room = 1024
        zeros = array("i", bytes(4 * self.code_room))
        self.arrays_i = [zeros[:] for _ in range(8)]
        zeros_u = array("I", bytes(4 * self.spec_room))
        self.arrays_u = [zeros_u[:] for _ in range(4)]
        self.array_q = array("q", bytes(8 * self.spec_room))
        self.bind()
        self.parse(Cursor(data, offset))

    def bind(self) -> None:
        """Point the typed views at the arrays, which growing replaces."""
        self.tag = self.arrays_i[0]
        self.children = self.arrays_i[1]
        self.first = self.arrays_i[2]
        self.count = self.arrays_i[3]
        self.skip_first = self.arrays_i[4]
        self.skip_count = self.arrays_i[5]
        self.fixed = self.arrays_i[6]
        self.sibling_at = self.arrays_i[7]
        self.attr = self.arrays_u[0]
        self.form = self.arrays_u[1]
        self.op = self.arrays_u[2]
        self.skip = self.arrays_u[3]
        self.const = self.array_q

    def grow_codes(self) -> None:
        self.arrays_i = [values + values for values in self.arrays_i]
        self.code_room *= 2
        self.bind()

    def grow_specs(self) -> None:
        self.arrays_u = [values + values for values in self.arrays_u]
        self.array_q = self.array_q + self.array_q
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
            if self.specs + MAX_ATTRIBUTES + 1 >= self.spec_room:
                self.grow_specs()
            self.codes = code
            tag = cur.uleb()
            if tag > 0xFFFF:
                raise DamagedError("tag out of range")
            self.tag[code] = tag
            self.children[code] = cur.u8()
            self.parse_attributes(cur, code)

    def parse_attributes(self, cur: Cursor, code: int) -> None:
        at = self.specs
        skip = self.skips
        self.first[code] = at
        self.skip_first[code] = skip
        self.sibling_at[code] = -1
        total = 0
        run = 0
        varies = False
        while True:
            attr = cur.uleb()
            form = cur.uleb()
            if attr == 0 and form == 0:
                break
            if attr > 0xFFFF or form > 0xFFFF or at - self.first[code] >= MAX_ATTRIBUTES:
                raise DamagedError("attribute out of range")
            op = form_op(self.ops, form, self.offset_size)
            if op == OP_UNKNOWN:
                raise DamagedError("unknown form")
            self.attr[at] = attr
            self.form[at] = form
            self.op[at] = op
            self.const[at] = cur.sleb() if form == FORM_IMPLICIT_CONST else 0
            at += 1
            if attr == AT_SIBLING and not varies and op == 4:
                self.sibling_at[code] = total
            if op < OP_LEB:
                total += op
                run += op
                continue
            varies = True
            if run > 0:
                self.skip[skip] = run
                skip += 1
                run = 0
            self.skip[skip] = op
            skip += 1
        if run > 0:
            self.skip[skip] = run
            skip += 1
        self.count[code] = at - self.first[code]
        self.skip_count[code] = skip - self.skip_first[code]
        self.fixed[code] = -1 if varies else total
        self.specs = at
        self.skips = skip
