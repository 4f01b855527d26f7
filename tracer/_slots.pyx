# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Slots of a ring to columns, compiled: what `spool.decode` does with the ordinary ones, in one pass and without the
interpreter lock. The layout is drawn in preload/spool.h. `spool._decode_any` does the rest, and is the oracle of its tests.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef enum:
    FREE = 4
    CALLOC = 2
    MEMALIGN = 5
    TIME = 61
    LATE = 62
    EXT = 63
    MORE = 0x40

cdef uint64_t SPAN_LATE = 0x7FFFFF
cdef uint64_t EXCESS_LATE = 0xFFFF
cdef uint64_t SIZE_EXT = 0xFFFFFFFFFFFF


cdef inline uint64_t widened(uint64_t value, int bits) noexcept nogil:
    """The low `bits` as a signed number."""
    return <uint64_t>(<int64_t>(value << (64 - bits)) >> (64 - bits))


cdef Py_ssize_t decode_all(
    const uint64_t *slot, Py_ssize_t count, const uint8_t *known, const uint8_t *has_word, uint64_t *carry,
    uint8_t *kinds, uint64_t *ticks, uint64_t *seqs, uint64_t *exits, uint64_t *addrs, uint64_t *sizes,
    uint64_t *args, uint64_t *args2, uint64_t *words, uint32_t *stacks,
) noexcept nogil:
    cdef uint64_t tick = carry[0], base = carry[1], seq = carry[1]
    cdef uint64_t w0, w1, w2, w3, span, addr, size, chunk, excess, aux, arg, arg2, word
    cdef const uint64_t *end = slot + 4 * count
    cdef const uint64_t *more
    cdef Py_ssize_t n = 0
    cdef int kind
    while slot < end:
        w0, w1, w2, w3 = slot[0], slot[1], slot[2], slot[3]
        slot += 4
        kind = w0 & 63
        if kind >= TIME:
            if kind == TIME:
                tick = w1
                if base == 0:
                    base = w2
            continue
        span = (w0 >> 9) & SPAN_LATE
        excess = w1 >> 48
        addr = widened(w1, 48)
        if base == 0 or not known[kind] or span == SPAN_LATE:
            return -1
        if has_word[kind] and addr and excess == EXCESS_LATE:
            return -1
        tick += widened((w3 >> 40) - tick, 24)
        seq = base + widened(w3 - base, 40)
        size = w2 & SIZE_EXT
        aux = w2 >> 48
        arg = arg2 = word = 0
        if kind == FREE:
            word = size
            size = 0
        elif has_word[kind]:
            if addr:
                chunk = (size + 23) & ~<uint64_t>15
                word = (chunk if chunk > 32 else 32) + excess
            if kind == CALLOC:
                arg = aux
            elif kind == MEMALIGN:
                arg = <uint64_t>1 << (aux & 63)
                arg2 = aux >> 8
        if w0 & MORE and slot < end and slot[0] & 63 == EXT:
            arg, arg2 = slot[1], slot[2]
            if w2 & SIZE_EXT == SIZE_EXT:
                size = slot[3]
            more = slot + 4
            if slot[0] & MORE and more < end:
                word = more[1]
        kinds[n] = <uint8_t>kind
        ticks[n] = tick
        seqs[n] = seq
        exits[n] = seq + span if span else 0
        addrs[n] = addr
        sizes[n] = size
        args[n] = arg
        args2[n] = arg2
        words[n] = word
        stacks[n] = <uint32_t>(w0 >> 32)
        n += 1
    carry[0] = tick
    carry[1] = seq if n else base
    return n


def decode(
    const uint64_t[:, ::1] slots not None, const uint8_t[::1] known not None, const uint8_t[::1] has_word not None,
    uint64_t[::1] carry not None, uint8_t[::1] kind not None, uint64_t[:, ::1] wide not None,
    uint32_t[::1] stack not None,
):
    """Fills the columns: `wide` holds tick, seq, seq_exit, addr, size, arg, arg2, word, a row each. Returns how many events
    there were; -1, and `carry` (tick, seq) as it was, where a slot is not an ordinary one."""
    cdef Py_ssize_t count = slots.shape[0], found
    if slots.shape[1] != 4 or known.shape[0] != 64 or has_word.shape[0] != 64 or carry.shape[0] != 2:
        raise ValueError("slots have four words")
    if count == 0:
        return 0
    if kind.shape[0] < count or stack.shape[0] < count or wide.shape[0] != 8 or wide.shape[1] < count:
        raise ValueError("columns are too short")
    with nogil:
        found = decode_all(
            &slots[0, 0], count, &known[0], &has_word[0], &carry[0], &kind[0], &wide[0, 0], &wide[1, 0], &wide[2, 0],
            &wide[3, 0], &wide[4, 0], &wide[5, 0], &wide[6, 0], &wide[7, 0], &stack[0],
        )
    return found
