"""realloc: in place, into what follows, by mremap, or allocate, copy and free. Rules:
../shared/specs/glibc-malloc.md §9."""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.alloc import int_malloc, tcache_maybe_init
from heapledger.analyzer.glibc.bins import unlink
from heapledger.analyzer.glibc.chunk import State, note, set_chunk, set_top, size_for, wrapped_size
from heapledger.analyzer.glibc.constants import (
    ADDRESS_LIMIT_BYTES,
    FAILED,
    FITS_16,
    FITS_TRIM_THRESHOLD,
    FREE,
    GRANULE_BYTES,
    LIVE,
    MIN_CHUNK,
    SYS_MREMAP,
)
from heapledger.analyzer.glibc.free import free_inside
from heapledger.analyzer.glibc.mmapped import block_lead


@cython.cfunc
@cython.inline
def fits_already(s: State, usable: cython.longlong, request: cython.longlong, mapped: cython.bint) -> cython.bint:
    """Whether realloc returns the block as it is, before it looks any further (2.37 on)."""
    if request < 0 or request > usable:
        return False
    slack: cython.longlong = usable - request
    if s.realloc_fits == FITS_TRIM_THRESHOLD:
        return slack <= s.trim_threshold
    if s.realloc_fits == FITS_16:
        return slack < 16 or (mapped and slack <= s.page)
    return False


@cython.cfunc
def realloc_chunk(s: State, g: cython.longlong, request: cython.longlong) -> cython.longlong:
    """Resizes a heap chunk; the granule of the result, FAILED (the old one stays) or MAPPED (the old one is free)."""
    if fits_already(s, s.head[g] * GRANULE_BYTES - 8, request, False):
        return g
    if not s.tc_lazy:
        tcache_maybe_init(s)
    n: cython.longlong = size_for(s, request)
    # Padded, the last few requests up to PTRDIFF_MAX exceed it: refused before malloc looks for anything.
    if n == 0 or (s.strict_limit and request >= 0x7FFFFFFFFFFFFFF9):
        return FAILED
    s.wrapped = wrapped_size(request)
    old: cython.longlong = s.head[g]
    after: cython.longlong = g + old
    if old < n:
        if after == s.top and old + s.head[after] >= n + MIN_CHUNK:
            size: cython.longlong = old + s.head[after]
            s.state[after] = 0
            set_chunk(s, g, n, LIVE)
            set_top(s, g + n, size - n)
            return g
        if s.state[after] == FREE and old + s.head[after] >= n:
            unlink(s, after)
            absorb(s, g, after)
        else:
            moved: cython.longlong = int_malloc(s, n)
            if moved == FAILED:
                return FAILED
            if moved != after:
                free_inside(s, g)
                return moved
            absorb(s, g, after)
    shrink(s, g, n)
    return g


@cython.cfunc
@cython.inline
def absorb(s: State, g: cython.longlong, after: cython.longlong) -> cython.void:
    """The chunk behind g, in no list any more, becomes part of it."""
    n: cython.longlong = s.head[g] + s.head[after]
    s.state[after] = 0
    s.head[g] = n
    s.prev[g + n] = 0


@cython.cfunc
@cython.inline
def shrink(s: State, g: cython.longlong, n: cython.longlong) -> cython.void:
    """Chunk g keeps n granules; a tail that can be a chunk is freed."""
    size: cython.longlong = s.head[g]
    if size - n >= MIN_CHUNK:
        s.head[g] = n
        set_chunk(s, g + n, size - n, LIVE)
        s.prev[g + n] = 0
        free_inside(s, g + n)


@cython.cfunc
def remap_length(s: State, i: cython.longlong, request: cython.longlong) -> cython.longlong:
    """New length of the mapping of the block at table index i; the old one where it stays; FAILED where refused."""
    length: cython.longlong = s.b_length[i]
    lead: cython.longlong = block_lead(s, i)
    if fits_already(s, length - lead - 16, request, True):
        return length
    n: cython.longlong = size_for(s, request)
    if n == 0 or n * GRANULE_BYTES >= ADDRESS_LIMIT_BYTES:
        return FAILED
    fresh: cython.longlong = (n * GRANULE_BYTES + lead + 8 + s.page - 1) & -s.page
    if fresh != length and not s.deny:
        note(s, SYS_MREMAP, fresh)
    return fresh
