"""Where the debug information of a binary is: in it, by build-id, by `.gnu_debuglink`, and its `.gnu_debugaltlink`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from heapledger.tracer.symbols.elf import PARSE_ERRORS, Elf

CRC_CHUNK_BYTES = 1 << 20
NAME_LIMIT_BYTES = 4096


def open_elf(path: Path) -> Elf | None:
    """The file opened, or None where it cannot be read or is no usable ELF file."""
    try:
        return Elf(path)
    except PARSE_ERRORS:
        return None


def candidates(image: Elf | None, build_id: str | None, debug_dirs: Sequence[Path]) -> list[Path]:
    """Every place a separate debug file would be looked for, whether there is one or not."""
    places = build_id_places(build_id, debug_dirs) if build_id else []
    link = read_link(image, ".gnu_debuglink") if image is not None else None
    if image is not None and link is not None:
        places += debuglink_places(image, link[0], debug_dirs)
    return places


def build_id_places(build_id: str, debug_dirs: Sequence[Path]) -> list[Path]:
    """`DIR/.build-id/xx/yyyy.debug` under each of the folders; none for what is no build-id."""
    if len(build_id) < 4 or any(c not in "0123456789abcdef" for c in build_id):
        return []
    return [folder / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug" for folder in debug_dirs]


def debuglink_places(image: Elf, name: str, debug_dirs: Sequence[Path]) -> list[Path]:
    """Where GDB looks for the file of a `.gnu_debuglink`: beside the binary, in `.debug`, under the debug folders."""
    if "/" in name or name in ("", ".", ".."):
        return []
    folder = image.path.resolve().parent
    return [folder / name, folder / ".debug" / name, *(top / str(folder).lstrip("/") / name for top in debug_dirs)]


def by_build_id(build_id: str, debug_dirs: Sequence[Path]) -> Elf | None:
    """The debug file of that build-id, if it says the same build-id of itself."""
    for place in build_id_places(build_id, debug_dirs):
        found = open_elf(place)
        if found is not None:
            if found.build_id() == build_id:
                return found
            found.close()
    return None


def by_debuglink(image: Elf, debug_dirs: Sequence[Path]) -> Elf | None:
    """The file that `.gnu_debuglink` names, if it has the right checksum.

    70 72 6f 67 2e 64 65 62 75 67 00 00  1c 2a 98 5d      "prog.debug", NUL, padding to 4, CRC-32 of the whole file
    """
    link = read_link(image, ".gnu_debuglink")
    if link is None:
        return None
    name, rest = link
    start = (len(name.encode("utf-8", "surrogateescape")) + 4) & ~3
    checksum = int.from_bytes(rest[start : start + 4], "little")
    for place in debuglink_places(image, name, debug_dirs):
        if place.is_file() and place != image.path and crc32(place) == checksum:
            found = open_elf(place)
            if found is not None:
                return found
    return None


def by_altlink(debug: Elf, debug_dirs: Sequence[Path]) -> Elf | None:
    """The file `dwz` moved shared debug information to: `.gnu_debugaltlink` holds a path, NUL, and a build-id."""
    link = read_link(debug, ".gnu_debugaltlink")
    if link is None:
        return None
    name, rest = link
    build_id = rest[len(name.encode("utf-8", "surrogateescape")) + 1 :].hex()
    found = by_build_id(build_id, debug_dirs) if build_id else None
    if found is not None or not name:
        return found
    found = open_elf(debug.path.resolve().parent / name)
    if found is not None and found.build_id() != build_id:
        found.close()
        return None
    return found


def read_link(elf: Elf, name: str) -> tuple[str, bytes] | None:
    """The name at the front of a link section, and the section's bytes."""
    section = elf.section(name)
    if section is None:
        return None
    try:
        held = section.read(0, NAME_LIMIT_BYTES)
    except PARSE_ERRORS:
        return None
    end = held.find(0)
    return (held[:end].decode("utf-8", "surrogateescape"), held) if end > 0 else None


def crc32(path: Path) -> int | None:
    """The CRC-32 of a file's bytes; None where it cannot be read."""
    checksum = 0
    try:
        with path.open("rb") as stream:
            while piece := stream.read(CRC_CHUNK_BYTES):
                checksum = zlib.crc32(piece, checksum)
    except OSError:
        return None
    return checksum
