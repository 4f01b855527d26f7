"""free into an arena: tcache, fastbin, or merged with free neighbours. Rules: ../shared/specs/glibc-malloc.md §5."""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.bins import insert_small, insert_unsorted
from heapledger.analyzer.glibc.chunk import State
from heapledger.analyzer.glibc.constants import CONSOLIDATION_SIZE, GRANULE_BYTES, SMALL_LIMIT
from heapledger.analyzer.glibc.fastbin import consolidate, fastbin_put, join_top, merge_back, merge_forward
from heapledger.analyzer.glibc.tcache import tcache_has_room, tcache_put
from heapledger.analyzer.glibc.trim import trim_top


@cython.cfunc
@cython.inline
def create_free(s: State, g: cython.longlong) -> cython.longlong:
    """The chunk at g, whose predecessor is in use, becomes free: joined with what follows it, then put in its list.

    Returns the size of the result, top's where it became part of top.
    """
    if g + s.head[g] == s.top:
        return join_top(s, g)
    n: cython.longlong = merge_forward(s, g)
    if s.small_to_own_bin and n < SMALL_LIMIT:
        insert_small(s, g, n)
    else:
        insert_unsorted(s, g, n)
    return n


@cython.cfunc
@cython.inline
def after_merge(s: State, n: cython.longlong) -> cython.void:
    """A free chunk of 64 KiB or more came about: fastbins are consolidated, and top trimmed if it grew too large."""
    if n >= CONSOLIDATION_SIZE:
        if s.have_fast:
            consolidate(s)
        if s.head[s.top] * GRANULE_BYTES >= s.trim_threshold:
            trim_top(s, s.top_pad)


@cython.cfunc
@cython.inline
def free_merging(s: State, g: cython.longlong) -> cython.void:
    """Frees the chunk at g with all its consequences, but never into a cache."""
    after_merge(s, create_free(s, merge_back(s, g)))


@cython.cfunc
@cython.inline
def free_to_arena(s: State, g: cython.longlong) -> cython.void:
    """Frees the chunk at g, passing by the tcache."""
    n: cython.longlong = s.head[g]
    if n <= s.max_fast:
        fastbin_put(s, g, n)
    else:
        free_merging(s, g)


@cython.cfunc
@cython.inline
def free_chunk(s: State, g: cython.longlong) -> cython.void:
    """Frees the chunk at g as the program's own free does."""
    n: cython.longlong = s.head[g]
    if tcache_has_room(s, n):
        tcache_put(s, g, n)
    else:
        free_to_arena(s, g)


@cython.cfunc
def free_inside(s: State, g: cython.longlong) -> cython.void:
    """Frees a chunk that malloc itself has left over (until 2.41 it may enter the tcache)."""
    if s.internal_tcache:
        free_chunk(s, g)
    else:
        free_to_arena(s, g)
