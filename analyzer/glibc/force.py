"""Where the observation contradicts the prediction: the observed block is adopted, the predicted one given back.

The ladder of ../shared/specs/glibc-malloc.md §13: an unknown base is adopted; a break that somebody else moved
becomes a gap with fenceposts; anything else is forced: whatever the model had at the observed place makes room.
All of it is safe on nonsense: no address or size is believed before it is checked against the heap's limits.
"""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.bins import insert_unsorted, take
from heapledger.analyzer.glibc.blocks import block_add
from heapledger.analyzer.glibc.chunk import (
    State,
    address_of,
    drop_live,
    make_live,
    set_chunk,
    set_top,
    size_for,
    top_end,
)
from heapledger.analyzer.glibc.constants import (
    ADDRESS_LIMIT_BYTES,
    BLOCK_ADOPTED,
    BLOCK_MAPPED,
    FASTBIN,
    FENCE,
    FIRST,
    FOREIGN,
    FREE,
    FROM_FASTBIN,
    FROM_TCACHE,
    GRANULE_BYTES,
    KIND_CALLOC,
    LIVE,
    MAX_EXAMPLES,
    MIN_CHUNK,
    REACH_BYTES,
    TCACHE,
    TCACHE_FIRST,
    TCACHE_SLOTS,
    TCACHE_STRUCT,
    TOP,
)
from heapledger.analyzer.glibc.fastbin import fastbin_put, fastbin_unlink, join_top, merge_back, merge_forward
from heapledger.analyzer.glibc.shadow import reserve
from heapledger.analyzer.glibc.tcache import tcache_put, tcache_unlink
from heapledger.analyzer.glibc.top import grow, shift_heap


@cython.cfunc
def count_forced(s: State, expected: cython.longlong, observed: cython.longlong, why: cython.longlong) -> cython.void:
    """One more forced event, counted by its reason; the first hundred are kept as examples."""
    s.forced += 1
    s.why[why] += 1
    if len(s.examples) < MAX_EXAMPLES:
        s.examples.append((s.seq, s.kind, expected, observed, why))


@cython.cfunc
def free_quietly(s: State, g: cython.longlong) -> cython.void:
    """The chunk at g, in no list, becomes free or part of top; nothing else happens."""
    g = merge_back(s, g)
    if g + s.head[g] == s.top:
        join_top(s, g)
    else:
        insert_unsorted(s, g, merge_forward(s, g))


@cython.cfunc
def give_back(s: State, g: cython.longlong) -> cython.void:
    """The predicted chunk was not the one handed out: back to where it came from."""
    n: cython.longlong = s.head[g]
    if s.source == FROM_TCACHE and s.tc >= 0 and n - TCACHE_FIRST < TCACHE_SLOTS:
        tcache_put(s, g, n)
    elif s.source == FROM_FASTBIN and n <= s.max_fast:
        fastbin_put(s, g, n)
    else:
        free_quietly(s, g)


@cython.cfunc
def forget_struct(s: State, g: cython.longlong) -> cython.void:
    """The thread whose tcache heads were thought to be at g has them elsewhere: its end frees nothing here."""
    slot: cython.longlong = 0
    while slot < s.tc_slots:
        if s.tc_struct[slot] == g:
            s.tc_struct[slot] = 0
        slot += 1


@cython.cfunc
def detach(s: State, g: cython.longlong) -> cython.bint:
    """The chunk at g leaves whatever it is in. True where it was live: a release that was never seen."""
    state: cython.longlong = s.state[g]
    n: cython.longlong = s.head[g]
    if state == FREE:
        take(s, g)
    elif state == TCACHE:
        slot: cython.longlong = 0
        while slot < s.tc_slots and not tcache_unlink(s, TCACHE_SLOTS * slot + n - TCACHE_FIRST, g):
            slot += 1
    elif state == FASTBIN:
        fastbin_unlink(s, g)
    elif state == FOREIGN:
        s.foreign -= n
    elif state == TCACHE_STRUCT:
        forget_struct(s, g)
    elif state == LIVE:
        drop_live(s, g)
        return True
    return False


@cython.cfunc
def chunk_around(s: State, g: cython.longlong) -> cython.longlong:
    """The chunk that granule g lies in. Costs its distance from the chunk's start."""
    if g >= s.top:
        return s.top
    while s.state[g] == 0:
        g -= 1
    return g


@cython.cfunc
def extend_to(s: State, end: cython.longlong) -> cython.bint:
    """Makes top reach beyond granule `end` by a minimal chunk and up to a page. False where the model may not."""
    goal: cython.longlong = (address_of(s, end + MIN_CHUNK) + s.page - 1) & -s.page
    have: cython.longlong = top_end(s)
    if goal <= have:
        return True
    if not reserve(s, FIRST + ((goal - s.base) >> 4)):
        return False
    set_top(s, s.top, s.head[s.top] + ((goal - have) >> 4))
    if s.brk < goal:
        s.brk = goal
    return True


@cython.cfunc
def carve(s: State, g: cython.longlong, n: cython.longlong) -> cython.longlong:
    """[g, g + n) becomes one chunk in use. Returns 0 where that cannot be, 2 where something live was in the way,
    else 1.

    Everything it touches is taken out of its list; what is left over in front and behind becomes free again.
    """
    if g < FIRST or n < MIN_CHUNK or s.top == 0 or not extend_to(s, g + n):
        return 0
    result: cython.longlong = 1
    start: cython.longlong = chunk_around(s, g)
    before: cython.longlong = s.prev[start]
    end: cython.longlong = start
    while end < g + n:
        size: cython.longlong = s.head[end]
        if s.state[end] != TOP and detach(s, end):
            result = 2
        s.state[end] = 0
        end += size
    s.prev[start] = before
    at_top: cython.bint = end > s.top
    if at_top:
        set_top(s, g + n, end - g - n)
    else:
        s.prev[end] = 0
    set_chunk(s, g, n, LIVE)
    s.prev[g] = before if start == g else 0
    if g > start:
        leave(s, start, g - start)
    if not at_top and end > g + n:
        s.prev[g + n] = 0
        leave(s, g + n, end - g - n)
    return result


@cython.cfunc
def leave(s: State, g: cython.longlong, n: cython.longlong) -> cython.void:
    """What a carving left over: free where it can be a chunk."""
    set_chunk(s, g, n, FENCE)
    if n >= MIN_CHUNK:
        free_quietly(s, g)


@cython.cfunc
def carve_size(s: State, request: cython.longlong, word: cython.longlong) -> cython.longlong:
    """Granules of an observed chunk: as its word says, if there is one; else as the request needs."""
    n: cython.longlong = (word & 0x7FFFFFFFFFFFFFF8) >> 4
    return n if n >= MIN_CHUNK else size_for(s, request)


@cython.cfunc
def in_reach(s: State, address: cython.longlong) -> cython.bint:
    """Whether a user address can be a chunk of the heap, as it is or a little larger."""
    start: cython.longlong = address - 16
    if s.top == 0 or address & 15 or start < s.base:
        return False
    return start < top_end(s) + REACH_BYTES


@cython.cfunc
def adopt(s: State, address: cython.longlong, request: cython.longlong, word: cython.longlong) -> cython.bint:
    """The block at a user address is live, whatever the model thinks. True where something live was in its way."""
    result: cython.longlong = 0
    if word & 6 == 0 and in_reach(s, address):
        g: cython.longlong = FIRST + ((address - 16 - s.base) >> 4)
        result = carve(s, g, carve_size(s, request, word))
        if result != 0:
            make_live(s, g, request)
            return result == 2
    if request < 0 or request > ADDRESS_LIMIT_BYTES:
        request = 0
    size: cython.longlong = word & 0x7FFFFFFFFFF8
    if address < s.page or address > ADDRESS_LIMIT_BYTES:
        return not block_add(s, address, address, size, request, BLOCK_ADOPTED)
    if word & 2:
        base: cython.longlong = (address - 16) & -s.page
        length: cython.longlong = (address - 16 - base + size + s.page - 1) & -s.page
        s.n_mmaps += 1
        return not block_add(s, address, base, length, request, BLOCK_MAPPED)
    if size == 0:
        size = size_for(s, request) * GRANULE_BYTES
    return not block_add(s, address, address - 16, size, request, BLOCK_ADOPTED)


@cython.cfunc
def adopt_base(s: State, g: cython.longlong, observed: cython.longlong) -> cython.longlong:
    """Where the heap begins was not known: the first chunk seen in it tells. g, or 0 where its page offset is wrong."""
    s.base_known = True
    if observed < s.page or observed > ADDRESS_LIMIT_BYTES:
        return 0
    distance: cython.longlong = observed - 16 - address_of(s, g)
    shift_heap(s, distance & -s.page)
    return g if distance & (s.page - 1) == 0 else 0


@cython.cfunc
def retry_apart(s: State, g: cython.longlong, observed: cython.longlong) -> cython.longlong:
    """If the heap grew in this event, tries whether a break moved by others explains the address. The granule, or 0.

    g is the chunk that was cut from the grown top, and nothing has happened since.
    """
    start: cython.longlong = observed - 16
    if s.grew == 0 or s.kind > KIND_CALLOC or observed & 15 or g + s.head[g] != s.top or start < s.base:
        return 0
    if s.old_top == 0:
        distance: cython.longlong = start - address_of(s, g)
        if distance <= 0 or distance > REACH_BYTES or distance & (s.page - 1):
            return 0
        shift_heap(s, distance)
        return g
    if s.old_top != g or start <= s.brk - s.grew or start > s.brk + REACH_BYTES:
        return 0
    n: cython.longlong = s.head[g]
    old: cython.longlong = n + s.head[s.top] - (s.grew >> 4)
    s.state[s.top] = 0
    set_top(s, g, old)
    s.brk = start
    s.syscalls -= 1
    if s.log is not None:
        s.log.pop()
    moved: cython.longlong = grow(s, n)
    return moved if moved > 0 and address_of(s, moved) == start else 0
