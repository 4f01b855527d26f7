# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The encoder's inner loop, compiled: a column's transform, order and byte planes in two passes, without the interpreter
lock. The same thing in numpy is `blocks._encode_by_numpy`, which is also the oracle of its tests."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc

cdef enum:
    PLAIN = 0
    DELTA = 1
    SECOND = 2
    EXIT = 3
    CHUNK = 4


cdef inline uint64_t zigzag(uint64_t value) noexcept nogil:
    return (value << 1) ^ <uint64_t>(<int64_t>value >> 63)


cdef inline uint64_t chunk_of(uint64_t size) noexcept nogil:
    cdef uint64_t chunk = (size + 23) & ~<uint64_t>15
    return (chunk if chunk > 32 else 32) + 1


cdef uint64_t residuals(
    const uint64_t *v, const uint64_t *seq, const uint64_t *size, const uint8_t *allocation,
    Py_ssize_t count, int transform, uint64_t *out,
) noexcept nogil:
    """Fills `out`; returns all residuals or-ed together."""
    cdef uint64_t seen = 0, before = 0, step = 0, step_before = 0, r
    cdef Py_ssize_t i
    if transform == PLAIN:
        for i in range(count):
            out[i] = v[i]
            seen |= v[i]
    elif transform == DELTA:
        for i in range(count):
            r = zigzag(v[i] - before)
            before = v[i]
            out[i] = r
            seen |= r
    elif transform == SECOND:
        for i in range(count):
            step = v[i] - before
            before = v[i]
            r = zigzag(step - step_before)
            step_before = step
            out[i] = r
            seen |= r
    elif transform == EXIT:
        for i in range(count):
            r = zigzag(v[i] - seq[i])
            out[i] = r
            seen |= r
    else:
        for i in range(count):
            r = zigzag(v[i] - chunk_of(size[i]) if allocation[i] else v[i])
            out[i] = r
            seen |= r
    return seen


cdef void reorder(const uint64_t *values, const uint8_t *allocation, Py_ssize_t count, uint64_t *out) noexcept nogil:
    """Allocations first, then the rest."""
    cdef Py_ssize_t i, first = 0, second = 0
    for i in range(count):
        second += allocation[i]
    for i in range(count):
        if allocation[i]:
            out[first] = values[i]
            first += 1
        else:
            out[second] = values[i]
            second += 1


cdef void split_planes(const uint64_t *values, Py_ssize_t count, int width, uint8_t *out) noexcept nogil:
    cdef Py_ssize_t i
    cdef int plane, shift
    for plane in range(width):
        shift = 8 * plane
        for i in range(count):
            out[i] = <uint8_t>(values[i] >> shift)
        out += count


def encode(
    const uint64_t[::1] values not None, const uint64_t[::1] seq not None, const uint64_t[::1] size not None,
    const uint8_t[::1] allocation not None, int transform, bint split,
):
    """(width, byte planes) of a column. All arrays have the same length; `allocation` holds 0 and 1."""
    cdef Py_ssize_t count = values.shape[0]
    if seq.shape[0] != count or size.shape[0] != count or allocation.shape[0] != count or not 0 <= transform <= CHUNK:
        raise ValueError("columns of different lengths")
    if count == 0:
        return 0, b""
    cdef uint64_t *scratch = <uint64_t *>malloc(2 * count * sizeof(uint64_t))
    if scratch == NULL:
        raise MemoryError
    cdef uint64_t *found = scratch
    cdef uint64_t seen
    cdef int width = 0
    cdef bytes planes
    cdef uint8_t *out
    try:
        with nogil:
            seen = residuals(&values[0], &seq[0], &size[0], &allocation[0], count, transform, scratch)
            while width < 8 and seen >> (8 * width):
                width += 1
            if split and width:
                found = scratch + count
                reorder(scratch, &allocation[0], count, found)
        planes = PyBytes_FromStringAndSize(NULL, width * count)
        out = <uint8_t *>PyBytes_AS_STRING(planes)
        with nogil:
            split_planes(found, count, width, out)
    finally:
        free(scratch)
    return width, planes
