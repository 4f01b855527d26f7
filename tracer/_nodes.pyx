# cython: language_level=3, boundscheck=False, wraparound=False
"""Nodes of call stacks between the spool and the trace file, and the distinct addresses among them.

A node in a segment of the spool (preload/spool.h): u64 ip, u32 parent, u32 module; ip is written last.
"""

from cpython cimport array
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, qsort

import array

cdef extern from *:
    """
    static uint64_t node_ip(const uint64_t *ip) { return __atomic_load_n(ip, __ATOMIC_ACQUIRE); }
    """
    uint64_t node_ip(const uint64_t *) nogil

cdef struct node:
    uint64_t ip
    uint32_t parent
    uint32_t module

cdef array.array empty = array.array("q")
cdef enum:
    ADDRESS_BITS = 47
    MODULES = 1 << 17


def columns(const unsigned char[::1] segment not None, size_t low, size_t high, uint64_t first, bint final):
    """Of the nodes from `low` up to `high` that the segment holds: (number, parent, address, module, highest address
    without a module), the first four as arrays of equal length. `first`: the number of the node at `low`. Ends before
    one that is not written, unless `final`."""
    cdef size_t held = segment.shape[0] // sizeof(node), count = 0, i
    cdef const node *nodes
    cdef uint64_t ip, outside = 0
    high = min(high, held)
    cdef size_t most = high - low if low < high else 0
    cdef array.array number = array.clone(empty, most, False), parent = array.clone(empty, most, False)
    cdef array.array address = array.clone(empty, most, False), module = array.clone(empty, most, False)
    if most:
        nodes = <const node *>&segment[0] + low
        for i in range(most):
            ip = node_ip(&nodes[i].ip)
            if ip == 0 and not final:
                break
            number.data.as_longlongs[i] = first + i
            parent.data.as_longlongs[i] = nodes[i].parent
            address.data.as_longlongs[i] = <int64_t>ip
            module.data.as_longlongs[i] = nodes[i].module
            if nodes[i].module == 0 and ip > outside:
                outside = ip
            count += 1
    for column in (number, parent, address, module):
        array.resize(column, count)
    return number, parent, address, module, outside


def look_up(const int64_t[::1] keys, const int64_t[::1] table not None):
    """`table[key]` of each key, the last entry for those beyond it."""
    cdef array.array found = array.clone(empty, keys.shape[0], False)
    cdef Py_ssize_t i, last = table.shape[0] - 1
    for i in range(keys.shape[0]):
        found.data.as_longlongs[i] = table[min(keys[i], last)]
    return found


cdef int compare(const void *a, const void *b) noexcept nogil:
    cdef uint64_t x = (<const uint64_t *>a)[0], y = (<const uint64_t *>b)[0]
    return (x > y) - (x < y)


cdef class AddressSet:
    """Pairs (module id above 0, address below 2**47), each once. A table that is at most half full: 16 to 32 bytes a
    pair, 10 ns for one that is known."""

    cdef uint64_t *_slots
    cdef size_t _size, _count

    def __cinit__(self):
        self._size = 1 << 10
        self._slots = <uint64_t *>calloc(self._size, 8)
        if self._slots is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self._slots)

    def __len__(self):
        return self._count

    cdef void _put(self, uint64_t key) noexcept nogil:
        cdef size_t at = <size_t>((key * <uint64_t>0x9E3779B97F4A7C15) >> 20) & (self._size - 1)
        while self._slots[at] != 0:
            if self._slots[at] == key:
                return
            at = (at + 1) & (self._size - 1)
        self._slots[at] = key
        self._count += 1

    cdef int _grow(self) except -1:
        cdef uint64_t *old = self._slots
        cdef size_t size = self._size, i
        cdef uint64_t *slots = <uint64_t *>calloc(2 * size, 8)
        if slots is NULL:
            raise MemoryError
        self._slots, self._size, self._count = slots, 2 * size, 0
        for i in range(size):
            if old[i] != 0:
                self._put(old[i])
        free(old)
        return 0

    def add(self, const int64_t[::1] module_ids not None, const int64_t[::1] addresses not None):
        """Adds pairs; those without a module (id 0 or less), or with an id of 2**17 and more, are left out."""
        cdef Py_ssize_t i
        if module_ids.shape[0] != addresses.shape[0]:
            raise ValueError("columns of different lengths")
        for i in range(module_ids.shape[0]):
            if 0 < module_ids[i] < MODULES:
                if 2 * self._count >= self._size:
                    self._grow()
                self._put(<uint64_t>module_ids[i] << ADDRESS_BITS | <uint64_t>addresses[i] & ((<uint64_t>1 << ADDRESS_BITS) - 1))

    def ascending(self):
        """All pairs as an array of numbers, id << 47 | address, sorted."""
        cdef array.array found = array.array("Q", bytes(8 * self._count))
        cdef size_t i, n = 0
        for i in range(self._size):
            if self._slots[i] != 0:
                found.data.as_ulonglongs[n] = self._slots[i]
                n += 1
        if n:
            qsort(found.data.as_voidptr, n, 8, compare)
        return found
