# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Runs of pages: what the page map says of a VMA, tiled without gaps."""

from cpython cimport array
from libc.stdint cimport uint8_t, uint32_t, uint64_t

import array

cdef array.array no_lengths = array.array("I")
cdef array.array no_kinds = array.array("B")
cdef enum:
    ABSENT = 0
    ANON = 1
    FILE = 2
    SWAP = 4
    KIND = 0x0F  # of a category, without flags
cdef uint64_t MAX_RUN = 0xFFFFFFFF  # what 32 bits hold


cdef class Tiles:
    """The runs of one VMA. Each is longer than nothing and of another category than the one before, unless that is as
    long as a run can be."""

    cdef array.array lengths, kinds
    cdef size_t count
    cdef uint64_t resident

    def __cinit__(self, size_t most):
        self.lengths = array.clone(no_lengths, most, False)
        self.kinds = array.clone(no_kinds, most, False)

    cdef int put(self, uint64_t pages, uint8_t kind) except -1:
        cdef uint64_t part
        if (kind & KIND) == ANON or (kind & KIND) == FILE:
            self.resident += pages
        while pages:
            if self.count and self.kinds.data.as_uchars[self.count - 1] == kind \
                    and self.lengths.data.as_uints[self.count - 1] < MAX_RUN:
                part = min(pages, MAX_RUN - self.lengths.data.as_uints[self.count - 1])
                self.lengths.data.as_uints[self.count - 1] += <uint32_t>part
            else:
                if self.count == <size_t>len(self.kinds):
                    array.resize_smart(self.lengths, 2 * self.count + 4)
                    array.resize_smart(self.kinds, 2 * self.count + 4)
                part = min(pages, MAX_RUN)
                self.lengths.data.as_uints[self.count] = <uint32_t>part
                self.kinds.data.as_uchars[self.count] = kind
                self.count += 1
            pages -= part
        return 0


def tile(
    const uint64_t[::1] regions not None, const uint8_t[::1] meaning not None,
    uint64_t start, uint64_t end, bint swaps, uint64_t page,
):
    """(lengths in pages, categories as bytes, resident bytes) of the runs that tile [start, end): those of `regions`
    that lie in it, cut to it, and ABSENT between them.

    `regions`: start, end, flags of each, ascending; `meaning`: the category of flags up to 127. Page-table markers
    (guards, write-protect) look swapped: without `swaps` what is swapped is absent.
    """
    cdef size_t count = regions.shape[0] // 3, low = 0, high = count, middle, i
    cdef uint64_t at = start, first, last
    cdef uint8_t kind
    if meaning.shape[0] != 128:
        raise ValueError("a category for each of 128 flags is needed")
    while low < high:  # the first region that ends behind `start`
        middle = (low + high) // 2
        if regions[3 * middle + 1] <= start:
            low = middle + 1
        else:
            high = middle
    i = low
    while high < count and regions[3 * high] < end and high - i < 16:
        high += 1
    cdef Tiles tiles = Tiles(2 * (high - i) + 1)
    while i < count and regions[3 * i] < end:
        kind = meaning[regions[3 * i + 2] & 127]
        if kind == SWAP and not swaps:
            kind = ABSENT
        first, last = max(regions[3 * i], at), min(regions[3 * i + 1], end)
        if first < last:
            tiles.put((first - at) // page, ABSENT)
            tiles.put((last - first) // page, kind)
            at = last
        i += 1
    tiles.put((end - at) // page, ABSENT)
    array.resize(tiles.lengths, tiles.count)
    array.resize(tiles.kinds, tiles.count)
    return tiles.lengths, tiles.kinds.tobytes(), tiles.resident * page
