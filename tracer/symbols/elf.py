"""ELF files as the symbolizer needs them: sections by name, notes, load bias.

    Elf64_Ehdr, behind the 16 bytes of e_ident     Elf64_Shdr, 64 bytes                 Elf64_Phdr, 56 bytes
    16 u16 e_type     48 u32 e_flags               0  u32 sh_name   32 u64 sh_size      0  u32 p_type    32 u64 p_filesz
    18 u16 e_machine  52 u16 e_ehsize              4  u32 sh_type   40 u32 sh_link      4  u32 p_flags   40 u64 p_memsz
    20 u32 e_version  54 u16 e_phentsize           8  u64 sh_flags  44 u32 sh_info      8  u64 p_offset  48 u64 p_align
    24 u64 e_entry    56 u16 e_phnum               16 u64 sh_addr   48 u64 sh_addralign 16 u64 p_vaddr
    32 u64 e_phoff    58 u16 e_shentsize           24 u64 sh_offset 56 u64 sh_entsize   24 u64 p_paddr
    40 u64 e_shoff    60 u16 e_shnum, e_shstrndx

In 32-bit files u64 is u32, and p_flags stands before p_align. Of numbers that do not fit, section 0 has the real ones
(sh_size: e_shnum, sh_link: e_shstrndx, sh_info: e_phnum). The headers are read here and not by pyelftools, as that
takes 3 ms a file, and a run resolves a dozen of them when its program has ended; it takes 0.1 ms so.

Whatever the file says about sizes is checked against the file's own size before memory is taken. A file that lies is a
DamagedError here, and no more than an unresolved frame outside this package.
"""

from __future__ import annotations

import bisect
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from heapledger.tracer.symbols.cursor import Cursor
from heapledger.tracer.symbols.damaged import DamagedError

MAX_SECTIONS = 65_536
MAX_INFLATED_BYTES = 1 << 30
# Deflate cannot expand by more than 1032:1 (RFC 1951: 258 bytes out of a 2-bit code). zstd can by far more (a 4-byte
# block stands for up to 128 KiB), but no compiler's output does: the same bound serves.
MAX_EXPANSION = 1040
SHF_EXECINSTR = 0x4
SHF_COMPRESSED = 0x800
SHT_NOTE, SHT_NOBITS = 7, 8
SHN_XINDEX = 0xFFFF
PN_XNUM = 0xFFFF
PF_X = 1
PT_LOAD, PT_NOTE = 1, 4
ELFCOMPRESS_ZLIB = 1
ELFCOMPRESS_ZSTD = 2
NT_GNU_BUILD_ID = 3
NOTE_LIMIT_BYTES = 1 << 16
PAGE_BYTES = 4096
# What is raised on files that are not what they claim.
PARSE_ERRORS = (DamagedError, OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
                RecursionError, AssertionError, struct.error)  # fmt: skip
HEADERS = {True: struct.Struct("<HHIQQQIHHHHHH"), False: struct.Struct("<HHIIIIIHHHHHH")}
SECTIONS = {True: struct.Struct("<IIQQQQIIQQ"), False: struct.Struct("<IIIIIIIIII")}
SEGMENTS = {True: struct.Struct("<IIQQQQQQ"), False: struct.Struct("<IIIIIIII")}


class SectionHeader(NamedTuple):
    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


class Section:
    """One section's bytes. Small pieces of an uncompressed one are read from the file as they are asked for."""

    def __init__(self, fd: int, header: SectionHeader, file_size: int, legacy: bool, wide: bool) -> None:
        self._fd = fd
        self._offset = header.offset
        self.type = header.type
        self.address = header.address
        self.link = header.link
        self.entry_size = header.entry_size
        self.flags = header.flags
        self._wide = wide
        self._legacy = legacy
        self._compressed = legacy or bool(self.flags & SHF_COMPRESSED)
        held = max(0, file_size - self._offset)
        self.size = 0 if self.type == SHT_NOBITS else min(header.size, held)
        self._bytes: bytes | None = None

    def data(self) -> bytes:
        """All of it, decompressed; kept from then on."""
        if self._bytes is None:
            raw = os.pread(self._fd, self.size, self._offset) if self.size else b""
            self._bytes = self._inflate(raw) if self._compressed and raw else raw
            self.size = len(self._bytes)
        return self._bytes

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`: fewer at the section's end."""
        if self._bytes is None and self._compressed:
            self.data()
        if offset < 0 or offset >= self.size:
            return b""
        if self._bytes is not None:
            return self._bytes[offset : offset + count]
        return os.pread(self._fd, min(count, self.size - offset), self._offset + offset)

    def length(self) -> int:
        """Size in bytes once decompressed."""
        if self._compressed:
            self.data()
        return self.size

    def string(self, offset: int) -> bytes:
        """The NUL-terminated string at `offset`, empty where there is none."""
        count = 128
        while True:
            piece = self.read(offset, count)
            end = piece.find(0)
            if end >= 0:
                return piece[:end]
            if len(piece) < count:
                return b""
            count *= 8

    def _inflate(self, raw: bytes) -> bytes:
        """Undo SHF_COMPRESSED (Elf_Chdr in front) or the older `.zdebug_*` (`ZLIB` and a big-endian size)."""
        if self._legacy:
            if raw[:4] != b"ZLIB":
                raise DamagedError("not a compressed section")
            return inflate_zlib(raw[12:], int.from_bytes(raw[4:12], "big"))
        cur = Cursor(raw)
        kind = cur.fixed(4)
        if self._wide:
            cur.skip(4)
        declared = cur.fixed(8 if self._wide else 4)
        cur.skip(8 if self._wide else 4)
        if kind == ELFCOMPRESS_ZLIB:
            return inflate_zlib(raw[cur.pos :], declared)
        if kind == ELFCOMPRESS_ZSTD:
            return inflate_zstd(raw[cur.pos :], declared)
        raise DamagedError("unknown compression")


def check_declared(declared: int, packed: int) -> None:
    """Refuse a declared size that the packed bytes cannot hold, before anything is allocated for it."""
    if declared > MAX_INFLATED_BYTES or declared > packed * MAX_EXPANSION:
        raise DamagedError("compressed section declares an impossible size")


def inflate_zlib(packed: bytes, declared: int) -> bytes:
    check_declared(declared, len(packed))
    try:
        plain = zlib.decompressobj().decompress(packed, declared) if declared else b""
    except zlib.error as error:
        raise DamagedError(str(error)) from error
    if len(plain) != declared:
        raise DamagedError("compressed section is not of its declared size")
    return plain


def inflate_zstd(packed: bytes, declared: int) -> bytes:
    import zstandard  # only the files that need it pay for the import

    check_declared(declared, len(packed))
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed) as reader:
            plain = reader.read(declared)
    except zstandard.ZstdError as error:
        raise DamagedError(str(error)) from error
    if len(plain) != declared:
        raise DamagedError("compressed section is not of its declared size")
    return plain


class Segment(NamedTuple):
    """A program header: p_type, p_offset, p_vaddr, p_filesz, and whether PF_X is set."""

    kind: int
    offset: int
    address: int
    size: int
    executable: bool


class Elf:
    """An open ELF file. Little-endian only; `close` it, or use it as a context."""

    def __init__(self, path: Path, stream: BinaryIO | None = None) -> None:
        """Takes over `stream` (a real file) or opens `path`.

        Raises OSError where it cannot be read, DamagedError where it is not a usable ELF file.
        """
        self.path = path
        if stream is None and not path.is_file():  # opening a pipe would wait for its writer
            raise DamagedError(f"{path}: not a regular file")
        self._stream: BinaryIO = path.open("rb") if stream is None else stream
        try:
            self._load()
        except PARSE_ERRORS as error:
            self._stream.close()
            raise DamagedError(f"{path}: {error}") from error

    def _load(self) -> None:
        fd = self._stream.fileno()
        self.file_size = os.fstat(fd).st_size
        ident = os.pread(fd, 16, 0)
        if ident[:4] != b"\x7fELF" or ident[4] not in (1, 2):
            raise DamagedError("not an ELF file")
        if ident[5] != 1:
            raise DamagedError("not little-endian")
        self.wide = ident[4] == 2
        header = HEADERS[self.wide]
        fields = header.unpack(os.pread(fd, header.size, 16))
        self._segments_at, sections_at = fields[4:6]
        self._segment_bytes, self._segment_count, section_bytes, count, names_index = fields[8:]
        headers = []
        if sections_at:
            first = SectionHeader(*self._table(SECTIONS[self.wide], sections_at, section_bytes, 1)[0])
            count = count or first.size
            names_index = first.link if names_index == SHN_XINDEX else names_index
            if self._segment_count == PN_XNUM:
                self._segment_count = first.info
            headers = [SectionHeader(*h) for h in self._table(SECTIONS[self.wide], sections_at, section_bytes, count)]
        self._take(headers, names_index)

    def _table(self, entry: struct.Struct, at: int, stride: int, count: int) -> list[tuple[int, ...]]:
        """The rows of a table of headers, all of which have to be there."""
        if count > MAX_SECTIONS or (count and stride < entry.size) or at + count * stride > self.file_size:
            raise DamagedError("a table of headers is not in the file")
        held = os.pread(self._stream.fileno(), count * stride, at)
        return [entry.unpack_from(held, number * stride) for number in range(count)]

    def _take(self, headers: list[SectionHeader], names_index: int) -> None:
        """Makes the sections, by number and by name (the first of each)."""
        self.sections: dict[str, Section] = {}
        self.ordered: list[Section] = []
        self._code: list[tuple[int, int]] = []
        fd = self._stream.fileno()
        names = b""
        if names_index < len(headers):
            names = Section(fd, headers[names_index], self.file_size, False, self.wide).data()
        for header in headers:
            name = names[header.name : max(names.find(0, header.name), 0)].decode("utf-8", "backslashreplace")
            legacy = name.startswith(".zdebug_")
            mine = Section(fd, header, self.file_size, legacy, self.wide)
            self.ordered.append(mine)
            if mine.flags & SHF_EXECINSTR:
                self._code.append((mine.address, mine.address + header.size))
            self.sections.setdefault("." + name[2:] if legacy else name, mine)
        self._code.sort()

    def section(self, name: str) -> Section | None:
        """The section of that name, if it holds bytes."""
        found = self.sections.get(name)
        return found if found is not None and found.size > 0 else None

    def linked(self, section: Section) -> Section | None:
        """The section that sh_link names: a symbol table's strings."""
        return self.ordered[section.link] if 0 < section.link < len(self.ordered) else None

    def build_id(self) -> str | None:
        """The GNU build-id in hex, from the note sections, or from the PT_NOTE segments where there are no sections."""
        try:
            return self._build_id()
        except PARSE_ERRORS:
            return None

    def _build_id(self) -> str | None:
        for section in self.ordered:
            if section.type == SHT_NOTE and section.size:
                found = find_build_id(section.read(0, NOTE_LIMIT_BYTES))
                if found:
                    return found
        for note in self.segments():
            if note.kind == PT_NOTE and note.offset < self.file_size:
                held = os.pread(self._stream.fileno(), min(note.size, NOTE_LIMIT_BYTES), note.offset)
                found = find_build_id(held)
                if found:
                    return found
        return None

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes of the file itself."""
        return os.pread(self._stream.fileno(), count, offset)

    def segments(self) -> list[Segment]:
        """The program headers, in their order; those before the first that cannot be read."""
        entry = SEGMENTS[self.wide]
        count = min(self._segment_count, MAX_SECTIONS) if self._segment_bytes >= entry.size else 0
        try:
            held = os.pread(self._stream.fileno(), count * self._segment_bytes, self._segments_at)
        except (OSError, OverflowError):
            return []
        found = []
        for number in range(min(count, len(held) // max(self._segment_bytes, 1))):
            row = entry.unpack_from(held, number * self._segment_bytes)
            kind, flags, (offset, address, _, size) = (
                (row[0], row[1], row[2:6]) if self.wide else (row[0], row[6], row[1:5])
            )
            found.append(Segment(kind, offset, address, size, bool(flags & PF_X)))
        return found

    def code_in(self, addresses: list[int]) -> list[int]:
        """Those of the ascending `addresses` that lie in sections of instructions; all where the file does not say."""
        if not self._code:
            return addresses
        found: list[int] = []
        end = 0
        for first, last in self._code:
            start = max(end, bisect.bisect_left(addresses, first))
            end = max(end, bisect.bisect_left(addresses, last))
            found += addresses[start:end]
        return found

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Elf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_build_id(notes: bytes) -> str | None:
    """The NT_GNU_BUILD_ID among ELF notes.

    04 00 00 00  14 00 00 00  03 00 00 00  47 4e 55 00  93 ac 61 ...     namesz, descsz, type, "GNU", 20 bytes of id
    """
    cur = Cursor(notes)
    try:
        while cur.pos < cur.end:
            name_size, size, kind = cur.fixed(4), cur.fixed(4), cur.fixed(4)
            name = notes[cur.pos : cur.pos + name_size]
            cur.skip((name_size + 3) & ~3)
            start = cur.pos
            if kind == NT_GNU_BUILD_ID and name == b"GNU\0" and 0 < size <= cur.end - start:
                return notes[start : start + size].hex()
            cur.skip((size + 3) & ~3)
    except DamagedError:
        pass
    return None


def build_id(path: str | Path) -> str | None:
    """The GNU build-id of an ELF file in hex; None where it has none or cannot be read."""
    try:
        with Elf(Path(path)) as elf:
            return elf.build_id()
    except PARSE_ERRORS:
        return None


def load_bias(path: str | Path, mapped_start: int, file_offset: int, executable: bool | None = None) -> int:
    """What to take from a run-time address to get the ELF's own: a line of /proc/PID/maps against the PT_LOAD headers.

    `mapped_start` is the address where the byte `file_offset` of the file is mapped. The loader maps whole pages, and
    one page of a file is often the end of one segment and the start of the next: mapped twice, at two addresses, with
    the same offset in both lines. So say whether the line is an `executable` one; where that is not said (None) an
    executable segment goes before others. A segment that begins in the page of `file_offset` goes before one that only
    holds it (a mapping that mprotect split). Without either, or when it is not an ELF file, the file is taken as mapped
    from address 0 on.
    """
    try:
        with Elf(Path(path)) as elf:
            loads = [segment for segment in elf.segments() if segment.kind == PT_LOAD]
    except PARSE_ERRORS:
        loads = []
    loads = [load for load in loads if executable is None or load.executable == executable]
    loads.sort(key=lambda load: not load.executable)
    begins = [load for load in loads if load.offset & ~(PAGE_BYTES - 1) == file_offset]
    holds = [load for load in loads if load.offset <= file_offset < load.offset + load.size]
    for load in begins + holds:
        return mapped_start - (load.address - load.offset + file_offset)
    return mapped_start - file_offset
