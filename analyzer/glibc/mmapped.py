"""Chunks with a mapping of their own: when, how long, and what their release teaches malloc.

Where the kernel puts a mapping is not malloc's to say: the base is adopted from the observation, the offset inside
the page is checked. Rules: ../shared/specs/glibc-malloc.md §6, §9.
"""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.blocks import block_remove
from heapledger.analyzer.glibc.chunk import State, note
from heapledger.analyzer.glibc.constants import (
    ADDRESS_LIMIT_BYTES,
    FAILED,
    GRANULE_BYTES,
    MAPPED,
    MMAP_THRESHOLD_MAX_BYTES,
    SYS_MMAP,
    SYS_MUNMAP,
)


@cython.cfunc
@cython.inline
def wants_map(s: State, n: cython.longlong) -> cython.bint:
    """Whether a request that nothing at hand can serve gets a mapping of its own."""
    return n * GRANULE_BYTES >= s.mmap_threshold and s.n_mmaps < s.mmap_max


@cython.cfunc
@cython.inline
def map_length(s: State, n: cython.longlong) -> cython.longlong:
    """Bytes of the mapping for a chunk of n granules: 8 more than a chunk in the heap, as no next chunk lends any."""
    return (n * GRANULE_BYTES + 8 + s.page - 1) & -s.page


@cython.cfunc
def map_chunk(s: State, n: cython.longlong) -> cython.longlong:
    """MAPPED, with the length left in the state; FAILED where no address space could hold it."""
    if n * GRANULE_BYTES >= ADDRESS_LIMIT_BYTES:
        s.unbacked = True
        return FAILED
    s.map_length = map_length(s, n)
    s.map_lead = 0
    s.n_mmaps += 1
    note(s, SYS_MMAP, s.map_length)
    return MAPPED


@cython.cfunc
def block_lead(s: State, i: cython.longlong) -> cython.longlong:
    """Bytes between a mapping's base and its chunk: not 0 only for aligned allocations."""
    return s.b_key[i] - 16 - s.b_base[i]


@cython.cfunc
def unmap_block(s: State, i: cython.longlong) -> cython.void:
    """Frees the mapped chunk at table index i; its size may become the threshold, so that the next like it is on
    the heap.

    glibc compares the size with its flag bit (2) still in it: equality with the threshold counts, 32 MiB does not.
    """
    flagged: cython.longlong = (s.b_length[i] - block_lead(s, i)) | 2
    if s.dynamic and flagged > s.mmap_threshold and flagged <= MMAP_THRESHOLD_MAX_BYTES:
        s.mmap_threshold = flagged - 2
        s.trim_threshold = 2 * s.mmap_threshold
    s.n_mmaps -= 1
    note(s, SYS_MUNMAP, s.b_length[i])
    block_remove(s, i)
