"""Top and the break: how the main arena grows, and what happens when somebody else has moved the break.

Rules: ../shared/specs/glibc-malloc.md §7.
"""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.chunk import State, address_of, note, set_chunk, set_top, top_end
from heapledger.analyzer.glibc.constants import (
    ADDRESS_LIMIT_BYTES,
    CONSOLIDATION_SIZE,
    FAILED,
    FENCE,
    FIRST,
    FOREIGN,
    GRANULE_BYTES,
    LIVE,
    MIN_BYTES,
    MIN_CHUNK,
    SYS_BRK,
    SYS_BRK_QUERY,
)
from heapledger.analyzer.glibc.free import free_inside
from heapledger.analyzer.glibc.shadow import reserve


@cython.cfunc
@cython.inline
def cut_top(s: State, n: cython.longlong) -> cython.longlong:
    """n granules from the low end of top, which must be larger by a minimal chunk."""
    g: cython.longlong = s.top
    size: cython.longlong = s.head[g]
    set_chunk(s, g, n, LIVE)
    set_top(s, g + n, size - n)
    return g


@cython.cfunc
def grow(s: State, n: cython.longlong) -> cython.longlong:
    """Moves the break so that top can serve n granules, and serves them. FAILED where the model may not grow so far.

    A negative n is a request near 2**64 (`wrapped_size`): top may grow by a little, and serves nothing.
    """
    old_size: cython.longlong = s.head[s.top] * GRANULE_BYTES if s.top else 0
    size: cython.longlong = growth(s, n, old_size)
    if size <= 0 or size > ADDRESS_LIMIT_BYTES:
        s.unbacked = True
        return FAILED
    s.old_top = s.top
    s.grew = size
    if s.top != 0 and s.brk == top_end(s):
        if not reserve(s, s.top + ((old_size + size) >> 4)):
            s.unbacked = True
            return FAILED
        note(s, SYS_BRK, size)
        s.brk += size
        set_top(s, s.top, (old_size + size) >> 4)
    elif not grow_apart(s, old_size, size):
        s.unbacked = True
        return FAILED
    return cut_top(s, n) if n > 0 and s.head[s.top] >= n + MIN_CHUNK else FAILED


@cython.cfunc
def growth_defeats_itself(s: State, n: cython.longlong) -> cython.bint:
    """Whether malloc would fail although the system gave what it was asked for.

    Behind a foreign break the old top is freed once the new one is there; a large one triggers a trim, and the
    trim gives back the very memory that was got for the request. glibc then reports ENOMEM. (Seen on 2.31, 2.36
    and 2.41.)
    """
    if s.top == 0 or s.brk == top_end(s) or s.head[s.top] - MIN_CHUNK < CONSOLIDATION_SIZE:
        return False
    old_size: cython.longlong = s.head[s.top] * GRANULE_BYTES
    size: cython.longlong = growth(s, n, old_size)
    if size <= 0 or size > ADDRESS_LIMIT_BYTES:
        return False
    fresh: cython.longlong = apart_end(s, old_size, size) - ((s.brk + 15) & -16)
    extra: cython.longlong = (fresh - 33 - s.top_pad) & -s.page
    return fresh >= s.trim_threshold and extra > 0 and fresh - extra < n * GRANULE_BYTES + MIN_BYTES


@cython.cfunc
@cython.inline
def growth(s: State, n: cython.longlong, old_size: cython.longlong) -> cython.longlong:
    """Bytes that malloc asks of the break for n granules, counting on the old top."""
    return (n * GRANULE_BYTES + s.top_pad + MIN_BYTES - old_size + s.page - 1) & -s.page


@cython.cfunc
@cython.inline
def apart_end(s: State, old_size: cython.longlong, size: cython.longlong) -> cython.longlong:
    """Where the break comes to be when the new memory does not border the old top: the second move makes up for it."""
    aligned: cython.longlong = (s.brk + 15) & -16
    return (aligned + size + old_size + s.page - 1) & -s.page


@cython.cfunc
def grow_apart(s: State, old_size: cython.longlong, size: cython.longlong) -> cython.bint:
    """The new memory does not border the old top: the first growth of all, or somebody else moved the break.

    The amount asked for was reckoned with the old top, so a second move of the break makes up for it and ends on a
    page.
    """
    start: cython.longlong = s.brk
    aligned: cython.longlong = (start + 15) & -16
    end: cython.longlong = apart_end(s, old_size, size)
    if s.top == 0:
        s.base = aligned
    fresh: cython.longlong = FIRST + ((aligned - s.base) >> 4)
    if not reserve(s, fresh + ((end - aligned) >> 4)):
        return False
    if not s.brk_queried:
        s.brk_queried = True
        note(s, SYS_BRK_QUERY, 0)
    note(s, SYS_BRK, size)
    if end != start + size:
        note(s, SYS_BRK, end - start - size)
    s.brk = end
    s.grew = end - start
    old: cython.longlong = s.top
    if old != 0:
        fence_off(s, old, fresh)
    set_top(s, fresh, (end - aligned) >> 4)
    if old != 0 and s.state[old] == LIVE:
        free_inside(s, old)
    return True


@cython.cfunc
def fence_off(s: State, old: cython.longlong, fresh: cython.longlong) -> cython.void:
    """The old top ends in fenceposts, so that nothing is ever merged across the gap up to granule `fresh`."""
    n: cython.longlong = s.head[old]
    gap: cython.longlong = old + n
    if n >= 2 * MIN_CHUNK:
        set_chunk(s, old, n - MIN_CHUNK, LIVE)
        set_chunk(s, gap - MIN_CHUNK, MIN_CHUNK, FENCE)
        s.prev[gap - MIN_CHUNK] = 0
    else:
        set_chunk(s, old, n, FENCE)
    if fresh > gap:
        set_chunk(s, gap, fresh - gap, FOREIGN)
        s.prev[gap] = 0
        s.foreign += fresh - gap


@cython.cfunc
def shift_heap(s: State, distance: cython.longlong) -> cython.void:
    """The heap turns out to begin `distance` bytes further up; only for a heap that has just been begun."""
    s.base += distance
    s.brk += distance


@cython.cfunc
@cython.inline
def heap_address(s: State) -> cython.longlong:
    """Where the heap starts; where it will, if it has not begun."""
    return address_of(s, FIRST) if s.top else s.brk
