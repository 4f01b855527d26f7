"""Giving memory back: top's end by brk, and, in malloc_trim, whole pages inside free chunks by madvise.

Rules: ../shared/specs/glibc-malloc.md §8.
"""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.bins import bin_number
from heapledger.analyzer.glibc.chunk import State, address_of, note, set_top, top_end
from heapledger.analyzer.glibc.constants import ADDRESS_LIMIT_BYTES, GRANULE_BYTES, SYS_BRK, SYS_MADVISE
from heapledger.analyzer.glibc.fastbin import consolidate
from heapledger.analyzer.glibc.shadow import reserve


@cython.cfunc
def trim_top(s: State, pad: cython.longlong) -> cython.longlong:
    """Lowers the break so that top keeps `pad` bytes and a page; 1 if the break moved.

    glibc compares a signed value with an unsigned one: with a top of just 32 bytes the value is -1, which counts as
    huge, and the break *rises*. A negative pad stands for one of 2**63 or more, which nothing exceeds.
    """
    if s.top == 0:
        return 0
    size: cython.longlong = s.head[s.top] * GRANULE_BYTES
    area: cython.longlong = size - 33
    if pad < 0 or pad > ADDRESS_LIMIT_BYTES or 0 <= area <= pad:
        return 0
    extra: cython.longlong = (area - pad) & -s.page
    if extra == 0 or s.brk != top_end(s):
        return 0
    if extra < 0 and not reserve(s, s.top + ((size - extra) >> 4)):
        return 0
    s.brk -= extra
    note(s, SYS_BRK, -extra)
    set_top(s, s.top, (size - extra) >> 4)
    return 1


@cython.cfunc
def trim_bin(s: State, bin: cython.longlong) -> cython.longlong:
    """madvise on the whole pages inside the chunks of one list, oldest first; 1 if there was one."""
    result: cython.longlong = 0
    g: cython.longlong = s.link[bin + 1]
    while g != bin:
        size: cython.longlong = s.head[g] * GRANULE_BYTES
        start: cython.longlong = address_of(s, g)
        # 48 is sizeof(struct malloc_chunk): the links at the front of a free chunk have to stay.
        first_page: cython.longlong = (start + 48 + s.page - 1) & -s.page
        size -= first_page - start
        if size > s.page - 1:
            note(s, SYS_MADVISE, size & -s.page)
            result = 1
        g = s.link[g + 1]
    return result


@cython.cfunc
def malloc_trim(s: State, pad: cython.longlong) -> cython.longlong:
    """What the public malloc_trim returns for the main arena."""
    consolidate(s)
    result: cython.longlong = trim_bin(s, 2)
    b: cython.longlong = bin_number(s.page >> 4)
    while b < 128:
        result |= trim_bin(s, 2 * b)
        b += 1
    return result | trim_top(s, pad)
