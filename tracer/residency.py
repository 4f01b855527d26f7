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
from array import array
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from heapledger.errors import ProcessGoneError
from heapledger.store.residency import HUGE, Category, pack_runs
from heapledger.tracer._pages import tile
from heapledger.tracer.proc import memory_folder

PAGE = os.sysconf("SC_PAGE_SIZE")

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    U64 = npt.NDArray[np.uint64]
    U8 = npt.NDArray[np.uint8]
else:
    from heapledger.late import np

_PAGEMAP_SCAN = 0xC0606610
_IS_FILE, _IS_PRESENT, _IS_SWAPPED, _IS_PFNZERO, _IS_HUGE = 4, 8, 16, 32, 64
_WANTED = _IS_FILE | _IS_PRESENT | _IS_SWAPPED | _IS_PFNZERO | _IS_HUGE
_REGIONS = 8192
_REGION_WORDS = 3  # start, end, categories
#: Addresses from here up are the kernel's ([vsyscall]).
_USER_END = (1 << 47) - PAGE
#: Pages read at once from pagemap (8 MiB of entries).
_CHUNK_PAGES = 1 << 20


_SCAN_WORDS = [
    *("size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages"),
    *("category_inverted", "category_mask", "category_anyof_mask", "return_mask"),
]


class _ScanArg(ctypes.Structure):
    """struct pm_scan_arg of linux/fs.h: twelve 64-bit words."""

    _fields_ = [(name, ctypes.c_uint64) for name in _SCAN_WORDS]


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
    pages: array[int] = field(default_factory=lambda: array("I"))  # in each run, of 32 bits
    category: bytes = b""
    resident_bytes: int = 0  # Rss as the page map has it

    def tile(self, regions: array[int] | U64, meaning: bytes) -> None:
        """Sets the runs from those of the scanned regions (start, end, flags of each) that lie in the VMA. `meaning`:
        the category of flags up to 127."""
        tiled = tile(regions, meaning, self.start, self.end, self.swap != 0, PAGE)
        self.pages, self.category, self.resident_bytes = tiled

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
            "runs": pack_runs(self.pages.tobytes(), self.category) if self.category else b"",
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
            (a.start, a.end, a.perms, a.rss, a.category) == (b.start, b.end, b.perms, b.rss, b.category)
            and a.pages == b.pages
            for a, b in zip(self.vmas, other.vmas, strict=True)
        )


_FIELDS = {b"Rss": "rss", b"Pss": "pss", b"Swap": "swap", b"Anonymous": "anonymous"}

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
    # A VMA's first line, sizes in kB, VmFlags. Compiled here, as few texts need it.
    line = re.compile(
        rb"^(?:([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+) *(.*)"
        rb"|(Rss|Pss|Swap|Anonymous|Private_Clean|Private_Dirty): +(\d+) kB|VmFlags: (.*))$",
        re.MULTILINE,
    )
    for low, high, perms, offset, device, inode, path, name, size, flags in line.findall(text):
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


def _category_of(flags: int) -> int:
    if flags & _IS_PRESENT:
        kind = Category.FILE if flags & _IS_FILE else Category.ANON
        kind = Category.ZERO if flags & _IS_PFNZERO else kind
        return kind | HUGE if flags & _IS_HUGE else kind
    return Category.SWAP if flags & _IS_SWAPPED else Category.ABSENT


#: PAGEMAP_SCAN's page categories (below 128) → ours.
_MEANING = bytes(_category_of(flags) for flags in range(128))
#: Where regions have our categories already.
_AS_IT_IS = bytes(range(128))


def scan(fd: int, start: int, end: int) -> array[int]:
    """Runs of pages in [start, end) that are present or swapped: start, end and PAGEMAP_SCAN's categories of each."""
    found = array("Q")
    buffer = array("Q", bytes(8 * _REGION_WORDS * _REGIONS))
    while start < end:
        arg = _ScanArg(
            size=ctypes.sizeof(_ScanArg),
            start=start,
            end=end,
            vec=buffer.buffer_info()[0],
            vec_len=_REGIONS,
            category_anyof_mask=_IS_PRESENT | _IS_SWAPPED,
            return_mask=_WANTED,
        )
        count = fcntl.ioctl(fd, _PAGEMAP_SCAN, arg)
        found += buffer[: _REGION_WORDS * count]
        # Fewer regions than there was room for: the walk is complete. walk_end does not tell it: the kernel fills `vec`
        # through a buffer of 512 regions and leaves in walk_end where that was last full (seen on 6.18).
        if count < _REGIONS or arg.walk_end <= start:
            break
        start = arg.walk_end
    return found


_PRESENT, _SWAPPED, _SHARED, _EXCLUSIVE = (1 << bit for bit in (63, 62, 61, 56))
_PFN = (1 << 55) - 1
_KPF_ZERO_PAGE = 1 << 24


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
    is_zero: npt.NDArray[np.bool_] = (flags & np.uint64(_KPF_ZERO_PAGE)) != 0
    return is_zero[inverse.reshape(-1)]


def _mark_zero(vma: Vma, entries: U64, category: U8) -> None:
    """Tells the zero page from anonymous pages: by its flags if we may read them, else so many of the pages that are
    mapped more than once as smaps leaves out of Rss."""
    counted = (category == Category.ANON) | (category == Category.FILE)
    excess = int(counted.sum()) - vma.rss // PAGE
    if excess <= 0:
        return
    maybe = (category == Category.ANON) & ((entries & np.uint64(_EXCLUSIVE)) == 0)
    if vma.inode == 0 and "s" not in vma.perms:
        maybe |= category == Category.FILE  # the huge zero page is not anonymous
    candidates = np.flatnonzero(maybe)
    candidates = candidates[np.argsort(category[candidates] != Category.FILE, kind="stable")]
    frames = entries[candidates] & np.uint64(_PFN)
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
            vma.tile(array("Q"), _AS_IT_IS)
            continue
        parts = [
            np.frombuffer(os.pread(fd, 8 * min(_CHUNK_PAGES, (vma.end - at) // PAGE), at // PAGE * 8), "<u8")
            for at in range(vma.start, vma.end, _CHUNK_PAGES * PAGE)
        ]
        entries = np.concatenate(parts)
        category = np.zeros(len(entries), np.uint8)
        present = (entries & np.uint64(_PRESENT)) != 0
        shared = (entries & np.uint64(_SHARED)) != 0
        category[present & ~shared] = Category.ANON
        category[present & shared] = Category.FILE
        if vma.swap:
            category[~present & ((entries & np.uint64(_SWAPPED)) != 0)] = Category.SWAP
        _mark_zero(vma, entries, category)
        edges = np.flatnonzero(np.diff(category, prepend=np.uint8(255), append=np.uint8(255)))
        bounds = edges.astype(np.uint64) * np.uint64(PAGE) + np.uint64(vma.start)
        kinds = category[edges[:-1]].astype(np.uint64)
        vma.tile(np.stack([bounds[:-1], bounds[1:], kinds], axis=1).reshape(-1), _AS_IT_IS)


@dataclass(slots=True)
class Grab:
    """What the kernel said, as it said it: all that is read while the process stands still. Parsing may wait."""

    smaps: bytes
    status: bytes
    regions: array[int] | None
    vmas: list[Vma] | None  # where the pages had to be read VMA by VMA
    method: str
    time_ns: int
    took_ns: int

    def reading(self) -> Reading:
        """The VMAs with their pages. ProcessGoneError if there were none."""
        vmas = self.vmas if self.vmas is not None else _some(parse_smaps(self.smaps))
        if self.regions is not None:
            for vma in vmas:
                vma.tile(self.regions, _MEANING)
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


def prepare() -> None:
    """Before the first process is stopped: a kernel without PAGEMAP_SCAN is read with numpy, which takes 60 ms to be
    imported."""
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        scan(fd, 0, PAGE)
    except OSError:
        np.uint64(0)
    finally:
        os.close(fd)


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


def _pages(folder: str, smaps: bytes, method: str | None) -> tuple[array[int] | None, list[Vma] | None, str]:
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
