"""The memory under the shadow arrays: zero until touched, and never copied when the heap grows.

A heap of large blocks touches few of its granules, so the arrays are mostly pages that nobody has written. Compiled,
each array is a mapping of its own: pages that were never touched cost nothing, and growing moves page tables (mremap),
not bytes. Interpreted, they are plain arrays, and growing copies.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.chunk import State, lengthened, new_bytes, new_ints, new_longs
from heapledger.analyzer.glibc.constants import FIRST

#: Bytes a granule in head, prev, link, when and state.
ENTRY_BYTES = (4, 4, 4, 8, 1)


def new_shadow(s: State) -> None:
    """Arrays for a small heap, in which nothing is yet; every bin is empty."""
    s.capacity = FIRST + 4096
    if cython.compiled:
        _map(s)
    else:
        s.head = new_ints(s.capacity)
        s.prev = new_ints(s.capacity)
        s.link = new_ints(s.capacity)
        s.when = new_longs(s.capacity)
        s.state = new_bytes(s.capacity)
    granule: cython.longlong
    for granule in range(0, FIRST, 2):
        s.link[granule] = granule
        s.link[granule + 1] = granule


def copy_shadow(s: State, t: State) -> None:
    """Arrays for t that hold what those of s do. Costs the heap, not the room that s has."""
    t.capacity = s.capacity
    if not cython.compiled:
        t.head = lengthened(s.head, s.capacity)
        t.prev = lengthened(s.prev, s.capacity)
        t.link = lengthened(s.link, s.capacity)
        t.when = lengthened(s.when, s.capacity)
        t.state = lengthened(s.state, s.capacity)
        return
    _map(t)
    used: int = max(s.top, FIRST) + 4
    _fill(t.head, s.head, used)
    _fill(t.prev, s.prev, used)
    _fill(t.link, s.link, used)
    _fill(t.when, s.when, used)
    _fill(t.state, s.state, used)


def _fill(ours: Any, theirs: Any, count: int) -> None:
    numpy.asarray(ours)[:count] = numpy.asarray(theirs)[:count]


def _map(s: State) -> None:
    """Fresh mappings for `capacity` granules."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    s.pages = [mmap.mmap(-1, size * s.capacity, flags=private) for size in ENTRY_BYTES]
    _look(s)


def _look(s: State) -> None:
    """The arrays are the mappings, seen as numbers."""
    s.head = _numbers(s.pages[0], numpy.int32)
    s.prev = _numbers(s.pages[1], numpy.int32)
    s.link = _numbers(s.pages[2], numpy.int32)
    s.when = _numbers(s.pages[3], numpy.int64)
    s.state = _numbers(s.pages[4], numpy.uint8)


def _numbers(pages: Any, kind: Any) -> Any:
    return numpy.frombuffer(pages, kind)


def _widen(s: State, count: int) -> bool:
    """Room for `count` granules, the new ones zero. False where the system has none: then nothing is lost."""
    try:
        if cython.compiled:
            _remap(s, count)
        else:
            s.head = lengthened(s.head, count)
            s.prev = lengthened(s.prev, count)
            s.link = lengthened(s.link, count)
            s.when = lengthened(s.when, count)
            s.state = lengthened(s.state, count)
    except (MemoryError, OSError):
        return False
    return True


def _remap(s: State, count: int) -> None:
    """A mapping may move only while nobody looks at it."""
    nobody: Any = None
    s.head = nobody
    s.prev = nobody
    s.link = nobody
    s.when = nobody
    s.state = nobody
    try:
        for pages, size in zip(s.pages, ENTRY_BYTES, strict=True):
            pages.resize(size * count)
    finally:
        _look(s)


@cython.cfunc
def reserve(s: State, granules: cython.longlong) -> cython.bint:
    """Makes room for granules [0, granules + 4). False where that is more than the model may take."""
    needed: cython.longlong = granules + 4
    if needed <= s.capacity:
        return True
    if needed > s.limit:
        return False
    fresh: cython.longlong = min(s.limit, max(needed, 2 * s.capacity))
    if not _widen(s, fresh):
        return False
    s.capacity = fresh
    return True
