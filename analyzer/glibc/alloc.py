"""malloc in an arena: which chunk serves a request. Rules: ../shared/specs/glibc-malloc.md §3.4 and §4.

Every function returns the granule of a chunk in use, FAILED (0), or MAPPED (-1).
"""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.bins import (
    bin_number,
    insert_large,
    insert_small,
    insert_unsorted,
    large_bin,
    take,
    unlink,
)
from heapledger.analyzer.glibc.chunk import State, size_for, wrapped_size
from heapledger.analyzer.glibc.constants import (
    FAILED,
    FROM_FASTBIN,
    FROM_TCACHE,
    HUGE,
    LIVE,
    MAPPED,
    MAX_UNSORTED_ITERATIONS,
    MIN_CHUNK,
    SMALL_LIMIT,
    TC_NONE,
    TC_READY,
    TCACHE_FIRST,
    TCACHE_SLOTS,
    TCACHE_STRUCT,
    UNSORTED,
)
from heapledger.analyzer.glibc.fastbin import consolidate, fastbin_take
from heapledger.analyzer.glibc.mmapped import map_chunk, wants_map
from heapledger.analyzer.glibc.tcache import tcache_fits, tcache_get, tcache_has_room, tcache_put
from heapledger.analyzer.glibc.top import cut_top, grow, growth_defeats_itself


@cython.cfunc
@cython.inline
def split(s: State, g: cython.longlong, n: cython.longlong) -> cython.bint:
    """Chunk g, just taken out of a bin, keeps n granules; a remainder that can be a chunk goes to the unsorted list."""
    size: cython.longlong = s.head[g]
    s.state[g] = LIVE
    if size - n < MIN_CHUNK:
        s.prev[g + size] = 0
        return False
    s.head[g] = n
    s.prev[g + n] = 0
    insert_unsorted(s, g + n, size - n)
    return True


@cython.cfunc
def small_take(s: State, n: cython.longlong) -> cython.longlong:
    """The oldest chunk of a small bin that is not empty; what is left moves to the tcache while there is room."""
    bin: cython.longlong = 2 * n
    g: cython.longlong = s.link[bin + 1]
    take(s, g)
    s.state[g] = LIVE
    more: cython.longlong = s.link[bin + 1]
    while more != bin and tcache_has_room(s, n):
        take(s, more)
        tcache_put(s, more, n)
        more = s.link[bin + 1]
    return g


@cython.cfunc
def unsorted_scan(s: State, n: cython.longlong) -> cython.longlong:
    """Sorts the unsorted list, oldest first, until something fits exactly. 0 where nothing did.

    Exact fits fill the tcache first and are served from there. A small request that finds only the rest of the
    last split is cut from that, so that runs of small requests lie together.
    """
    cached: cython.bint = False
    moved: cython.longlong = 0
    g: cython.longlong = s.link[UNSORTED + 1]
    while g != UNSORTED:
        size: cython.longlong = s.head[g]
        if n < SMALL_LIMIT and g == s.last_remainder and s.link[g + 1] == UNSORTED and size > n + MIN_CHUNK:
            unlink(s, g)
            split(s, g, n)
            s.last_remainder = g + n
            return g
        unlink(s, g)
        if size == n:
            s.prev[g + n] = 0
            if not tcache_has_room(s, n):
                s.state[g] = LIVE
                return g
            tcache_put(s, g, n)
            cached = True
        else:
            if size < SMALL_LIMIT:
                insert_small(s, g, size)
            else:
                insert_large(s, g, size)
            moved += 1
            if cached and s.tc_unsorted_limit > 0 and moved > s.tc_unsorted_limit:
                return tcache_get(s, n)
            if moved >= MAX_UNSORTED_ITERATIONS:
                break
        g = s.link[UNSORTED + 1]
    return tcache_get(s, n) if cached else FAILED


@cython.cfunc
def large_take(s: State, n: cython.longlong) -> cython.longlong:
    """The smallest chunk that fits, of the request's own large bin; the second of its size if there are two."""
    bin: cython.longlong = 2 * large_bin(n)
    g: cython.longlong = s.link[bin]
    if g == bin or s.head[g] < n:
        return FAILED
    g = s.link[g + 3]
    while s.head[g] < n:
        g = s.link[g + 3]
    if g != s.link[bin + 1] and s.head[g] == s.head[s.link[g]]:
        g = s.link[g]
    unlink(s, g)
    split(s, g, n)
    return g


@cython.cfunc
def larger_take(s: State, n: cython.longlong) -> cython.longlong:
    """The last chunk of the next bin up that holds any."""
    b: cython.longlong = bin_number(n) + 1
    block: cython.longlong = b >> 5
    one: cython.longlong = 1
    bits: cython.longlong = s.binmap[block] >> (b & 31) if block < 4 else 0
    while True:
        while bits == 0:
            block += 1
            if block >= 4:
                return FAILED
            bits = s.binmap[block]
            b = block << 5
        while bits & 1 == 0:
            bits >>= 1
            b += 1
        g: cython.longlong = s.link[2 * b + 1]
        if g != 2 * b:
            unlink(s, g)
            if split(s, g, n) and n < SMALL_LIMIT:
                s.last_remainder = g + n
            return g
        s.binmap[block] &= ~(one << (b & 31))
        bits &= ~one


@cython.cfunc
def sysmalloc_in_vain(s: State) -> cython.longlong:
    """Nothing can serve the request. But near 2**64 what malloc asks of the break wraps around: top grows all the
    same (before 2.30; later such requests do not get here)."""
    if s.wrapped != 0:
        grow(s, s.wrapped)
    s.unbacked = True
    return FAILED


@cython.cfunc
def sysmalloc(s: State, n: cython.longlong) -> cython.longlong:
    """Asks the system: a mapping of its own for a large request, else a larger top."""
    if n >= HUGE:
        return sysmalloc_in_vain(s)
    if wants_map(s, n):
        return FAILED if s.deny else map_chunk(s, n)
    if s.deny and not growth_defeats_itself(s, n):
        return FAILED
    return grow(s, n)


@cython.cfunc
def int_malloc(s: State, n: cython.longlong) -> cython.longlong:
    """A chunk of n granules or a little more, from the first of malloc's places that has one."""
    if n <= s.max_fast and s.fast[n] != 0:
        s.source = FROM_FASTBIN
        return fastbin_take(s, n)
    if n < SMALL_LIMIT:
        if s.link[2 * n + 1] != 2 * n:
            return small_take(s, n)
    elif s.have_fast:
        consolidate(s)
    g: cython.longlong
    while True:
        if s.link[UNSORTED + 1] != UNSORTED:
            g = unsorted_scan(s, n)
            if g != 0:
                return g
        if n >= SMALL_LIMIT:
            g = large_take(s, n)
            if g != 0:
                return g
        g = larger_take(s, n)
        if g != 0:
            return g
        if s.top != 0 and s.head[s.top] >= n + MIN_CHUNK:
            return cut_top(s, n)
        if not s.have_fast:
            return sysmalloc(s, n)
        consolidate(s)


@cython.cfunc
def tcache_init(s: State) -> cython.void:
    """The thread's tcache comes to be: its heads are themselves a chunk, allocated before the block that was asked for.

    A thread of another arena has them there, which is not modelled.
    """
    s.tc_ready[s.slot] = TC_READY
    if s.tc_other[s.slot] == 0:
        deny: cython.bint = s.deny
        s.deny = False
        g: cython.longlong = int_malloc(s, s.tc_struct_size)
        s.deny = deny
        if g > 0:
            s.state[g] = TCACHE_STRUCT
            s.tc_struct[s.slot] = g
        elif g == MAPPED:
            s.mapped_bytes += s.map_length
    s.tc = s.slot * TCACHE_SLOTS


@cython.cfunc
@cython.inline
def tcache_maybe_init(s: State) -> cython.void:
    """glibc's MAYBE_INIT_TCACHE."""
    if s.tc < 0 and s.slot >= 0 and s.tc_ready[s.slot] == TC_NONE:
        tcache_init(s)


@cython.cfunc
@cython.inline
def malloc_request(s: State, request: cython.longlong, cached: cython.bint) -> cython.longlong:
    """malloc of `request` bytes; `cached` says whether the tcache may serve it (calloc did not until 2.41)."""
    n: cython.longlong = size_for(s, request)
    if n == 0:
        return FAILED
    s.wrapped = wrapped_size(request)
    if s.tc < 0 and (not s.tc_lazy or n - TCACHE_FIRST < s.tc_bins):
        tcache_maybe_init(s)
    if cached and tcache_fits(s, n) and s.tc_count[s.tc + n - TCACHE_FIRST] > 0:
        s.source = FROM_TCACHE
        return tcache_get(s, n)
    return int_malloc(s, n)
