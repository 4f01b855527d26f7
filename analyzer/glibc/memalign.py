"""memalign and its family: a larger chunk, with what is in front of and behind the aligned spot given back.

Rules: ../shared/specs/glibc-malloc.md §10.
"""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.alloc import int_malloc, malloc_request, tcache_maybe_init
from heapledger.analyzer.glibc.chunk import State, address_of, set_chunk, size_for, wrapped_size
from heapledger.analyzer.glibc.constants import (
    ADDRESS_LIMIT_BYTES,
    FAILED,
    FREE,
    FROM_ARENA,
    FROM_TCACHE,
    GRANULE_BYTES,
    HUGE,
    LIVE,
    MAPPED,
    MIN_BYTES,
    MIN_CHUNK,
    PTRDIFF_MAX,
    REFUSED_FROM,
    TAIL_FREE,
    TCACHE_FIRST,
)
from heapledger.analyzer.glibc.free import after_merge, create_free, free_inside, free_merging
from heapledger.analyzer.glibc.tcache import tcache_fits, tcache_unlink


@cython.cfunc
def round_alignment(alignment: cython.longlong) -> cython.longlong:
    """The power of two that glibc aligns to; 0 where it refuses (beyond 2**63, read as negative)."""
    if alignment < 0:
        return 0
    power: cython.longlong = MIN_BYTES
    while power < alignment:
        if power > 0x2000000000000000:
            return 0
        power <<= 1
    return power


@cython.cfunc
def tcache_aligned(s: State, n: cython.longlong, alignment: cython.longlong) -> cython.longlong:
    """The newest tcache chunk of n granules that happens to be aligned; 0 where none is."""
    if not tcache_fits(s, n):
        return FAILED
    i: cython.longlong = s.tc + n - TCACHE_FIRST
    g: cython.longlong = s.tc_head[i]
    while g != 0 and (address_of(s, g) + 16) & (alignment - 1):
        g = s.link[g]
    if g != 0:
        tcache_unlink(s, i, g)
        s.source = FROM_TCACHE
    return g


@cython.cfunc
def memalign_request(s: State, wanted: cython.longlong, request: cython.longlong) -> cython.longlong:
    """memalign; wanted is the alignment in bytes as the program gave it."""
    if wanted >= 0 and wanted <= GRANULE_BYTES:
        return malloc_request(s, request, True)
    alignment: cython.longlong = round_alignment(wanted)
    n: cython.longlong = size_for(s, request)
    if alignment == 0 or n == 0:
        return FAILED
    if s.tc_lazy and n - TCACHE_FIRST < s.tc_bins:
        tcache_maybe_init(s)
    g: cython.longlong
    if s.memalign_tcache:
        g = tcache_aligned(s, n, alignment)
        if g != 0:
            return g
    # Room for the padding has to be within PTRDIFF_MAX, else it is refused before malloc looks for anything.
    room: cython.longlong = PTRDIFF_MAX - alignment - MIN_BYTES
    if s.strict_limit and request >= (room & -16) - 7:
        return FAILED
    s.wrapped = 0
    if request < 0:
        # Before 2.30: refused where the padding makes it wrap around, or too large for any glibc.
        needed: cython.longlong = ((request + 23) & -16) + alignment + MIN_BYTES
        if needed >= REFUSED_FROM:
            return FAILED
        s.wrapped = wrapped_size(needed)
    padded: cython.longlong = HUGE
    if alignment < ADDRESS_LIMIT_BYTES and n < HUGE:
        padded = size_for(s, n * GRANULE_BYTES + alignment + MIN_BYTES)
    g = int_malloc(s, padded)
    if g == MAPPED:
        s.map_lead = mapped_lead(s, alignment)
    if g <= 0:
        return g
    s.source = FROM_ARENA
    g = give_front(s, g, alignment)
    give_tail(s, g, n)
    return g


@cython.cfunc
def mapped_lead(s: State, alignment: cython.longlong) -> cython.longlong:
    """Bytes from the base of a mapping to the aligned chunk in it, at least 32.

    Beyond a page it depends on where the mapping is: the size in the word at p-8 tells.
    """
    if alignment <= s.page:
        return alignment - 16 if alignment >= 48 else alignment + 16
    if s.observed_word != 0:
        return s.map_length - (s.observed_word & -8)
    return s.page - 16


@cython.cfunc
def give_front(s: State, g: cython.longlong, alignment: cython.longlong) -> cython.longlong:
    """Frees what lies before the first aligned spot that leaves room for a chunk; returns the aligned chunk."""
    user: cython.longlong = address_of(s, g) + 16
    if user & (alignment - 1) == 0:
        return g
    lead: cython.longlong = ((user + alignment - 1) & -alignment) - user
    if lead < MIN_BYTES:
        lead += alignment
    n: cython.longlong = lead >> 4
    spot: cython.longlong = g + n
    set_chunk(s, spot, s.head[g] - n, LIVE)
    s.prev[spot] = 0
    s.head[g] = n
    if s.memalign_front_merges:
        free_merging(s, g)
    else:
        free_inside(s, g)
    return spot


@cython.cfunc
def give_tail(s: State, g: cython.longlong, n: cython.longlong) -> cython.void:
    """Frees what is more than n granules."""
    spare: cython.longlong = s.head[g] - n
    tail: cython.longlong = g + n
    if s.memalign_tail == TAIL_FREE:
        if spare > MIN_CHUNK:
            s.head[g] = n
            set_chunk(s, tail, spare, LIVE)
            s.prev[tail] = 0
            free_inside(s, tail)
        return
    after: cython.longlong = tail + spare
    if spare >= MIN_CHUNK or (spare > 0 and (after == s.top or s.state[after] == FREE)):
        s.head[g] = n
        set_chunk(s, tail, spare, LIVE)
        s.prev[tail] = 0
        after_merge(s, create_free(s, tail))
