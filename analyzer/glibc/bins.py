"""The bins of an arena: unsorted, small (one size each), large (by descending size).

A list's head is a granule of the link array in front of the chunks, so that heads and chunks link alike, as
glibc's bin_at trick does. Rules: ../shared/specs/glibc-malloc.md §2.
"""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.chunk import State
from heapledger.analyzer.glibc.constants import FREE, SMALL_LIMIT, UNSORTED


@cython.cfunc
@cython.inline
def large_bin(n: cython.longlong) -> cython.longlong:
    """Number of the bin for a large chunk of n granules: spacing of 64, 512, 4 Ki, 32 Ki, 256 KiB bytes, then one."""
    if n >> 2 <= 48:
        return 48 + (n >> 2)
    if n >> 5 <= 20:
        return 91 + (n >> 5)
    if n >> 8 <= 10:
        return 110 + (n >> 8)
    if n >> 11 <= 4:
        return 119 + (n >> 11)
    if n >> 14 <= 2:
        return 124 + (n >> 14)
    return 126


@cython.cfunc
@cython.inline
def bin_number(n: cython.longlong) -> cython.longlong:
    """Number of the bin for a chunk of n granules."""
    return n if n < SMALL_LIMIT else large_bin(n)


@cython.cfunc
@cython.inline
def link_between(s: State, g: cython.longlong, before: cython.longlong, after: cython.longlong) -> cython.void:
    """Puts chunk g between two neighbours of a list."""
    s.link[g] = after
    s.link[g + 1] = before
    s.link[before] = g
    s.link[after + 1] = g


@cython.cfunc
@cython.inline
def mark_free(s: State, g: cython.longlong, n: cython.longlong) -> cython.void:
    """Chunk g of n granules is free, and its successor knows it."""
    s.head[g] = n
    s.state[g] = FREE
    s.prev[g + n] = n
    s.hole += n


@cython.cfunc
@cython.inline
def insert_unsorted(s: State, g: cython.longlong, n: cython.longlong) -> cython.void:
    """A free chunk goes to the head of the unsorted list."""
    mark_free(s, g, n)
    if n >= SMALL_LIMIT:
        s.link[g + 2] = 0
        s.link[g + 3] = 0
    link_between(s, g, UNSORTED, s.link[UNSORTED])


@cython.cfunc
@cython.inline
def mark_bin(s: State, b: cython.longlong) -> cython.void:
    """Bin b may hold something; the mark is cleared lazily, by the search."""
    bit: cython.longlong = 1  # a literal alone would be a C int, and 1 << 31 negative
    s.binmap[b >> 5] |= bit << (b & 31)


@cython.cfunc
@cython.inline
def insert_small(s: State, g: cython.longlong, n: cython.longlong) -> cython.void:
    """A free chunk goes to the head of its small bin."""
    mark_free(s, g, n)
    mark_bin(s, n)
    link_between(s, g, 2 * n, s.link[2 * n])


@cython.cfunc
def insert_large(s: State, g: cython.longlong, n: cython.longlong) -> cython.void:
    """A free chunk goes to its place in its large bin: behind the first of its size, if there is one."""
    mark_free(s, g, n)
    b: cython.longlong = large_bin(n)
    mark_bin(s, b)
    bin: cython.longlong = 2 * b
    after: cython.longlong = s.link[bin]
    if after == bin:
        s.link[g + 2] = g
        s.link[g + 3] = g
    elif n < s.head[s.link[bin + 1]]:
        link_size(s, g, after)
        after = bin
    else:
        while n < s.head[after]:
            after = s.link[after + 2]
        if n == s.head[after]:
            s.link[g + 2] = 0
            s.link[g + 3] = 0
            after = s.link[after]
        else:
            link_size(s, g, after)
    link_between(s, g, s.link[after + 1], after)


@cython.cfunc
@cython.inline
def link_size(s: State, g: cython.longlong, after: cython.longlong) -> cython.void:
    """Chunk g is the first of its size and comes before `after` in the ring of sizes."""
    before: cython.longlong = s.link[after + 3]
    s.link[g + 2] = after
    s.link[g + 3] = before
    s.link[after + 3] = g
    s.link[before + 2] = g


@cython.cfunc
@cython.inline
def unlink(s: State, g: cython.longlong) -> cython.void:
    """Takes a free chunk out of whatever bin it is in. Its neighbours still think it free."""
    n: cython.longlong = s.head[g]
    after: cython.longlong = s.link[g]
    before: cython.longlong = s.link[g + 1]
    s.link[before] = after
    s.link[after + 1] = before
    s.hole -= n
    if n >= SMALL_LIMIT and s.link[g + 2] != 0:
        unlink_size(s, g, after)


@cython.cfunc
def unlink_size(s: State, g: cython.longlong, after: cython.longlong) -> cython.void:
    """The first of a size leaves its large bin: the next of that size, if any, takes its place in the ring."""
    up: cython.longlong = s.link[g + 3]
    down: cython.longlong = s.link[g + 2]
    if after >= 256 and s.link[after + 2] == 0:
        if down == g:
            s.link[after + 2] = after
            s.link[after + 3] = after
        else:
            s.link[after + 2] = down
            s.link[after + 3] = up
            s.link[down + 3] = after
            s.link[up + 2] = after
    else:
        s.link[down + 3] = up
        s.link[up + 2] = down


@cython.cfunc
@cython.inline
def take(s: State, g: cython.longlong) -> cython.void:
    """A free chunk leaves its bin to be used: its successor sees it in use."""
    unlink(s, g)
    s.prev[g + s.head[g]] = 0
