"""DWARF of one file for a set of addresses: finds the units they fall in, and reads those and no others.

Each part that turns out damaged is given up alone: a unit without a usable line program still has functions.
"""

from __future__ import annotations

import bisect
import contextlib
from array import array
from types import ModuleType
from typing import Any

from heapledger.tracer.symbols.damaged import DamagedError
from heapledger.tracer.symbols.elf import PARSE_ERRORS, Elf, Section

AT_NAME = 0x03
AT_STMT_LIST = 0x10
AT_LANGUAGE = 0x13
AT_LOW_PC = 0x11
AT_HIGH_PC = 0x12
AT_COMP_DIR = 0x1B
AT_ABSTRACT_ORIGIN = 0x31
AT_SPECIFICATION = 0x47
AT_RANGES = 0x55
AT_LINKAGE_NAME = 0x6E
AT_STR_OFFSETS_BASE = 0x72
AT_ADDR_BASE = 0x73
AT_RNGLISTS_BASE = 0x74
AT_MIPS_LINKAGE_NAME = 0x2007
AT_GNU_RANGES_BASE = 0x2132
AT_GNU_ADDR_BASE = 0x2133

FORM_ADDR = 0x01
FORM_STRING = 0x08
FORM_STRP = 0x0E
FORM_REF_ADDR = 0x10
FORM_STRX = 0x1A
FORM_LINE_STRP = 0x1F
UNIT_LOCAL_REFS = frozenset((0x11, 0x12, 0x13, 0x14, 0x15))
ALT_REFS = frozenset((0x1C, 0x24, 0x1F20))
ALT_STRINGS = frozenset((0x1D, 0x1F21))
INDEXED_STRINGS = frozenset((0x1A, 0x25, 0x26, 0x27, 0x28, 0x1F02))
ADDRESS_FORMS = frozenset((0x01, 0x1B, 0x29, 0x2A, 0x2B, 0x2C, 0x1F01))
# DW_LANG_* of C and assembly: C89, C, C99, Mips_Assembler, C11, C17.
UNMANGLED_LANGUAGES = frozenset((0x01, 0x02, 0x0C, 0x8001, 0x1D, 0x2C))

# Front of a linkage name: C++, Rust v0.
MANGLED = ("_Z", "_R")
MAX_REFERENCES = 32
HEADER_BYTES = 12
ROOT_BYTES = 1024


# Mangled name where there is one (`""` where the function is not known), file, line.
RawFrame = tuple[str, str | None, int | None]


class Found:
    """What DWARF knows of one address: `frames`, innermost first, all but the last inlined.

    `nameless`: the last frame is a function without a linkage name in a language that mangles (GCC leaves it out for
    functions that no other unit can see), so that the symbol table may have a fuller name than `frames` has.
    """

    __slots__ = ("frames", "nameless")

    def __init__(self, frames: list[RawFrame], nameless: bool) -> None:
        self.frames = frames
        self.nameless = nameless


class Dwarf:
    """The debug information of `elf`, with `alt` the file that dwz moved shared parts to."""

    def __init__(self, elf: Elf, alt: Dwarf | None, engine: ModuleType) -> None:
        self._engine: Any = engine
        self._elf = elf
        self._alt = alt
        self._info = elf.section(".debug_info")
        self._units: dict[int, Any] = {}
        self._starts: list[int] | None = None
        self._abbrevs: dict[tuple[int, int, int, int], Any] = {}
        self._ops: dict[tuple[int, int, int], array[int]] = {}
        self._names: dict[tuple[int, int], str] = {}
        self._strings: dict[tuple[str, int], str] = {}
        self._ranges = engine.RangeReader(self._whole(".debug_ranges"), self._whole(".debug_rnglists"))
        # Bytes of units and line programs that may yet be read. Honest files come nowhere near it.
        self._budget = 4 * self._length(".debug_info") + 4 * self._length(".debug_line") + (1 << 20)

    def _whole(self, name: str) -> bytes:
        section = self._elf.section(name)
        return section.data() if section is not None else b""

    def _length(self, name: str) -> int:
        section = self._elf.section(name)
        return section.length() if section is not None else 0

    def resolve(self, offsets: list[int]) -> dict[int, Found]:
        """What is known of the ascending `offsets`; those in no unit are left out."""
        if self._info is None:
            return {}
        found: dict[int, Found] = {}
        for unit_offset, mine in self._units_of(offsets).items():
            try:
                found.update(self._resolve_in(unit_offset, mine))
            except PARSE_ERRORS:
                continue
        return found

    # Which units

    def _units_of(self, offsets: list[int]) -> dict[int, list[int]]:
        """{offset of a unit: the ascending addresses in it}: by .debug_aranges, then by the ranges of the unlisted."""
        targets = array("Q", offsets)
        units, seen = self._engine.lookup_aranges(self._whole(".debug_aranges"), targets)
        grouped: dict[int, list[int]] = {}
        left = []
        for offset, unit in zip(offsets, units, strict=True):
            if unit < 0:
                left.append(offset)
            else:
                grouped.setdefault(unit, []).append(offset)
        if left:
            listed = set(seen)
            for start in self._unit_starts():
                if start not in listed and left:
                    mine = self._claimed_by(start, left)
                    if mine:
                        grouped[start] = mine
                        taken = set(mine)
                        left = [offset for offset in left if offset not in taken]
        return grouped

    def _unit_starts(self) -> list[int]:
        """Where each unit begins: a hop from header to header."""
        if self._starts is None:
            self._starts = []
            at = 0
            size = self._length(".debug_info")
            while self._info is not None and at + HEADER_BYTES <= size:
                try:
                    length, _ = self._engine.unit_length(self._info.read(at, HEADER_BYTES))
                except DamagedError:
                    break
                self._starts.append(at)
                at += length
        return self._starts

    def _claimed_by(self, start: int, offsets: list[int]) -> list[int]:
        """Those of `offsets` that the ranges of the unit's root DIE hold. Reads no more than its first bytes."""
        try:
            unit, root = self._open(start, ROOT_BYTES)
        except PARSE_ERRORS:
            try:
                unit, root = self._open(start)
            except PARSE_ERRORS:
                return []
        try:
            pairs = self._root_ranges(unit, root)
        except PARSE_ERRORS:
            return []
        mine: set[int] = set()
        for low, high in zip(pairs[::2], pairs[1::2], strict=True):
            at = bisect.bisect_left(offsets, low)
            while at < len(offsets) and offsets[at] < high and offsets[at] not in mine:
                mine.add(offsets[at])
                at += 1
        return sorted(mine)

    def _root_ranges(self, unit: Any, root: dict[int, tuple[int, int]]) -> list[int]:
        if AT_RANGES in root:
            return list(self._ranges.read(unit, *root[AT_RANGES]))
        if AT_LOW_PC in root and AT_HIGH_PC in root and unit.low_pc:
            form, value = root[AT_HIGH_PC]
            high = unit.to_address(form, value) if form in ADDRESS_FORMS else unit.low_pc + value
            return [unit.low_pc, high]
        return []

    # One unit

    def _open(self, start: int, limit: int | None = None) -> tuple[Any, dict[int, tuple[int, int]]]:
        """The unit at `start` (its first `limit` bytes at most), and its root DIE's attributes."""
        assert self._info is not None
        length, _ = self._engine.unit_length(self._info.read(start, HEADER_BYTES))
        count = length if limit is None else min(length, limit)
        if limit is None:
            self._spend(count)
        unit = self._engine.Unit(self._info.read(start, count), start)
        unit.use_abbrevs(self._abbrev_table(unit))
        root = unit.read_die(unit.root)
        self._set_bases(unit, root)
        return unit, root

    def _spend(self, count: int) -> None:
        self._budget -= count
        if self._budget < 0:
            raise DamagedError("units overlap")

    def _set_bases(self, unit: Any, root: dict[int, tuple[int, int]]) -> None:
        """What the indexed forms of a unit count from. The defaults are the first entry behind a section's header."""
        head = 8 if unit.offset_size == 4 else 16
        unit.str_offsets_base = root.get(AT_STR_OFFSETS_BASE, (0, head))[1]
        unit.addr_base = root.get(AT_ADDR_BASE, root.get(AT_GNU_ADDR_BASE, (0, head)))[1]
        unit.rnglists_base = root.get(AT_RNGLISTS_BASE, (0, head + 4))[1]
        if any(form in ADDRESS_FORMS and form != FORM_ADDR for form, _ in root.values()) or unit.version >= 5:
            unit.addresses = self._whole(".debug_addr")
        if AT_LOW_PC in root:
            unit.low_pc = unit.to_address(*root[AT_LOW_PC])

    def _abbrev_table(self, unit: Any) -> Any:
        key = (unit.abbrev_offset, unit.address_size, unit.offset_size, unit.version)
        table = self._abbrevs.get(key)
        if table is None:
            ops = self._form_ops(unit.address_size, unit.offset_size, unit.version)
            table = self._engine.AbbrevTable(self._whole(".debug_abbrev"), unit.abbrev_offset, ops, unit.offset_size)
            self._abbrevs[key] = table
        return table

    def _form_ops(self, address_size: int, offset_size: int, version: int) -> array[int]:
        key = (address_size, offset_size, version)
        if key not in self._ops:
            self._ops[key] = self._engine.form_ops(*key)
        return self._ops[key]

    def _unit(self, start: int) -> tuple[Any, dict[int, tuple[int, int]]]:
        """A whole unit, kept: names are looked up in it again."""
        if start not in self._units:
            self._units[start] = self._open(start)
        held: tuple[Any, dict[int, tuple[int, int]]] = self._units[start]
        return held

    def _resolve_in(self, start: int, offsets: list[int]) -> dict[int, Found]:
        unit, root = self._unit(start)
        targets = array("Q", offsets)
        functions = self._engine.FunctionWalker(unit, self._ranges, targets)
        try:
            functions.walk(False)
            if functions.unclaimed():
                functions.walk(True)
        except PARSE_ERRORS:
            pass  # what was found before the damage stands
        names = _LineNames(self, unit, root)
        files, lines = names.rows(targets)
        mangles = root.get(AT_LANGUAGE, (0, 0))[1] not in UNMANGLED_LANGUAGES
        outer: dict[int, list[RawFrame]] = {}
        found = {}
        for k, offset in enumerate(offsets):
            line = lines[k]
            path = names.path(files[k]) if line >= 0 else None
            record = functions.record(k)
            if record >= 0:
                inner = (self.die_name(unit, functions.dies[record]), path, line if line > 0 else None)
                frames = [inner, *self._callers(unit, functions, record, names, outer)]
                last = frames[-1][0]
                found[offset] = Found(frames, not last or (mangles and not last.startswith(MANGLED)))
            elif line >= 0:
                found[offset] = Found([("", path, line or None)], True)
        return found

    def _callers(
        self, unit: Any, functions: Any, record: int, names: _LineNames, known: dict[int, list[RawFrame]]
    ) -> list[RawFrame]:
        """The frames that a function is inlined into, from the inside out: each at the place of the call it contains.
        They are the same for all addresses of the function, and kept in `known`."""
        frames = known.get(record)
        if frames is None:
            frames = known[record] = []
            at = record
            while functions.parents[at] >= 0:
                call_file = functions.call_files[at]
                path = names.path(call_file) if call_file else None
                line = functions.call_lines[at] or None
                at = functions.parents[at]
                frames.append((self.die_name(unit, functions.dies[at]), path, line))
        return frames

    # Names and strings

    def die_name(self, unit: Any, die: int, depth: int = 0) -> str:
        """The linkage name of a function if it has one, else its plain name; followed to its declaration."""
        key = (unit.offset, die)
        name = self._names.get(key)
        if name is None:
            try:
                name = self._read_name(unit, die, depth)
            except PARSE_ERRORS:
                name = ""
            self._names[key] = name
        return name

    def _read_name(self, unit: Any, at: int, depth: int) -> str:
        die = unit.read_die(at)
        for attribute in (AT_LINKAGE_NAME, AT_MIPS_LINKAGE_NAME):
            if attribute in die:
                return self.string(unit, *die[attribute])
        if depth < MAX_REFERENCES:
            for attribute in (AT_ABSTRACT_ORIGIN, AT_SPECIFICATION):
                if attribute in die:
                    form, value = die[attribute]
                    name = self._referred_name(unit, form, value, depth + 1)
                    if name:
                        return name
        return self.string(unit, *die[AT_NAME]) if AT_NAME in die else ""

    def _referred_name(self, unit: Any, form: int, value: int, depth: int) -> str:
        if form in UNIT_LOCAL_REFS:
            return self.die_name(unit, value, depth)
        if form == FORM_REF_ADDR:
            return self._name_at(value, depth)
        if form in ALT_REFS and self._alt is not None:
            return self._alt._name_at(value, depth)
        return ""

    def _name_at(self, offset: int, depth: int) -> str:
        """The name of the DIE at an offset of .debug_info."""
        starts = self._unit_starts()
        k = self._engine.first_at_least(array("Q", starts), offset + 1) - 1
        if k < 0:
            return ""
        unit, _ = self._unit(starts[k])
        return self.die_name(unit, offset - starts[k], depth)

    def string(self, unit: Any, form: int, value: int) -> str:
        """The text of a string attribute of a unit."""
        if form == FORM_STRING:
            return decoded(unit.data[value : unit.data.index(0, value)])
        if form in INDEXED_STRINGS:
            size = unit.offset_size
            section = self._elf.section(".debug_str_offsets")
            entry = section.read(unit.str_offsets_base + value * size, size) if section is not None else b""
            return self.section_string(".debug_str", int.from_bytes(entry, "little"))
        if form == FORM_STRP:
            return self.section_string(".debug_str", value)
        if form == FORM_LINE_STRP:
            return self.section_string(".debug_line_str", value)
        if form in ALT_STRINGS and self._alt is not None:
            return self._alt.section_string(".debug_str", value)
        return ""

    def section_string(self, name: str, offset: int) -> str:
        key = (name, offset)
        text = self._strings.get(key)
        if text is None:
            section = self._elf.section(name)
            text = decoded(section.string(offset)) if section is not None else ""
            self._strings[key] = text
        return text

    def line_program(self, unit: Any, offset: int) -> Any:
        """The line program at an offset of .debug_line."""
        section: Section | None = self._elf.section(".debug_line")
        if section is None:
            raise DamagedError("no .debug_line")
        length, offset_size = self._engine.unit_length(section.read(offset, HEADER_BYTES))
        data = section.read(offset, length)
        self._spend(len(data))
        return self._engine.LineProgram(data, self._form_ops(unit.address_size, offset_size, 5))


class _LineNames:
    """The line program of one unit, and its file names as they are asked for."""

    def __init__(self, dwarf: Dwarf, unit: Any, root: dict[int, tuple[int, int]]) -> None:
        self._dwarf = dwarf
        self._unit = unit
        self._root = root
        self._paths: dict[int, str | None] = {}
        self._program: Any = None
        try:
            if AT_STMT_LIST in root:
                self._program = dwarf.line_program(unit, root[AT_STMT_LIST][1])
        except PARSE_ERRORS:
            pass

    def rows(self, targets: array[int]) -> tuple[array[int], array[int]]:
        """File number and line of each target; line -1 where no row covers it, 0 where the row has no line."""
        files = array("q", [0]) * len(targets)
        lines = array("q", [-1]) * len(targets)
        if self._program is not None:
            with contextlib.suppress(*PARSE_ERRORS):  # the rows before the damage stand
                self._program.run(targets, files, lines)
        return files, lines

    def path(self, number: int) -> str | None:
        """File `number` with its folder and the compilation folder in front, unless a later part is absolute."""
        if number not in self._paths:
            try:
                self._paths[number] = self._join(number)
            except PARSE_ERRORS:
                self._paths[number] = None
        return self._paths[number]

    def _join(self, number: int) -> str | None:
        program = self._program
        if program is None or not 0 <= number < len(program.files) or (number == 0 and program.version < 5):
            return None
        form, value, folder_number = program.files[number]
        name = self._text(form, value)
        if name.startswith("/"):
            return name
        folder = ""
        if 0 <= folder_number < len(program.folders) and (folder_number or program.version >= 5):
            form, value, _ = program.folders[folder_number]
            folder = self._text(form, value)
        if not folder.startswith("/"):
            top = self._comp_dir()
            folder = f"{top}/{folder}" if top and folder and folder != top else folder or top
        return f"{folder}/{name}" if folder else name

    def _comp_dir(self) -> str:
        return self._dwarf.string(self._unit, *self._root[AT_COMP_DIR]) if AT_COMP_DIR in self._root else ""

    def _text(self, form: int, value: int) -> str:
        if form == FORM_STRING:
            data = self._program.data
            return decoded(data[value : data.index(0, value)])
        return self._dwarf.string(self._unit, form, value)


def decoded(raw: bytes) -> str:
    """Names are bytes to DWARF; what is not UTF-8 in one is shown escaped, so that it can be printed anywhere."""
    return raw.decode("utf-8", "backslashreplace")
