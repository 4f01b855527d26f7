"""Where the pages of a VMA were: runs of pages of one category, and their compact form in `snapshot_vma.runs`.

    byte 0      form: 0 raw, 1 zstd           the smaller one is taken
    bytes 1-4   number of runs (u32)
    bytes 5-8   CRC-32 of the payload as stored
    payload     u32 x runs: pages in each run, then u8 x runs: category of each run

Example: 2 anonymous pages, then 3 that were never touched: 00  02000000  (crc)  02000000 03000000  01 00.
The runs of a VMA tile it: their pages sum to (end - start) / page size.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING

from heapledger.errors import TraceError
from heapledger.store import planes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pages = npt.NDArray[np.uint32]
    Categories = npt.NDArray[np.uint8]
else:
    from heapledger.late import np

_HEAD = struct.Struct("<BII")
#: More runs than this are refused: 16 M runs are 80 MiB, and 64 GiB of memory in which every second page differs.
MAX_RUNS = 1 << 24
#: Pages in 47 bits of address space.
MAX_PAGES = 1 << 35


class Category(IntEnum):
    """What the kernel says about a page. Values are part of the file format."""

    ABSENT = 0
    ANON = 1  #: private memory of the process (also a private copy of a file's page)
    FILE = 2  #: a page of a file or of shared memory
    ZERO = 3  #: the shared zero page: present, but not counted in Rss
    SWAP = 4


#: Flag beside a category: the page is mapped by a huge page-table entry.
HUGE = 0x10
_CATEGORY_MASK = 0x0F


@cache
def _resident() -> npt.NDArray[np.bool_]:
    """By a run's byte: counts in Rss, whatever its flags. An array, as members of an enum are slow to look up."""
    table = np.zeros(256, np.bool_)
    table[[int(kind) | flag for kind in (Category.ANON, Category.FILE) for flag in range(0, 256, 16)]] = True
    return table


_LAST_CATEGORY = int(max(Category))


def category_of(category: Categories) -> Categories:
    """The categories without the HUGE flag."""
    return category & np.uint8(_CATEGORY_MASK)


def resident(category: Categories) -> npt.NDArray[np.bool_]:
    """Which runs count in Rss: ANON and FILE, huge or not."""
    mask: npt.NDArray[np.bool_] = _resident()[category]
    return mask


def encode_runs(pages: npt.ArrayLike, category: npt.ArrayLike) -> bytes:
    """The blob for runs of `pages` (u4) of `category` (u1, Category and perhaps HUGE)."""
    lengths = np.ascontiguousarray(pages, "<u4")
    kinds = np.ascontiguousarray(category, np.uint8)
    assert lengths.shape == kinds.shape
    return pack_runs(lengths.tobytes(), kinds.tobytes())


def pack_runs(lengths: bytes, kinds: bytes) -> bytes:
    """The same, of what the arrays hold."""
    assert len(kinds) <= MAX_RUNS
    raw = lengths + kinds
    packed = planes.compress(raw) if len(raw) > 64 else raw
    form, payload = (1, packed) if len(packed) < len(raw) else (0, raw)
    return _HEAD.pack(form, len(kinds), zlib.crc32(payload)) + payload


def decode_runs(data: bytes) -> tuple[Pages, Categories]:
    """(pages, category) of the runs. TraceError for anything `encode_runs` would not have written."""
    if not data:
        return np.zeros(0, np.uint32), np.zeros(0, np.uint8)
    if len(data) < _HEAD.size:
        raise TraceError("a residency map is cut short")
    form, count, crc = _HEAD.unpack_from(data)
    payload = data[_HEAD.size :]
    if zlib.crc32(payload) != crc:
        raise TraceError("a residency map is damaged (checksum)")
    if count > MAX_RUNS or form > 1:
        raise TraceError(f"a residency map claims {count} runs in form {form}")
    raw = planes.decompress(payload, 5 * count) if form else payload
    if len(raw) != 5 * count:
        raise TraceError("a residency map does not have the size it states")
    pages = np.frombuffer(raw, "<u4", count).astype(np.uint32)
    category = np.frombuffer(raw, np.uint8, count, 4 * count).copy()
    if int(pages.sum(dtype=np.uint64)) > MAX_PAGES or (count and int(category_of(category).max()) > _LAST_CATEGORY):
        raise TraceError("a residency map describes pages that cannot exist")
    return pages, category


def resident_bytes(data: bytes, page_size: int = 4096) -> int:
    """Bytes that count in Rss, of an encoded map."""
    pages, category = decode_runs(data)
    return int(pages[resident(category)].sum(dtype=np.uint64)) * page_size
