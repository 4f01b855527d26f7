"""Line number programs (DWARF 2 to 5), run for a handful of addresses.

    length 4   version 2   (5: address size 1, segment selector size 1)   header length 4
    minimum instruction length 1   (4, 5: operations per instruction 1)   default is_stmt 1
    line base 1 (signed)   line range 1   opcode base 1   operand counts of the standard opcodes
    2-4: include folders, NUL-terminated, until an empty one; files: name, NUL, folder, time, size (LEB128), until an
         empty one. Folder 0 is the compilation folder, files count from 1.
    5:   entry formats (type, form)..., number, entries; first of the folders, then of the files, both counting from 0.

No table is built. Rows of a sequence ascend in address, so a row gives its line to the targets between it and the next
row, and a sequence without targets costs one comparison a row.
"""

from __future__ import annotations

from array import array

from heapledger.tracer.symbols.cursor import Cursor, first_at_least
from heapledger.tracer.symbols.damaged import DamagedError

FORM_BLOCK2 = 0x03
FORM_BLOCK4 = 0x04
FORM_STRING = 0x08
FORM_BLOCK = 0x09
FORM_BLOCK1 = 0x0A
FORM_UDATA = 0x0F
LNCT_PATH = 1
LNCT_DIRECTORY_INDEX = 2

Entry = tuple[int, int, int]


class LineProgram:
    """The line program in `data` (one unit's, from its length field on).

    `folders` and `files` hold (form, value, folder index): the value is a string section's offset, or where the name
    lies in `data` itself (DW_FORM_string). In DWARF 2-4 both get an entry 0 with form 0, standing for the unit's own.
    """

    def __init__(self, data: bytes, ops: array[int]) -> None:
        self.data = data
        self.ops = ops
        self.cur = Cursor(data)
        self.folders: list[Entry] = []
        self.files: list[Entry] = []
        self.read_header()

    def read_header(self) -> None:
        cur = self.cur
        length = cur.fixed(4)
        offset_size = 4
        if length == 0xFFFFFFFF:
            length = cur.fixed(8)
            offset_size = 8
        if length > cur.end - cur.pos:
            raise DamagedError("line program runs past the end")
        cur.end = cur.pos + length
        self.version = cur.fixed(2)
        if self.version < 2 or self.version > 5:
            raise DamagedError("unknown line program version")
        self.address_size = 8
        if self.version >= 5:
            self.address_size = cur.u8()
            cur.skip(1)
        header_length = cur.fixed(offset_size)
        if header_length > cur.end - cur.pos:
            raise DamagedError("line header runs past the end")
        self.program = cur.pos + header_length
        self.step = cur.u8()
        if self.version >= 4:
            cur.skip(1)
        cur.skip(1)
        base = cur.u8()
        self.line_base = base - 256 if base >= 128 else base
        self.line_range = cur.u8()
        self.opcode_base = cur.u8()
        if self.line_range == 0 or self.opcode_base == 0:
            raise DamagedError("line header")
        self.operands = self.data[cur.pos : cur.pos + self.opcode_base - 1]
        cur.skip(self.opcode_base - 1)
        if self.version >= 5:
            self.folders = self.read_entries()
            self.files = self.read_entries()
        else:
            self.read_old_names()

    def read_old_names(self) -> None:
        cur = self.cur
        self.folders.append((0, 0, 0))
        self.files.append((0, 0, 0))
        while True:
            start = cur.pos
            cur.skip_string()
            if cur.pos == start + 1:
                break
            self.folders.append((FORM_STRING, start, 0))
        while True:
            start = cur.pos
            cur.skip_string()
            if cur.pos == start + 1:
                break
            folder = cur.uleb()
            cur.skip_leb()
            cur.skip_leb()
            self.files.append((FORM_STRING, start, folder))

    def read_entries(self) -> list[Entry]:
        """A DWARF 5 folder or file list."""
        cur = self.cur
        formats = []
        number = cur.u8()
        while number > 0:
            formats.append((cur.uleb(), cur.uleb()))
            number -= 1
        count = cur.uleb()
        # Each entry takes a byte at least, so a count that cannot be there is seen before anything is read.
        if count > cur.end - cur.pos or (count > 0 and not formats):
            raise DamagedError("line header entries")
        entries = []
        while count > 0:
            count -= 1
            path_form = 0
            path = 0
            folder = 0
            for kind, form in formats:
                value = self.read_form(form)
                if kind == LNCT_PATH:
                    path_form = form
                    path = value
                elif kind == LNCT_DIRECTORY_INDEX:
                    folder = value
            entries.append((path_form, path, folder))
        return entries

    def read_form(self, form: int) -> int:
        cur = self.cur
        start = cur.pos
        if form == FORM_STRING:
            cur.skip_string()
            return start
        if form == FORM_UDATA:
            return cur.uleb()
        if form == FORM_BLOCK:
            cur.skip(cur.uleb())
            return start
        if form == FORM_BLOCK1:
            cur.skip(cur.u8())
            return start
        if form in (FORM_BLOCK2, FORM_BLOCK4):
            cur.skip(cur.fixed(2 if form == FORM_BLOCK2 else 4))
            return start
        op = self.ops[form] if form < len(self.ops) else 0
        if op == 16:
            cur.skip(16)
            return start
        if op < 1 or op > 8:
            raise DamagedError("form in a line header")
        return cur.fixed(op)

    def run(self, targets: array[int], files: array[int], lines: array[int]) -> None:
        """Fill `files[k]` and `lines[k]` of each of the ascending `targets` that a row covers and no earlier one did.

        The caller gives `lines` filled with -1; line 0 means that the compiler attributes the code to no line.
        """
        cur = self.cur
        cur.seek(self.program)
        count = len(targets)
        opcode_base = self.opcode_base
        line_base = self.line_base
        line_range = self.line_range
        step = self.step
        address = 0
        line = 1
        file = 1
        row_address = 0
        row_line = 0
        row_file = 0
        in_sequence = False
        discarded = False
        k = count
        const_advance = ((255 - opcode_base) // line_range) * step
        while cur.pos < cur.end:
            opcode = cur.u8()
            ends = False
            if opcode >= opcode_base:
                opcode -= opcode_base
                address += (opcode // line_range) * step
                line += line_base + opcode % line_range
            elif opcode == 0:
                size = cur.uleb()
                if size == 0:
                    continue
                after = cur.pos
                cur.skip(size)
                after_all = cur.pos
                cur.seek(after)
                kind = cur.u8()
                if kind == 1:
                    ends = True
                elif kind == 2:
                    if size - 1 > 8:
                        raise DamagedError("line program address")
                    address = cur.fixed(size - 1)
                cur.seek(after_all)
                if not ends:
                    continue
            elif opcode == 1:
                pass
            elif opcode == 2:
                address += cur.uleb() * step
                continue
            elif opcode == 3:
                line += cur.sleb()
                continue
            elif opcode == 4:
                file = cur.uleb()
                continue
            elif opcode == 5 or opcode == 12:
                cur.skip_leb()
                continue
            elif opcode == 8:
                address += const_advance
                continue
            elif opcode == 9:
                address += cur.fixed(2)
                continue
            elif opcode == 6 or opcode == 7 or opcode == 10 or opcode == 11:
                continue
            else:
                operands = self.operands[opcode - 1]
                while operands > 0:
                    cur.skip_leb()
                    operands -= 1
                continue
            # A row. The one before it covers [row_address, address).
            if not in_sequence:
                discarded = address == 0
                k = first_at_least(targets, address)
                in_sequence = True
            else:
                if address < row_address:
                    k = first_at_least(targets, address)
                while k < count and targets[k] < address:
                    if lines[k] < 0 and not discarded:
                        lines[k] = row_line
                        files[k] = row_file
                    k += 1
            row_address = address
            row_line = line if line > 0 else 0
            row_file = file
            if ends:
                address = 0
                line = 1
                file = 1
                in_sequence = False
