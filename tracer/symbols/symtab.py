"""ELF symbol tables, read for a handful of addresses at a time.

    Elf64_Sym, 24 bytes              Elf32_Sym, 16 bytes
    0  u32 st_name                   0  u32 st_name
    4  u8  st_info  bind << 4 | type 4  u32 st_value
    5  u8  st_other                  8  u32 st_size
    6  u16 st_shndx                  12 u8  st_info
    8  u64 st_value                  13 u8  st_other
    16 u64 st_size                   14 u16 st_shndx

The table is walked once and never sorted: for each symbol the addresses it covers are found by bisection, so the cost
is symbols * log(addresses) whatever the file's size.
"""

from __future__ import annotations

from array import array

from heapledger.tracer.symbols.cursor import Cursor, first_at_least

SHN_UNDEF = 0
SHN_LORESERVE = 0xFF00
STT_NOTYPE = 0
STT_FUNC = 2
STT_GNU_IFUNC = 10
STB_GLOBAL = 1


def symbol_rank(kind: int, bind: int, size: int) -> int:
    """How good a symbol's claim is: sized functions first, then by binding (global, weak, local)."""
    rank = 1
    if bind == STB_GLOBAL:
        rank = 3
    elif bind > STB_GLOBAL:
        rank = 2
    if kind != STT_NOTYPE:
        rank += 4
    if size > 0:
        rank += 8
    return rank


def covering_symbols(table: bytes, entry_size: int, wide: bool, targets: array[int]) -> tuple[list[int], list[int]]:
    """For each of the ascending `targets` the st_name and st_value of the function symbol that covers it, -1 if none.

    A symbol covers [value, value + size); one of size 0 (assembly) covers everything up to the next symbol. The
    nearest start wins, then `symbol_rank`.
    """
    count = len(targets)
    names = array("q", [-1]) * count
    starts = array("Q", [0]) * count
    ranks = array("q", [-1]) * count
    open_names = array("q", [-1]) * count
    open_starts = array("Q", [0]) * count
    walls = array("Q", [0]) * count
    cur = Cursor(table)
    number = len(table) // entry_size if entry_size >= (24 if wide else 16) else 0
    index = 1
    while index < number:
        cur.seek(index * entry_size)
        index += 1
        name = cur.fixed(4)
        if wide:
            info = cur.u8()
            cur.skip(1)
            section = cur.fixed(2)
            value = cur.fixed(8)
            size = cur.fixed(8)
        else:
            value = cur.fixed(4)
            size = cur.fixed(4)
            info = cur.u8()
            cur.skip(1)
            section = cur.fixed(2)
        kind = info & 15
        if section == SHN_UNDEF or section >= SHN_LORESERVE or name == 0:
            continue
        if kind != STT_FUNC and kind != STT_GNU_IFUNC and kind != STT_NOTYPE:
            continue
        k = first_at_least(targets, value)
        if size == 0:
            # Covers what no sized symbol claims; only the nearest target matters, the rest is filled in below.
            if k < count and (open_names[k] < 0 or value > open_starts[k]):
                open_names[k] = name
                open_starts[k] = value
            continue
        rank = symbol_rank(kind, info >> 4, size)
        if k < count and value > walls[k]:
            walls[k] = value
        while k < count and targets[k] - value < size:
            if names[k] < 0 or value > starts[k] or (value == starts[k] and rank > ranks[k]):
                names[k] = name
                starts[k] = value
                ranks[k] = rank
            k += 1
    return fill_open(names, starts, open_names, open_starts, walls)


def fill_open(
    names: array[int], starts: array[int], open_names: array[int], open_starts: array[int], walls: array[int]
) -> tuple[list[int], list[int]]:
    """Give targets that no sized symbol covers the nearest unsized symbol below them, if no sized one lies between.

    `walls[k]` is the highest start of a sized symbol at or below target k and above target k - 1.
    """
    found_names = []
    found_starts = []
    last_name = -1
    last_start = 0
    wall = 0
    for k in range(len(names)):
        if open_names[k] >= 0:
            last_name = open_names[k]
            last_start = open_starts[k]
        wall = max(wall, walls[k])
        if names[k] >= 0:
            found_names.append(names[k])
            found_starts.append(starts[k])
        else:
            found_names.append(last_name if last_start > wall else -1)
            found_starts.append(last_start)
    return found_names, found_starts
