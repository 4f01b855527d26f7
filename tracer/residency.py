"""Where every page of a process is: /proc/PID/smaps (with VmFlags) and the kernel's page map, per VMA.

Identity: for each VMA, pages of the categories that `store.residency.resident` names, times the page size, are the
Rss that smaps prints for it; so are the sums. A page counts as present in the page map also when it is the shared zero
page, which Rss does not count; pages of [vdso] are in Rss, those of [vvar] are in neither.

Two sources: PAGEMAP_SCAN (Linux 6.7 and newer: runs, the zero page and huge pages told by the kernel), else the 8-byte
entries of /proc/PID/pagemap.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from heapledger.errors import ProcessGoneError
from heapledger.store.residency import HUGE, Category, encode_runs
from heapledger.tracer.proc import memory_folder

PAGE = os.sysconf("SC_PAGE_SIZE")
U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]

_PAGEMAP_SCAN = 0xC0606610
_IS_FILE, _IS_PRESENT, _IS_SWAPPED, _IS_PFNZERO, _IS_HUGE = 4, 8, 16, 32, 64
_WANTED = _IS_FILE | _IS_PRESENT | _IS_SWAPPED | _IS_PFNZERO | _IS_HUGE
_REGIONS = 8192
_REGION_DTYPE = np.dtype([("start", "<u8"), ("end", "<u8"), ("categories", "<u8")])
#: Addresses from here up are the kernel's ([vsyscall]).
_USER_END = (1 << 47) - PAGE
#: Pages read at once from pagemap (8 MiB of entries).
_CHUNK_PAGES = 1 << 20
#: Up to so many runs a VMA is tiled without numpy.
_FEW = 16
#: The longest run that 32 bits hold.
_MAX_RUN = 0xFFFFFFFF


_SCAN_WORDS = [
    *("size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages"),
    *("category_inverted", "category_mask", "category_anyof_mask", "return_mask"),
]


class _ScanArg(ctypes.Structure):
    """struct pm_scan_arg of linux/fs.h: twelve 64-bit words."""

    _fields_ = [(name, ctypes.c_uint64) for name in _SCAN_WORDS]


_NO_PAGES, _NO_CATEGORY = np.zeros(0, np.uint32), np.zeros(0, np.uint8)


@dataclass(slots=True)
class Vma:
    """One paragraph of smaps. Bytes; `flags` is the text of VmFlags."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str
    rss: int = 0
    pss: int = 0
    swap: int = 0
    private: int = 0
    anonymous: int = 0
    flags: str = ""
    pages: npt.NDArray[np.uint32] = field(default_factory=lambda: _NO_PAGES)
    category: U8 = field(default_factory=lambda: _NO_CATEGORY)
    resident_bytes: int = 0  # Rss as the page map has it

    def set_runs(self, pages: npt.NDArray[np.uint32], category: U8) -> None:
        self.pages, self.category = pages, category
        self.resident_bytes = int(pages[_COUNTED[category]].sum(dtype=np.uint64)) * PAGE

    def row(self) -> dict[str, Any]:
        """The row of `snapshot_vma`."""
        return {
            "start": self.start,
            "end": self.end,
            "perms": self.perms,
            "offset": self.offset,
            "device": self.device,
            "inode": self.inode,
            "path": self.path,
            "vm_flags": self.flags,
            "rss_bytes": self.rss,
            "pss_bytes": self.pss,
            "swap_bytes": self.swap,
            "private_bytes": self.private,
            "anonymous_bytes": self.anonymous,
            "runs": encode_runs(self.pages, self.category) if len(self.pages) else b"",
        }


@dataclass(slots=True)
class Reading:
    """All VMAs of a process at one moment, and how they were read."""

    vmas: list[Vma]
    method: str  # "pagemap_scan", "pagemap", "smaps"
    page_tables: int | None
    threads: int | None
    time_ns: int  # CLOCK_MONOTONIC
    took_ns: int

    @property
    def rss(self) -> int:
        return sum(vma.rss for vma in self.vmas)

    @property
    def pagemap_bytes(self) -> int:
        return sum(vma.resident_bytes for vma in self.vmas)

    def agrees(self) -> bool:
        """Whether each VMA's pages are its Rss: what must hold when nothing moved while it was read."""
        return self.method == "smaps" or all(vma.resident_bytes == vma.rss for vma in self.vmas)

    def same_pages(self, other: Reading) -> bool:
        """Whether two readings saw the same VMAs with the same pages."""
        if len(self.vmas) != len(other.vmas):
            return False
        return all(
            (a.start, a.end, a.perms, a.rss) == (b.start, b.end, b.perms, b.rss)
            and np.array_equal(a.pages, b.pages)
            and np.array_equal(a.category, b.category)
            for a, b in zip(self.vmas, other.vmas, strict=True)
        )


_FIELDS = {b"Rss": "rss", b"Pss": "pss", b"Swap": "swap", b"Anonymous": "anonymous"}
#: The lines of smaps that are wanted: a VMA's first line, sizes in kB, VmFlags.
_LINE = re.compile(
    rb"^(?:([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+) *(.*)"
    rb"|(Rss|Pss|Swap|Anonymous|Private_Clean|Private_Dirty): +(\d+) kB|VmFlags: (.*))$",
    re.MULTILINE,
)


#: Fields of a paragraph in the order in which every kernel since 4.14 writes them, among others.
_SMAPS_FIELDS = (b"Rss", b"Pss", b"Private_Clean", b"Private_Dirty", b"Anonymous", b"Swap", b"VmFlags")


@lru_cache(maxsize=8)
def _paragraph(names: tuple[bytes, ...]) -> re.Pattern[bytes] | None:
    """A paragraph that has just these fields. Every line is named, so a text that does not match costs no more than one
    that does. None if the fields that are wanted are not there, in order."""
    if tuple(name for name in names if name in _SMAPS_FIELDS) != _SMAPS_FIELDS or len(names) > 64:
        return None
    lines = [rb"^([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+) *(.*)"]
    for name in names[:-1]:
        lines.append(re.escape(name) + (rb": +(\d+) kB" if name in _SMAPS_FIELDS else rb":.*"))
    return re.compile(b"\n".join(lines) + rb"\nVmFlags: (.*)$", re.MULTILINE)


def _fields_of_the_first(text: bytes) -> tuple[bytes, ...]:
    """The names of the fields in the first paragraph, up to VmFlags."""
    lines = text[: text.find(b"\nVmFlags:") + 1].split(b"\n")[1:-1]
    return (*(line.partition(b":")[0] for line in lines[:64] if line[:1].isupper()), b"VmFlags")


def parse_smaps(text: bytes) -> list[Vma]:
    """The paragraphs of /proc/PID/smaps, or of a copy of it."""
    pattern = _paragraph(_fields_of_the_first(text))
    if pattern is None:
        return _parse_any_smaps(text)
    found = pattern.findall(text)
    last_line = text[text.rfind(b"\nVmFlags:") + 1 :]
    whole = last_line.endswith(b"\n") and last_line.count(b"\n") == 1
    if not whole or len(found) != text.count(b"\nRss:") or len(found) != text.count(b"\nVmFlags:"):
        return _parse_any_smaps(text)
    vmas = []
    for low, high, perms, offset, device, inode, path, rss, pss, clean, dirty, anonymous, swap, flags in found:
        vma = Vma(
            int(low, 16),
            int(high, 16),
            perms.decode(),
            int(offset, 16),
            device.decode(),
            int(inode),
            path.decode(errors="replace"),
            int(rss) * 1024,
            int(pss) * 1024,
            int(swap) * 1024,
            (int(clean) + int(dirty)) * 1024,
            int(anonymous) * 1024,
            flags.decode().strip(),
        )
        vmas.append(vma)
    return vmas


def _parse_any_smaps(text: bytes) -> list[Vma]:
    """Line by line: a text that was cut off, or lacks some fields."""
    vmas: list[Vma] = []
    for low, high, perms, offset, device, inode, path, name, size, flags in _LINE.findall(text):
        if low:
            where = (int(low, 16), int(high, 16), perms.decode(), int(offset, 16), device.decode(), int(inode))
            vmas.append(Vma(*where, path.decode(errors="replace")))
        elif not vmas:
            continue
        elif name in _FIELDS:
            setattr(vmas[-1], _FIELDS[name], int(size) * 1024)
        elif name:
            vmas[-1].private += int(size) * 1024
        else:
            vmas[-1].flags = flags.decode().strip()
    return vmas


#: PAGEMAP_SCAN's page categories (below 128) → ours. An array, as members of an enum are slow to look up.
_CATEGORY_OF = np.zeros(128, np.uint8)
for _flags in range(128):
    if _flags & _IS_PRESENT:
        _CATEGORY_OF[_flags] = Category.FILE if _flags & _IS_FILE else Category.ANON
        if _flags & _IS_PFNZERO:
            _CATEGORY_OF[_flags] = Category.ZERO
        if _flags & _IS_HUGE:
            _CATEGORY_OF[_flags] |= HUGE
    elif _flags & _IS_SWAPPED:
        _CATEGORY_OF[_flags] = Category.SWAP
_RESIDENT = (int(Category.ANON), int(Category.FILE))
_COUNTED = np.isin(np.arange(256) & 0x0F, _RESIDENT)
_ABSENT, _SWAP = int(Category.ABSENT), int(Category.SWAP)


def scan(fd: int, start: int, end: int) -> npt.NDArray[Any]:
    """Runs of pages in [start, end) that are present or swapped: (start, end, categories) of PAGEMAP_SCAN."""
    parts = []
    buffer = np.zeros(_REGIONS, _REGION_DTYPE)
    while start < end:
        arg = _ScanArg(
            size=ctypes.sizeof(_ScanArg),
            start=start,
            end=end,
            vec=buffer.ctypes.data,
            vec_len=_REGIONS,
            category_anyof_mask=_IS_PRESENT | _IS_SWAPPED,
            return_mask=_WANTED,
        )
        count = fcntl.ioctl(fd, _PAGEMAP_SCAN, arg)
        parts.append(buffer[:count].copy())
        # Fewer regions than there was room for: the walk is complete. walk_end does not tell it: the kernel fills `vec`
        # through a buffer of 512 regions and leaves in walk_end where that was last full (seen on 6.18).
        if count < _REGIONS or arg.walk_end <= start:
            break
        start = arg.walk_end
    return np.concatenate(parts) if parts else np.zeros(0, _REGION_DTYPE)


def _tile(vma: Vma, starts: U64, ends: U64, category: U8) -> None:
    """Sets the VMA's runs from those (sorted, within it) that are not absent; the gaps become ABSENT. Merges equals."""
    if len(starts) <= _FEW:
        _tile_few(vma, starts.tolist(), ends.tolist(), category.tolist())
        return
    bounds = np.empty(2 * len(starts) + 2, np.uint64)
    bounds[0], bounds[-1] = vma.start, vma.end
    bounds[1:-1:2] = starts
    bounds[2:-1:2] = ends
    lengths = (bounds[1:] - bounds[:-1]) // np.uint64(PAGE)
    kinds = np.zeros(len(lengths), np.uint8)
    kinds[1::2] = category
    keep = lengths > 0
    lengths, kinds = lengths[keep], kinds[keep]
    first = np.flatnonzero(np.concatenate(([True], kinds[1:] != kinds[:-1])))
    lengths, kinds = np.add.reduceat(lengths, first), kinds[first]
    if int(lengths.max()) > _MAX_RUN:
        lengths, kinds = _split_long(lengths, kinds)
    vma.set_runs(lengths.astype(np.uint32), kinds)


def _tile_few(vma: Vma, starts: list[int], ends: list[int], category: list[int]) -> None:
    """The same for a handful of runs, where numpy's calls cost more than the work."""
    runs: list[tuple[int, int]] = []
    at = vma.start
    for start, end, kind in [*zip(starts, ends, category, strict=True), (vma.end, vma.end, _ABSENT)]:
        for length, what in ((start - at, _ABSENT), (end - start, kind)):
            if length and runs and runs[-1][1] == what:
                runs[-1] = (runs[-1][0] + length // PAGE, what)
            elif length:
                runs.append((length // PAGE, what))
        at = end
    if any(length > _MAX_RUN for length, _ in runs):
        runs = [(min(_MAX_RUN, n - at), k) for n, k in runs for at in range(0, n, _MAX_RUN)]
    vma.pages = np.array([length for length, _ in runs], np.uint32)
    vma.category = np.array([kind for _, kind in runs], np.uint8)
    vma.resident_bytes = sum(length for length, kind in runs if kind & 0x0F in _RESIDENT) * PAGE


def _split_long(lengths: U64, kinds: U8) -> tuple[U64, U8]:
    """Runs of 16 TiB and more do not fit 32 bits: several runs of the same category."""
    pieces = [
        (min(_MAX_RUN, n - at), k) for n, k in zip(lengths.tolist(), kinds, strict=True) for at in range(0, n, _MAX_RUN)
    ]
    return np.array([n for n, _ in pieces], np.uint64), np.array([k for _, k in pieces], np.uint8)


def _clip(vmas: list[Vma], regions: npt.NDArray[Any]) -> None:
    """Cuts the scanned regions to the VMAs and tiles each with its own."""
    starts, ends = np.ascontiguousarray(regions["start"]), np.ascontiguousarray(regions["end"])
    categories = _CATEGORY_OF[regions["categories"].astype(np.intp) & 127]
    lows = np.searchsorted(ends, np.array([vma.start for vma in vmas], np.uint64), side="right").tolist()
    highs = np.searchsorted(starts, np.array([vma.end for vma in vmas], np.uint64), side="left").tolist()
    for vma, low, high in zip(vmas, lows, highs, strict=True):
        category = categories[low:high].copy()
        # Page-table markers (guards, write-protect) look swapped; only what smaps calls swap is swap.
        if vma.swap == 0:
            category[category == _SWAP] = _ABSENT
        first = np.maximum(starts[low:high], np.uint64(vma.start))
        last = np.minimum(ends[low:high], np.uint64(vma.end))
        _tile(vma, first, last, category)


_PRESENT, _SWAPPED, _SHARED, _EXCLUSIVE = (np.uint64(1 << bit) for bit in (63, 62, 61, 56))
_PFN = np.uint64((1 << 55) - 1)
_KPF_ZERO_PAGE = np.uint64(1 << 24)


def _zero_frames(frames: U64) -> npt.NDArray[np.bool_] | None:
    """Which page frames are the zero page, by /proc/kpageflags (root); None where it cannot be read."""
    unique, inverse = np.unique(frames, return_inverse=True)
    flags = np.zeros(len(unique), np.uint64)
    try:
        with open("/proc/kpageflags", "rb", buffering=0) as file:
            for at, frame in enumerate(unique.tolist()):
                file.seek(frame * 8)
                flags[at] = int.from_bytes(file.read(8), "little")
    except OSError:
        return None
    is_zero: npt.NDArray[np.bool_] = (flags & _KPF_ZERO_PAGE) != 0
    return is_zero[inverse.reshape(-1)]


def _mark_zero(vma: Vma, entries: U64, category: U8) -> None:
    """Tells the zero page from anonymous pages: by its flags if we may read them, else so many of the pages that are
    mapped more than once as smaps leaves out of Rss."""
    counted = (category == Category.ANON) | (category == Category.FILE)
    excess = int(counted.sum()) - vma.rss // PAGE
    if excess <= 0:
        return
    maybe = (category == Category.ANON) & ((entries & _EXCLUSIVE) == 0)
    if vma.inode == 0 and "s" not in vma.perms:
        maybe |= category == Category.FILE  # the huge zero page is not anonymous
    candidates = np.flatnonzero(maybe)
    candidates = candidates[np.argsort(category[candidates] != Category.FILE, kind="stable")]
    frames = entries[candidates] & _PFN
    if len(frames) and frames.any() and len(candidates) <= 1 << 16:
        told = _zero_frames(frames)
        if told is not None:
            category[candidates[told]] = Category.ZERO
            return
    category[candidates[:excess]] = Category.ZERO


def _fill_by_pagemap(fd: int, vmas: list[Vma]) -> None:
    """Runs of all VMAs from the entries of pagemap. VMAs without Rss and swap are not read (they may be terabytes)."""
    for vma in vmas:
        if vma.end > _USER_END or (vma.rss == 0 and vma.swap == 0):
            empty = np.zeros(0, np.uint64)
            _tile(vma, empty, empty, np.zeros(0, np.uint8))
            continue
        parts = [
            np.frombuffer(os.pread(fd, 8 * min(_CHUNK_PAGES, (vma.end - at) // PAGE), at // PAGE * 8), "<u8")
            for at in range(vma.start, vma.end, _CHUNK_PAGES * PAGE)
        ]
        entries = np.concatenate(parts)
        category = np.zeros(len(entries), np.uint8)
        present = (entries & _PRESENT) != 0
        shared = (entries & _SHARED) != 0
        category[present & ~shared] = Category.ANON
        category[present & shared] = Category.FILE
        if vma.swap:
            category[~present & ((entries & _SWAPPED) != 0)] = Category.SWAP
        _mark_zero(vma, entries, category)
        edges = np.flatnonzero(np.diff(category, prepend=np.uint8(255), append=np.uint8(255)))
        bounds = edges.astype(np.uint64) * np.uint64(PAGE) + np.uint64(vma.start)
        _tile(vma, bounds[:-1], bounds[1:], category[edges[:-1]])


@dataclass(slots=True)
class Grab:
    """What the kernel said, as it said it: all that is read while the process stands still. Parsing may wait."""

    smaps: bytes
    status: bytes
    regions: npt.NDArray[Any] | None
    vmas: list[Vma] | None  # where the pages had to be read VMA by VMA
    method: str
    time_ns: int
    took_ns: int

    def reading(self) -> Reading:
        """The VMAs with their pages. ProcessGoneError if there were none."""
        vmas = self.vmas if self.vmas is not None else _some(parse_smaps(self.smaps))
        if self.regions is not None:
            _clip(vmas, self.regions)
        tables, threads = _counters(self.status)
        return Reading(vmas, self.method, tables, threads, self.time_ns, self.took_ns)


def _some(vmas: list[Vma]) -> list[Vma]:
    if not vmas:
        raise ProcessGoneError("the process has ended: its memory is gone")
    return vmas


def _counters(status: bytes) -> tuple[int | None, int | None]:
    """(VmPTE in bytes, threads) of the text of /proc/PID/status."""
    tables = threads = None
    for line in status.splitlines():
        if line.startswith(b"VmPTE:"):
            tables = int(line.split()[1]) * 1024
        elif line.startswith(b"Threads:"):
            threads = int(line.split()[1])
    return tables, threads


def _file(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise ProcessGoneError(f"{path}: {error.strerror}") from None


def grab(pid: int, *, method: str | None = None) -> Grab:
    """Reads all pages of `pid` now. `method` forces one source (tests); ProcessGoneError when it is gone."""
    begun = time.monotonic_ns()
    folder = memory_folder(pid)
    smaps = _file(f"{folder}/smaps")
    status = _file(f"{folder}/status")
    regions, vmas, used = _pages(folder, smaps, method)
    return Grab(smaps, status, regions, vmas, used, begun, time.monotonic_ns() - begun)


def read(pid: int, *, method: str | None = None) -> Reading:
    """`grab`, and parsed."""
    return grab(pid, method=method).reading()


def _pages(folder: str, smaps: bytes, method: str | None) -> tuple[npt.NDArray[Any] | None, list[Vma] | None, str]:
    """(scanned regions, or VMAs with their pages, the method's name)."""
    if method == "smaps":
        return None, None, "smaps"
    try:
        fd = os.open(f"{folder}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None, None, "smaps"
    try:
        if method != "pagemap":
            try:
                return scan(fd, 0, _USER_END), None, "pagemap_scan"
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.ENOSYS):
                    raise
        vmas = _some(parse_smaps(smaps))
        _fill_by_pagemap(fd, vmas)
        return None, vmas, "pagemap"
    except OSError:
        return None, None, "smaps"
    finally:
        os.close(fd)
