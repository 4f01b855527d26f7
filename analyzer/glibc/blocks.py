"""Blocks outside the modelled heap, by user address: mapped chunks, and blocks of arenas that are not modelled.

Open addressing with linear probing; a removal moves later entries up, so there are no tombstones. Key 0 is empty (no
user address is 0). Costs O(1) a call; memory grows with the number of blocks only.
"""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.chunk import State, lengthened, new_table
from heapledger.analyzer.glibc.constants import BYTES_LIMIT


@cython.cfunc
@cython.inline
def slot_for(key: cython.longlong, mask: cython.longlong) -> cython.longlong:
    """Where a key would like to be: the bits above the granule, folded."""
    h: cython.longlong = (key >> 4) ^ (key >> 12) ^ (key >> 23)
    return h & mask


@cython.cfunc
def block_find(s: State, key: cython.longlong) -> cython.longlong:
    """Index of the block with this user address, -1 where there is none."""
    if key == 0:
        return -1
    i: cython.longlong = slot_for(key, s.b_mask)
    while s.b_key[i] != 0:
        if s.b_key[i] == key:
            return i
        i = (i + 1) & s.b_mask
    return -1


@cython.cfunc
def block_place(s: State, key: cython.longlong) -> cython.longlong:
    """A free index for a key that is not in the table."""
    i: cython.longlong = slot_for(key, s.b_mask)
    while s.b_key[i] != 0:
        i = (i + 1) & s.b_mask
    s.b_key[i] = key
    return i


@cython.cfunc
def block_move(s: State, i: cython.longlong, j: cython.longlong) -> cython.void:
    """Entry i takes the place of entry j."""
    s.b_key[j] = s.b_key[i]
    s.b_base[j] = s.b_base[i]
    s.b_length[j] = s.b_length[i]
    s.b_requested[j] = s.b_requested[i]
    s.b_seq[j] = s.b_seq[i]
    s.b_time[j] = s.b_time[i]
    s.b_stack[j] = s.b_stack[i]
    s.b_kind[j] = s.b_kind[i]


def blocks_grow(s: State) -> None:
    """Doubles the table."""
    old_count: int = s.b_mask + 1
    key = lengthened(s.b_key, old_count)
    base = lengthened(s.b_base, old_count)
    length = lengthened(s.b_length, old_count)
    requested = lengthened(s.b_requested, old_count)
    seq = lengthened(s.b_seq, old_count)
    time = lengthened(s.b_time, old_count)
    stack = lengthened(s.b_stack, old_count)
    kind = lengthened(s.b_kind, old_count)
    new_table(s, 2 * old_count)
    for j in range(old_count):
        if key[j]:
            i = block_place(s, key[j])
            s.b_base[i] = base[j]
            s.b_length[i] = length[j]
            s.b_requested[i] = requested[j]
            s.b_seq[i] = seq[j]
            s.b_time[i] = time[j]
            s.b_stack[i] = stack[j]
            s.b_kind[i] = kind[j]


@cython.cfunc
def block_add(
    s: State,
    key: cython.longlong,
    base: cython.longlong,
    length: cython.longlong,
    requested: cython.longlong,
    kind: cython.longlong,
) -> cython.bint:
    """Remembers a block of the event under way. False where one with that address was still thought live."""
    old: cython.longlong = block_find(s, key)
    fresh: cython.bint = old < 0
    if not fresh:
        block_remove(s, old)
    if 2 * s.b_used > s.b_mask:
        blocks_grow(s)
    # Sums must not overflow, whatever a hostile trace claims to have been given.
    if requested < 0 or s.live_bytes + requested > BYTES_LIMIT:
        requested = 0
    i: cython.longlong = block_place(s, key)
    s.b_base[i] = base
    s.b_length[i] = length
    s.b_requested[i] = requested
    s.b_seq[i] = s.seq
    s.b_time[i] = s.time
    s.b_stack[i] = s.stack
    s.b_kind[i] = kind
    s.b_used += 1
    s.live_bytes += requested
    s.live_blocks += 1
    if kind == 1:
        s.mapped_bytes += length
    return fresh


@cython.cfunc
def block_remove(s: State, i: cython.longlong) -> cython.void:
    """Forgets the block at index i."""
    s.live_bytes -= s.b_requested[i]
    s.live_blocks -= 1
    if s.b_kind[i] == 1:
        s.mapped_bytes -= s.b_length[i]
    s.b_used -= 1
    hole: cython.longlong = i
    j: cython.longlong = (i + 1) & s.b_mask
    while s.b_key[j] != 0:
        home: cython.longlong = slot_for(s.b_key[j], s.b_mask)
        if ((j - home) & s.b_mask) >= ((j - hole) & s.b_mask):
            block_move(s, j, hole)
            hole = j
        j = (j + 1) & s.b_mask
    s.b_key[hole] = 0
    s.b_kind[hole] = 0
