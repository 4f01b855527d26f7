"""Which functions, inlined ones included, contain each address of a unit.

The DIEs are walked once, front to back. Subprograms that hold none of the addresses are stepped over whole by
DW_AT_sibling (GCC), or skipped DIE by DIE where there is none (LLVM). Within a subprogram that holds some, every
inlined subroutine is looked at.
"""

from __future__ import annotations

from array import array

from heapledger.tracer.symbols.abbrevs import (
    ATTR,
    CHILDREN,
    COUNT,
    FIRST,
    FORM,
    FORM_IMPLICIT_CONST,
    INFO,
    OP,
    OP_INDIRECT,
    SIBLING_AT,
    SPEC,
    TAG,
)  # fmt: skip
from heapledger.tracer.symbols.cursor import first_at_least
from heapledger.tracer.symbols.damaged import DamagedError
from heapledger.tracer.symbols.ranges import RangeReader
from heapledger.tracer.symbols.units import Unit, is_address_form

TAG_CLASS = 0x02
TAG_LEXICAL_BLOCK = 0x0B
TAG_COMPILE_UNIT = 0x11
TAG_STRUCTURE = 0x13
TAG_UNION = 0x17
TAG_INLINED = 0x1D
TAG_MODULE = 0x1E
TAG_CATCH = 0x25
TAG_SUBPROGRAM = 0x2E
TAG_TRY = 0x32
TAG_NAMESPACE = 0x39
TAG_PARTIAL_UNIT = 0x3C

ATTR_SIBLING = 0x01
ATTR_LOW_PC = 0x11
ATTR_HIGH_PC = 0x12
ATTR_RANGES = 0x55
ATTR_CALL_FILE = 0x58
ATTR_CALL_LINE = 0x59


class FunctionWalker:
    """Finds, for each of the ascending `targets`, the innermost function that contains it.

    `best[k]` is the record of target k, -1 if none. A record: `dies` (offset in the unit), `parents` (record of the
    function it was inlined into, -1 for a function of its own), `call_files` and `call_lines` (where it was inlined).
    """

    def __init__(self, unit: Unit, ranges: RangeReader, targets: array[int]) -> None:
        self.unit = unit
        self.ranges = ranges
        self.targets = targets
        self.number = len(targets)
        self.best = array("q", [-1]) * self.number
        self.best_size = array("Q", [0]) * self.number
        self.dies: list[int] = []
        self.parents: list[int] = []
        self.call_files: list[int] = []
        self.call_lines: list[int] = []

    def record(self, k: int) -> int:
        """The record of the innermost function that holds target k, -1 if none does."""
        return self.best[k]

    def unclaimed(self) -> int:
        """How many targets no function has."""
        left = 0
        for k in range(self.number):
            if self.best[k] < 0:
                left += 1
        return left

    def walk(self, everywhere: bool) -> None:
        """Walk the unit. `everywhere`: also inside functions and types that do not hold an address themselves, where
        nested functions (GNU C, member functions of local classes) may be."""
        unit = self.unit
        cur = unit.cur
        table = unit.table
        cur.seek(unit.root)
        depth = 0
        skip_depth = -1
        owner = -1
        owner_depth = -1
        owners: list[tuple[int, int]] = []
        while cur.pos < cur.end:
            start = cur.pos
            code = unit.checked_code()
            if code == 0:
                depth -= 1
                if depth <= 0:
                    return
                if depth == skip_depth:
                    skip_depth = -1
                if depth == owner_depth:
                    owner, owner_depth = owners.pop()
                continue
            children = table.info[code * INFO + CHILDREN]
            if skip_depth >= 0:
                unit.skip_die(code)
                if children:
                    depth += 1
                continue
            tag = table.info[code * INFO + TAG]
            if tag in (TAG_SUBPROGRAM, TAG_INLINED):
                self.read_places(code)
                record = self.claim(start, owner if tag == TAG_INLINED else -1)
                if not children:
                    continue
                if record >= 0:
                    owners.append((owner, owner_depth))
                    owner = record
                    owner_depth = depth
                elif not everywhere:
                    if self.sibling > cur.pos:
                        cur.seek(self.sibling)
                        continue
                    skip_depth = depth
                depth += 1
            elif tag in (
                TAG_LEXICAL_BLOCK,
                TAG_NAMESPACE,
                TAG_COMPILE_UNIT,
                TAG_MODULE,
                TAG_TRY,
                TAG_CATCH,
                TAG_PARTIAL_UNIT,
            ) or (everywhere and (tag in (TAG_STRUCTURE, TAG_CLASS, TAG_UNION))):
                unit.skip_die(code)
                if children:
                    depth += 1
            elif children:
                at = table.info[code * INFO + SIBLING_AT]
                after = cur.pos
                unit.skip_die(code)
                if at >= 0:
                    past = cur.pos
                    cur.seek(after + at)
                    sibling = cur.fixed(4)
                    cur.seek(past)
                    if sibling > past:
                        cur.seek(sibling)
                        continue
                skip_depth = depth
                depth += 1
            else:
                unit.skip_die(code)
            if depth == 0:
                return

    def read_places(self, code: int) -> None:
        """Read what the walk needs of a subprogram or inlined subroutine; the rest of its attributes is skipped."""
        unit = self.unit
        table = unit.table
        self.low = 0
        self.high = 0
        self.low_form = 0
        self.high_form = 0
        self.ranges_form = 0
        self.sibling = 0
        self.call_file = 0
        self.call_line = 0
        at = table.info[code * INFO + FIRST]
        end = at + table.info[code * INFO + COUNT]
        while at < end:
            attr = table.specs[at * SPEC + ATTR]
            op = table.specs[at * SPEC + OP]
            if op == OP_INDIRECT or attr not in (
                ATTR_SIBLING,
                ATTR_LOW_PC,
                ATTR_HIGH_PC,
                ATTR_RANGES,
                ATTR_CALL_FILE,
                ATTR_CALL_LINE,
            ):
                unit.skip_op(op)
                at += 1
                continue
            form = table.specs[at * SPEC + FORM]
            value = table.consts.get(at, 0) if form == FORM_IMPLICIT_CONST else unit.value(form, op)
            at += 1
            if attr == ATTR_LOW_PC:
                self.low = value
                self.low_form = form
            elif attr == ATTR_HIGH_PC:
                self.high = value
                self.high_form = form
            elif attr == ATTR_RANGES:
                self.range_list = value
                self.ranges_form = form
            elif attr == ATTR_SIBLING:
                self.sibling = value
            elif attr == ATTR_CALL_FILE:
                self.call_file = value
            else:
                self.call_line = value

    def claim(self, die: int, parent: int) -> int:
        """Give the DIE just read the targets in its ranges. Its record, or -1 if it holds none."""
        record = len(self.dies)
        claimed = False
        if self.ranges_form:
            try:
                pairs = self.ranges.read(self.unit, self.ranges_form, self.range_list)
            except DamagedError:
                return -1
            at = 0
            while at + 1 < len(pairs):
                low = pairs[at]
                high = pairs[at + 1]
                at += 2
                if self.claim_range(low, high, record, parent):
                    claimed = True
        elif self.low_form and self.high_form:
            low = self.unit.to_address(self.low_form, self.low)
            high = self.high
            high = self.unit.to_address(self.high_form, high) if is_address_form(self.high_form) else low + high
            claimed = self.claim_range(low, high, record, parent)
        if not claimed:
            return -1
        self.dies.append(die)
        self.parents.append(parent)
        self.call_files.append(self.call_file)
        self.call_lines.append(self.call_line)
        return record

    def claim_range(self, low: int, high: int, record: int, parent: int) -> bool:
        """Whether any target lies in [low, high). Each takes the record if it comes from the function it is inlined
        into, or from none, or from a wider range. Address 0 is where linkers leave functions they discarded."""
        if low == 0 or high <= low:
            return False
        size = high - low
        k = first_at_least(self.targets, low)
        claimed = False
        while k < self.number and self.targets[k] < high:
            claimed = True
            best = self.best[k]
            if best < 0 or best in (parent, record) or size <= self.best_size[k]:
                self.best[k] = record
                self.best_size[k] = size
            k += 1
        return claimed
