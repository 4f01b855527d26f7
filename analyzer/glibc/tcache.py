"""A thread's cache of freed chunks: 64 singly linked lists, newest first, with a bound on each.

Chunks in it look in use to their neighbours. Rules: ../shared/specs/glibc-malloc.md §3.
"""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.chunk import State, lengthened
from heapledger.analyzer.glibc.constants import (
    LIVE,
    MAX_THREADS,
    TC_READY,
    TCACHE,
    TCACHE_FIRST,
    TCACHE_SLOTS,
)


@cython.cfunc
@cython.inline
def tcache_fits(s: State, n: cython.longlong) -> cython.bint:
    """Whether the current thread has a tcache with a bin for chunks of n granules."""
    return s.tc >= 0 and n - TCACHE_FIRST < s.tc_bins


@cython.cfunc
@cython.inline
def tcache_has_room(s: State, n: cython.longlong) -> cython.bint:
    """Whether a chunk of n granules can be put."""
    return s.tc >= 0 and n - TCACHE_FIRST < s.tc_bins and s.tc_count[s.tc + n - TCACHE_FIRST] < s.tc_limit


@cython.cfunc
@cython.inline
def tcache_put(s: State, g: cython.longlong, n: cython.longlong) -> cython.void:
    """Chunk g of n granules goes to the head of its bin."""
    i: cython.longlong = s.tc + n - TCACHE_FIRST
    s.link[g] = s.tc_head[i]
    s.tc_head[i] = g
    s.tc_count[i] += 1
    s.state[g] = TCACHE
    s.cached += n


@cython.cfunc
@cython.inline
def tcache_get(s: State, n: cython.longlong) -> cython.longlong:
    """The newest chunk of n granules, which must exist."""
    i: cython.longlong = s.tc + n - TCACHE_FIRST
    g: cython.longlong = s.tc_head[i]
    s.tc_head[i] = s.link[g]
    s.tc_count[i] -= 1
    s.state[g] = LIVE
    s.cached -= n
    return g


@cython.cfunc
def tcache_unlink(s: State, i: cython.longlong, g: cython.longlong) -> cython.bint:
    """Takes chunk g out of the middle of the list at index i. False where it is not there."""
    p: cython.longlong = s.tc_head[i]
    before: cython.longlong = 0
    while p != 0 and p != g:
        before = p
        p = s.link[p]
    if p == 0:
        return False
    if before == 0:
        s.tc_head[i] = s.link[g]
    else:
        s.link[before] = s.link[g]
    s.tc_count[i] -= 1
    s.cached -= s.head[g]
    s.state[g] = LIVE
    return True


@cython.cfunc
def switch_thread(s: State, thread: cython.longlong) -> cython.void:
    """The event under way is this thread's."""
    s.thread = thread
    if thread < 0 or thread >= MAX_THREADS:
        s.slot = -1
        s.tc = -1
        return
    if thread >= s.tc_slots:
        threads_grow(s, thread)
    s.slot = thread
    s.tc = thread * TCACHE_SLOTS if s.tc_ready[thread] == TC_READY else -1


def threads_grow(s: State, thread: int) -> None:
    """Makes room for a thread of this number."""
    slots = min(MAX_THREADS, max(thread + 1, 2 * s.tc_slots))
    s.tc_head = lengthened(s.tc_head, TCACHE_SLOTS * slots)
    s.tc_count = lengthened(s.tc_count, TCACHE_SLOTS * slots)
    s.tc_ready = lengthened(s.tc_ready, slots)
    s.tc_struct = lengthened(s.tc_struct, slots)
    s.tc_other = lengthened(s.tc_other, slots)
    s.tc_slots = slots
