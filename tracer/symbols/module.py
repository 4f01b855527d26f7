"""One binary and all that describes it: its own sections, a separate debug file, minidebuginfo."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from heapledger.tracer.symbols.damaged import DamagedError
from heapledger.tracer.symbols.demangle import demangle
from heapledger.tracer.symbols.dwarf import Dwarf, Found, RawFrame, decoded
from heapledger.tracer.symbols.elf import PARSE_ERRORS, Elf, Section
from heapledger.tracer.symbols.frame import Frame
from heapledger.tracer.symbols.locate import by_altlink, by_build_id, by_debuglink

MINI_LIMIT_BYTES = 256 << 20
LZMA_MEMORY_BYTES = 128 << 20
# More strings than this are taken from the whole table, if it is no larger than that.
SINGLE_READS = 16
WHOLE_LIMIT_BYTES = 16 << 20


class Module:
    """Resolves addresses of one binary: takes over `image`. None: only what the debug folders hold for `build_id`."""

    def __init__(self, image: Elf | None, build_id: str | None, debug_dirs: Sequence[Path], engine: ModuleType) -> None:
        self._engine = engine
        self._image = image
        self._debug = self._find_debug(build_id, debug_dirs)
        self._debug_dirs = debug_dirs
        self._frames: tuple[dict[RawFrame, Frame], dict[RawFrame, Frame]] = ({}, {})
        self._alt: Elf | None = None
        self._dwarf: Dwarf | None = None
        self._mini: Elf | None = None
        self._mini_tried = False

    def _find_debug(self, build_id: str | None, debug_dirs: Sequence[Path]) -> Elf | None:
        """The separate debug file; None if the binary has its own debug information, or there is no such file."""
        if self._image is not None and self._image.section(".debug_info") is not None:
            return None
        found = by_build_id(build_id, debug_dirs) if build_id else None
        if found is None and self._image is not None:
            found = by_debuglink(self._image, debug_dirs)
        return found

    def resolve(self, offsets: list[int]) -> dict[int, list[Frame]]:
        """Frames of the ascending `offsets`; those of which nothing is known are left out."""
        raw = self._dwarf_frames(offsets)
        nameless = [offset for offset in offsets if offset not in raw or raw[offset].nameless]
        symbols = self._symbols(nameless) if nameless else {}
        found = {}
        for offset in offsets:
            known = raw.get(offset)
            if known is not None:
                frames = [self._frame(frame, True) for frame in known.frames[:-1]]
                name, file, line = known.frames[-1]
                if known.nameless:
                    name = fuller_name(name, symbols.get(offset, ""))
                frames.append(self._frame((name, file, line), False))
                found[offset] = frames
            elif offset in symbols:
                found[offset] = [self._frame((symbols[offset], None, None), False)]
        return found

    def _frame(self, raw: RawFrame, inlined: bool) -> Frame:
        """The frame of a name, file and line, made once: addresses share most of their outer frames."""
        known = self._frames[inlined]
        frame = known.get(raw)
        if frame is None:
            frame = known[raw] = Frame(demangle(raw[0]), raw[1], raw[2], inlined)
        return frame

    def _dwarf_frames(self, offsets: list[int]) -> dict[int, Found]:
        elf = self._debug or self._image
        if elf is None or elf.section(".debug_info") is None:
            return {}
        try:
            if self._dwarf is None:
                self._alt = by_altlink(elf, self._debug_dirs)
                alt = Dwarf(self._alt, None, self._engine) if self._alt is not None else None
                self._dwarf = Dwarf(elf, alt, self._engine)
            return self._dwarf.resolve(offsets)
        except PARSE_ERRORS:
            return {}

    def _symbols(self, offsets: list[int]) -> dict[int, str]:
        """Function symbols: `.symtab` of either file, else `.dynsym`, and minidebuginfo for what that leaves open."""
        found: dict[int, str] = {}
        for elf, table in ((self._debug, ".symtab"), (self._image, ".symtab"), (self._image, ".dynsym")):
            left = [offset for offset in offsets if offset not in found]
            if elf is not None and left:
                found.update(self._table_symbols(elf, table, left))
        left = [offset for offset in offsets if offset not in found]
        mini = self._minidebuginfo() if left else None
        if mini is not None:
            found.update(self._table_symbols(mini, ".symtab", left))
        return found

    def _table_symbols(self, elf: Elf, table: str, offsets: list[int]) -> dict[int, str]:
        section = elf.section(table)
        strings = elf.linked(section) if section is not None else None
        offsets = elf.code_in(offsets)
        if section is None or strings is None or not offsets:
            return {}
        try:
            names, _ = self._engine.covering_symbols(section.data(), section.entry_size, elf.wide, array("Q", offsets))
            distinct = set(names)
            if len(distinct) > SINGLE_READS and strings.size <= WHOLE_LIMIT_BYTES:
                strings.data()
            texts = {n: decoded(strings.string(n)) for n in distinct if n >= 0}
            return {o: texts[n] for o, n in zip(offsets, names, strict=True) if n >= 0}
        except PARSE_ERRORS:
            return {}

    def _minidebuginfo(self) -> Elf | None:
        """The little ELF file in `.gnu_debugdata`: xz, a symbol table of what `.dynsym` does not name."""
        if not self._mini_tried and self._image is not None:
            self._mini_tried = True
            section = self._image.section(".gnu_debugdata")
            if section is not None:
                self._mini = unpack_minidebuginfo(section, self._image.path)
        return self._mini

    def close(self) -> None:
        for elf in (self._image, self._debug, self._alt, self._mini):
            if elf is not None:
                elf.close()


def unpack_minidebuginfo(section: Section, path: Path) -> Elf | None:
    """Decompressed into an unnamed temporary file, never more than MINI_LIMIT_BYTES of it."""
    import lzma  # few files have one: only those pay for the imports
    import tempfile

    try:
        plain = lzma.LZMADecompressor(lzma.FORMAT_XZ, LZMA_MEMORY_BYTES).decompress(section.data(), MINI_LIMIT_BYTES)
        stream = tempfile.TemporaryFile()  # noqa: SIM115  (the Elf closes it)
        stream.write(plain)
        stream.flush()
        return Elf(path, stream)
    except (lzma.LZMAError, EOFError, DamagedError, OSError):
        return None


def fuller_name(name: str, symbol: str) -> str:
    """The symbol's name if DWARF has none, or if it is the mangled form of what DWARF has only in short.

    The mangled name's suffix (`.cold`, `.isra.0`: the compiler cut the function up) is left out, as DWARF does.
    """
    if not name:
        return symbol
    return symbol.partition(".")[0] if symbol.startswith(("_Z", "_R")) else name
