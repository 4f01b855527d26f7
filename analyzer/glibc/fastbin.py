"""Fastbins: one list per small size, newest first; their chunks are merged only when malloc consolidates.

Chunks in them look in use to their neighbours. Rules: ../shared/specs/glibc-malloc.md §2 and §5.
"""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.bins import insert_unsorted, unlink
from heapledger.analyzer.glibc.chunk import State, set_top
from heapledger.analyzer.glibc.constants import FAST_SLOTS, FASTBIN, FREE, LIVE, MIN_CHUNK
from heapledger.analyzer.glibc.tcache import tcache_has_room, tcache_put


@cython.cfunc
@cython.inline
def fastbin_put(s: State, g: cython.longlong, n: cython.longlong) -> cython.void:
    """Chunk g of n granules goes to the head of its fastbin."""
    s.have_fast = True
    s.link[g] = s.fast[n]
    s.fast[n] = g
    s.state[g] = FASTBIN
    s.cached += n


@cython.cfunc
@cython.inline
def fastbin_pop(s: State, n: cython.longlong) -> cython.longlong:
    """The newest chunk of n granules, which must exist."""
    g: cython.longlong = s.fast[n]
    s.fast[n] = s.link[g]
    s.state[g] = LIVE
    s.cached -= n
    return g


@cython.cfunc
def fastbin_take(s: State, n: cython.longlong) -> cython.longlong:
    """Serves a request from a fastbin, and moves what is left of it to the tcache, which reverses the order."""
    g: cython.longlong = fastbin_pop(s, n)
    while s.fast[n] != 0 and tcache_has_room(s, n):
        tcache_put(s, fastbin_pop(s, n), n)
    return g


@cython.cfunc
def fastbin_unlink(s: State, g: cython.longlong) -> cython.bint:
    """Takes chunk g out of the middle of its fastbin. False where it is not there."""
    n: cython.longlong = s.head[g]
    p: cython.longlong = s.fast[n]
    before: cython.longlong = 0
    while p != 0 and p != g:
        before = p
        p = s.link[p]
    if p == 0:
        return False
    if before == 0:
        s.fast[n] = s.link[g]
    else:
        s.link[before] = s.link[g]
    s.state[g] = LIVE
    s.cached -= n
    return True


@cython.cfunc
@cython.inline
def merge_back(s: State, g: cython.longlong) -> cython.longlong:
    """If the chunk before g is free, takes it out of its bin and joins the two; returns where the chunk starts now.

    Only head is valid afterwards: the caller says what the chunk is.
    """
    before: cython.longlong = s.prev[g]
    if before == 0:
        return g
    n: cython.longlong = s.head[g]
    s.state[g] = 0
    g -= before
    unlink(s, g)
    s.head[g] = n + before
    return g


@cython.cfunc
@cython.inline
def merge_forward(s: State, g: cython.longlong) -> cython.longlong:
    """If the chunk after g is free, joins it to g. Returns the size of the result; head is up to date."""
    n: cython.longlong = s.head[g]
    after: cython.longlong = g + n
    if s.state[after] == FREE:
        unlink(s, after)
        s.state[after] = 0
        n += s.head[after]
        s.head[g] = n
    return n


@cython.cfunc
@cython.inline
def join_top(s: State, g: cython.longlong) -> cython.longlong:
    """The chunk at g, which borders top, becomes top's beginning. Returns top's size."""
    n: cython.longlong = s.head[g] + s.head[s.top]
    s.state[s.top] = 0
    set_top(s, g, n)
    return n


@cython.cfunc
def consolidate(s: State) -> cython.void:
    """Merges every fastbin chunk with its neighbours: sizes ascending, each list from its head, into unsorted or
    top."""
    s.have_fast = False
    n: cython.longlong = MIN_CHUNK
    while n < FAST_SLOTS:
        while s.fast[n] != 0:
            g: cython.longlong = merge_back(s, fastbin_pop(s, n))
            if g + s.head[g] == s.top:
                join_top(s, g)
            else:
                insert_unsorted(s, g, merge_forward(s, g))
        n += 1
