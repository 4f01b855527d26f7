# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Blocks from allocation to release, compiled: what `lifetimes.PlainTable` does, which says what every method means.

    Block   40 bytes, open addressing by address; a released one stays, for who asks what was there before
    Flow    what one call site allocated and another released, open addressing by both; `Weights` beside it, of
            sampled traces only

Identity: allocated = live + the sum of the flows, in blocks and in bytes.
"""

from libc.math cimport expm1
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import numpy as np

cdef enum:
    MALLOC = 1
    REALLOC = 3
    FREE = 4
    PVALLOC = 7
    THREADS = 1 << 16

#: `Block.chunk`: the word at p-8, with this bit while the block is live.
cdef uint64_t LIVE = <uint64_t>1 << 63
#: Sums stay below this, whatever a hostile trace claims to have been given.
cdef uint64_t BYTES_LIMIT = <uint64_t>1 << 62
#: From this many slots on, released blocks are forgotten when the table is rebuilt.
cdef uint64_t REMEMBERED_SLOTS = 1 << 21

cdef struct Block:
    uint64_t address  # 0: the slot is empty
    uint64_t size     # as requested
    uint64_t when     # live: time of the allocation in ns; released: the release's number
    uint64_t chunk
    uint32_t stack    # of the allocation
    uint32_t site     # live: of the allocation; released: of the release

cdef struct Flow:
    uint64_t key  # allocating site << 32 | releasing site
    uint64_t blocks  # 0: the slot is empty
    uint64_t bytes
    uint64_t temporary_blocks
    uint64_t temporary_bytes

cdef struct Weights:
    double[4] all        # blocks, bytes, variance of blocks, variance of bytes
    double[4] temporary


cdef inline uint64_t mixed(uint64_t key) noexcept nogil:
    return key * <uint64_t>0x9E3779B97F4A7C15


cdef inline uint64_t home(uint64_t address, int bits) noexcept nogil:
    """Pages are scattered, blocks of one page stay together: what is used together lies together."""
    return ((mixed(address >> 12) >> (64 - bits)) + ((address >> 4) & 255)) & ((<uint64_t>1 << bits) - 1)


cdef class Table:
    """As `lifetimes.PlainTable`."""

    cdef Block *blocks
    cdef int bits
    cdef uint64_t used
    cdef Flow *flows
    cdef Weights *weights
    cdef int flow_bits
    cdef uint64_t flow_count
    cdef uint64_t *last  # by thread: the block it allocated last, if it is not released yet
    cdef readonly uint64_t sample_bytes
    cdef readonly uint64_t hints
    cdef uint64_t since, releases, inherited_releases
    cdef uint64_t allocated_blocks, allocated_bytes, inherited_blocks, inherited_bytes, live_blocks_, live_bytes_
    cdef double[4] allocated_weights
    cdef double[4] live_weights

    def __cinit__(self, sample_bytes=0):
        self.sample_bytes = min(sample_bytes, 1 << 62)
        self.bits, self.flow_bits = 12, 10
        self.blocks = <Block *>calloc(<size_t>1 << self.bits, sizeof(Block))
        self.last = <uint64_t *>calloc(THREADS, sizeof(uint64_t))
        self.new_flows()
        if self.blocks == NULL or self.last == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.blocks)
        free(self.flows)
        free(self.weights)
        free(self.last)

    cdef int new_flows(self) except -1:
        free(self.flows)
        free(self.weights)
        self.weights = NULL
        self.flow_count = 0
        self.flows = <Flow *>calloc(<size_t>1 << self.flow_bits, sizeof(Flow))
        if self.flows == NULL:
            raise MemoryError
        if self.sample_bytes:
            self.weights = <Weights *>calloc(<size_t>1 << self.flow_bits, sizeof(Weights))
            if self.weights == NULL:
                raise MemoryError
        return 0

    def copy(self):
        cdef Table other = Table(self.sample_bytes)
        cdef size_t count = <size_t>1 << self.bits
        free(other.blocks)
        other.blocks = <Block *>calloc(count, sizeof(Block))
        if other.blocks == NULL:
            raise MemoryError
        memcpy(other.blocks, self.blocks, count * sizeof(Block))
        other.bits, other.used, other.releases = self.bits, self.used, self.releases
        other.live_blocks_, other.live_bytes_ = self.live_blocks_, self.live_bytes_
        other.live_weights = self.live_weights
        other.begin(self.since)
        return other

    def begin(self, since):
        self.since, self.inherited_releases = since, self.releases
        self.hints = 0
        self.flow_bits = 10
        self.new_flows()
        self.allocated_blocks = self.allocated_bytes = 0
        self.allocated_weights = [0.0, 0.0, 0.0, 0.0]
        self.inherited_blocks, self.inherited_bytes = self.live_blocks_, self.live_bytes_

    # ---- blocks

    cdef inline Block *find(self, uint64_t address) noexcept nogil:
        """The block's slot, or the empty one where it would be."""
        cdef uint64_t mask = (<uint64_t>1 << self.bits) - 1
        cdef uint64_t i = home(address, self.bits)
        while self.blocks[i].address != 0 and self.blocks[i].address != address:
            i = (i + 1) & mask
        return &self.blocks[i]

    cdef int rebuild(self) except -1 nogil:
        """A larger table; once it is very large, without the blocks that were released."""
        cdef Block *old = self.blocks
        cdef uint64_t i, count = <uint64_t>1 << self.bits
        cdef bint forget = count >= REMEMBERED_SLOTS
        if not forget or self.live_blocks_ * 4 > count:
            self.bits += 1
        cdef Block *fresh = <Block *>calloc(<size_t>1 << self.bits, sizeof(Block))
        if fresh == NULL:
            with gil:
                raise MemoryError
        self.blocks = fresh
        self.used = 0
        for i in range(count):
            if old[i].address and (not forget or old[i].chunk & LIVE):
                self.find(old[i].address)[0] = old[i]
                self.used += 1
        free(old)
        return 0

    cdef inline void weigh(self, uint64_t size, double *amounts, double sign) noexcept nogil:
        cdef double p = -expm1(-<double>size / <double>self.sample_bytes)
        if p > 0:
            amounts[0] += sign / p
            amounts[1] += sign * size / p
            amounts[2] += sign * (1 - p) / (p * p)
            amounts[3] += sign * <double>size * size * (1 - p) / (p * p)

    cdef int allocate(
        self, uint64_t address, uint64_t size, uint64_t time, uint64_t word, uint32_t stack, uint32_t site,
        uint32_t thread
    ) except -1 nogil:
        cdef Block *block = self.find(address)
        if block.address == 0:
            if 2 * self.used >= <uint64_t>1 << self.bits:
                self.rebuild()
                block = self.find(address)
            self.used += 1
        elif block.chunk & LIVE:
            # Its release is not in the trace.
            self.end(block, 0, False)
        if size > <uint64_t>1 << 47 or self.allocated_bytes + self.inherited_bytes + size > BYTES_LIMIT:
            size = 0
        block.address, block.size, block.when, block.stack, block.site = address, size, time, stack, site
        block.chunk = (word & ~LIVE) | LIVE
        self.last[thread & (THREADS - 1)] = address
        self.live_blocks_ += 1
        self.live_bytes_ += size
        self.allocated_blocks += 1
        self.allocated_bytes += size
        if self.sample_bytes:
            self.weigh(size, self.allocated_weights, 1)
            self.weigh(size, self.live_weights, 1)
        return 0

    cdef int release(
        self, uint64_t address, uint32_t site, uint32_t thread, bint told, bint is_free
    ) except -1 nogil:
        cdef Block *block = self.find(address)
        cdef bint temporary
        if block.address == 0 or block.chunk & LIVE == 0:
            return 0
        if self.sample_bytes:
            temporary = is_free and told
        else:
            temporary = self.last[thread & (THREADS - 1)] == address
            if temporary:
                self.last[thread & (THREADS - 1)] = 0
        return self.end(block, site, temporary)

    cdef int end(self, Block *block, uint32_t site, bint temporary) except -1 nogil:
        cdef Flow *flow
        cdef Weights *weights
        cdef uint64_t at
        self.live_blocks_ -= 1
        self.live_bytes_ -= block.size
        if self.sample_bytes:
            self.weigh(block.size, self.live_weights, -1)
        if block.when >= self.since:
            at = self.flow_of(<uint64_t>block.site << 32 | site)
            flow = &self.flows[at]
            flow.blocks += 1
            flow.bytes += block.size
            if temporary:
                flow.temporary_blocks += 1
                flow.temporary_bytes += block.size
            if self.sample_bytes:
                weights = &self.weights[at]
                self.weigh(block.size, weights.all, 1)
                if temporary:
                    self.weigh(block.size, weights.temporary, 1)
        self.releases += 1
        block.when = self.releases
        block.chunk &= ~LIVE
        block.site = site
        return 0

    # ---- flows

    cdef inline uint64_t flow_slot(self, uint64_t key) noexcept nogil:
        cdef uint64_t mask = (<uint64_t>1 << self.flow_bits) - 1
        cdef uint64_t i = mixed(key ^ (key >> 29)) >> (64 - self.flow_bits)
        while self.flows[i].blocks and self.flows[i].key != key:
            i = (i + 1) & mask
        return i

    cdef int64_t flow_of(self, uint64_t key) except -1 nogil:
        cdef uint64_t at = self.flow_slot(key)
        if self.flows[at].blocks == 0:
            if 2 * self.flow_count >= <uint64_t>1 << self.flow_bits:
                self.rebuild_flows()
                at = self.flow_slot(key)
            self.flows[at].key = key
            self.flow_count += 1
        return at

    cdef int rebuild_flows(self) except -1 nogil:
        cdef Flow *flows = self.flows
        cdef Weights *weights = self.weights
        cdef uint64_t i, at, count = <uint64_t>1 << self.flow_bits
        cdef uint64_t kept = self.flow_count
        self.flows, self.weights = NULL, NULL
        self.flow_bits += 1
        with gil:
            try:
                self.new_flows()
            except MemoryError:
                free(flows)
                free(weights)
                raise
        for i in range(count):
            if flows[i].blocks:
                at = self.flow_slot(flows[i].key)
                self.flows[at] = flows[i]
                if weights != NULL:
                    self.weights[at] = weights[i]
        self.flow_count = kept
        free(flows)
        free(weights)
        return 0

    # ---- in and out

    def feed(
        self, const uint8_t[::1] kind, const uint32_t[::1] thread, const uint64_t[::1] time,
        const uint64_t[::1] seq_exit, const uint64_t[::1] addr, const uint64_t[::1] size, const uint64_t[::1] arg,
        const uint64_t[::1] word, const uint32_t[::1] stack, const uint32_t[::1] site,
        int64_t[::1] live_bytes, int64_t[::1] live_blocks, double[::1] variance,
    ):
        cdef Py_ssize_t i, count = kind.shape[0]
        cdef bint wanted = live_bytes.shape[0] > 0
        cdef uint8_t k
        with nogil:
            for i in range(count):
                k = kind[i]
                if k == FREE:
                    self.hints += arg[i] != 0
                    if addr[i]:
                        self.release(addr[i], site[i], thread[i], arg[i] == 1, True)
                elif MALLOC <= k <= PVALLOC and (addr[i] or seq_exit[i]):
                    if k == REALLOC and arg[i] and (addr[i] or size[i] == 0):
                        self.release(arg[i], site[i], thread[i], False, False)
                    if addr[i]:
                        self.allocate(addr[i], size[i], time[i], word[i], stack[i], site[i], thread[i])
                if wanted:
                    live_blocks[i] = <int64_t>(max(self.live_weights[0], 0.0) + 0.5)
                    live_bytes[i] = <int64_t>(min(max(self.live_weights[1], 0.0), 4e18) + 0.5)
                    variance[i] = max(self.live_weights[3], 0.0)

    def live(self):
        cdef uint64_t i, n = 0
        address, size, time, chunk = (np.empty(self.live_blocks_, np.uint64) for _ in range(4))
        stack = np.empty(self.live_blocks_, np.uint32)
        cdef uint64_t[::1] a = address, s = size, t = time, c = chunk
        cdef uint32_t[::1] st = stack
        for i in range(<uint64_t>1 << self.bits):
            if self.blocks[i].address and self.blocks[i].chunk & LIVE:
                a[n], s[n], t[n] = self.blocks[i].address, self.blocks[i].size, self.blocks[i].when
                c[n], st[n] = self.blocks[i].chunk & ~LIVE, self.blocks[i].stack
                n += 1
        return address, size, time, chunk, stack

    def released(self):
        cdef uint64_t i, n = 0, count = self.used - self.live_blocks_
        address, size, number, chunk = (np.empty(count, np.uint64) for _ in range(4))
        site = np.empty(count, np.uint32)
        cdef uint64_t[::1] a = address, s = size, w = number, c = chunk
        cdef uint32_t[::1] by = site
        for i in range(<uint64_t>1 << self.bits):
            if self.blocks[i].chunk & LIVE or self.blocks[i].when <= self.inherited_releases:
                continue
            if self.blocks[i].address:
                a[n], s[n], w[n] = self.blocks[i].address, self.blocks[i].size, self.blocks[i].when
                c[n], by[n] = self.blocks[i].chunk, self.blocks[i].site
                n += 1
        return address[:n], size[:n], number[:n], chunk[:n], site[:n]

    def flow_columns(self):
        cdef uint64_t i, n = 0
        cdef int j
        allocated_by, released_by = (np.empty(self.flow_count, np.uint32) for _ in range(2))
        amounts = np.zeros((self.flow_count, 4), np.uint64)
        weights = np.zeros((self.flow_count if self.sample_bytes else 0, 8), np.float64)
        cdef uint32_t[::1] a = allocated_by, r = released_by
        cdef uint64_t[:, ::1] m = amounts
        cdef double[:, ::1] w = weights
        for i in range(<uint64_t>1 << self.flow_bits):
            if self.flows[i].blocks:
                a[n], r[n] = <uint32_t>(self.flows[i].key >> 32), <uint32_t>self.flows[i].key
                m[n, 0], m[n, 1] = self.flows[i].blocks, self.flows[i].bytes
                m[n, 2], m[n, 3] = self.flows[i].temporary_blocks, self.flows[i].temporary_bytes
                if self.sample_bytes:
                    for j in range(4):
                        w[n, j], w[n, 4 + j] = self.weights[i].all[j], self.weights[i].temporary[j]
                n += 1
        return allocated_by, released_by, amounts, weights

    def allocated(self):
        return (self.allocated_blocks, self.allocated_bytes), [self.allocated_weights[j] for j in range(4)]


def newest(const uint64_t[::1] start, const uint64_t[::1] end, const uint64_t[::1] number):
    """As `lifetimes.plain_newest`."""
    cdef Py_ssize_t i, k, m, j, top = 0, count = start.shape[0]
    kept = np.ones(count, np.uint8)
    cdef uint8_t[::1] keep = kept
    cdef int64_t[::1] stack = np.empty(count + 1, np.int64)
    cdef bint hidden
    for i in range(count):
        while top and end[stack[top - 1]] <= start[i]:
            top -= 1
        if top and number[stack[top - 1]] > number[i]:
            keep[i] = 0
        hidden = False
        k = top
        while k and number[stack[k - 1]] > number[i]:
            k -= 1
            if end[stack[k]] >= end[i]:
                hidden = True
                break
        if hidden:
            continue
        m = k
        while m and end[stack[m - 1]] <= end[i]:
            m -= 1
        if m == k:
            for j in range(top, k, -1):
                stack[j] = stack[j - 1]
            top += 1
        else:
            for j in range(k, top):
                stack[m + 1 + j - k] = stack[j]
            top -= k - m - 1
        stack[m] = i
    top = 0
    for i in range(count):
        while top and number[stack[top - 1]] < number[i]:
            top -= 1
            if start[i] < end[stack[top]]:
                keep[stack[top]] = 0
        stack[top] = i
        top += 1
    return kept
