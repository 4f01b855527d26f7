"""The state of the model: a shadow of the heap, indexed by granule, and malloc's own variables.

The heap is seen as granules of 16 bytes; granule g stands for the address `base + 16 * (g - FIRST)`. A chunk of n
granules that starts at g has:

    state[g]    what it is (constants.py); 0 at granules where no chunk starts
    head[g]     n
    prev[g]     size of the chunk before it if that one is FREE, else 0 (glibc's prev_size and its in-use bit)
    link[g]     free: next in its list         live: id of the stack that allocated it
    link[g+1]   free: previous in its list     live: bytes of the chunk that were not asked for
    link[g+2]   large free: next size down     (glibc's fd_nextsize; 0 where the chunk is not the first of its size)
    link[g+3]   large free: next size up
    when[g]     live: seq of the allocation    when[g+1]  live: its time in ns

Always: chunks tile [FIRST, end of top); no two FREE chunks touch; hole, cached, live_bytes, live_blocks and
foreign are the sums over the chunks (and blocks.py's table). `check.py` is this paragraph as code.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.constants import (
    ADDRESS_LIMIT_BYTES,
    DEFAULT_MMAP_BYTES,
    DEFAULT_MMAP_MAX,
    DEFAULT_TOP_PAD_BYTES,
    DEFAULT_TRIM_BYTES,
    FAST_SLOTS,
    FIRST,
    GRANULE_BYTES,
    HUGE,
    LIVE,
    MIN_CHUNK,
    REFUSED_FROM,
    TCACHE_SLOTS,
    TOP,
    WHY_COUNT,
)


@cython.final
@cython.cclass
class State:
    """One process's malloc. Only the functions of this package look inside."""

    # The shadow.
    head: cython.int_view
    prev: cython.int_view
    link: cython.int_view
    when: cython.long_view
    state: cython.byte_view
    pages: list[Any]  # the mappings under these arrays (shadow.py)
    capacity: cython.longlong  # granules the arrays have room for
    limit: cython.longlong  # granules they may ever have

    # Where the heap is, in bytes.
    base: cython.longlong
    base_known: cython.bint
    brk: cython.longlong  # the program break, whoever moved it last
    brk_queried: cython.bint  # libc has asked the kernel for the break

    # The arena.
    top: cython.longlong  # granule; 0 before the first growth
    last_remainder: cython.longlong
    have_fast: cython.bint
    fast: cython.long_view
    binmap: cython.long_view

    # tcaches: 64 bins a thread, thread slot t at 64*t.
    tc_head: cython.int_view
    tc_count: cython.int_view
    tc_ready: cython.int_view
    tc_struct: cython.int_view
    tc_other: cython.int_view  # 1: the thread has been seen to use another arena
    tc_slots: cython.longlong
    thread: cython.longlong
    slot: cython.longlong  # of the current thread; -1: too many threads
    tc: cython.longlong  # first bin of the current thread's tcache, -1 where it has none

    # malloc_par.
    page: cython.longlong  # bytes
    top_pad: cython.longlong
    trim_threshold: cython.longlong
    mmap_threshold: cython.longlong
    mmap_max: cython.longlong
    dynamic: cython.bint
    n_mmaps: cython.longlong
    max_fast: cython.longlong  # granules
    tc_bins: cython.longlong
    tc_limit: cython.longlong
    tc_unsorted_limit: cython.longlong

    # The profile.
    tc_struct_size: cython.longlong  # granules
    tc_lazy: cython.bint
    calloc_tcache: cython.bint
    memalign_tcache: cython.bint
    memalign_tail: cython.longlong
    memalign_front_merges: cython.bint
    aligned_alloc_strict: cython.bint
    realloc_fits: cython.longlong
    internal_tcache: cython.bint
    small_to_own_bin: cython.bint
    strict_limit: cython.bint
    threshold_limited: cython.bint

    # Blocks outside the heap: an open-addressed table by user address (blocks.py).
    b_key: cython.long_view
    b_base: cython.long_view
    b_length: cython.long_view
    b_requested: cython.long_view
    b_seq: cython.long_view
    b_time: cython.long_view
    b_stack: cython.long_view
    b_kind: cython.byte_view
    b_used: cython.longlong
    b_mask: cython.longlong

    # The event under way.
    observed: cython.longlong
    observed_word: cython.longlong
    deny: cython.bint  # the real call failed: the system had nothing to give
    grew: cython.longlong  # bytes the break was moved by during this event
    old_top: cython.longlong
    source: cython.longlong
    map_length: cython.longlong
    map_lead: cython.longlong
    unbacked: cython.bint
    wrapped: cython.longlong  # of a HUGE request: wrapped_size
    seq: cython.longlong
    time: cython.longlong
    stack: cython.longlong
    kind: cython.longlong

    # Sums.
    live_bytes: cython.longlong
    live_blocks: cython.longlong
    hole: cython.longlong  # granules
    cached: cython.longlong  # granules
    foreign: cython.longlong  # granules
    mapped_bytes: cython.longlong

    # Agreement.
    predicted: cython.longlong
    exact: cython.longlong
    forced: cython.longlong
    adopted_bases: cython.longlong
    word_mismatches: cython.longlong
    unknown_frees: cython.longlong
    syscalls: cython.longlong
    why: cython.long_view  # forced events by reason
    examples: list[tuple[int, int, int, int, int]]
    log: list[tuple[int, int]] | None


def new_ints(count: int) -> Any:
    """`count` zero C ints; compiled: pages that are never touched cost nothing."""
    return numpy.zeros(count, numpy.int32) if cython.compiled else array("i", bytes(4 * count))


def new_longs(count: int) -> Any:
    """`count` zero C long longs."""
    return numpy.zeros(count, numpy.int64) if cython.compiled else array("q", bytes(8 * count))


def new_bytes(count: int) -> Any:
    """`count` zero bytes."""
    return numpy.zeros(count, numpy.uint8) if cython.compiled else array("B", bytes(count))


def lengthened(view: Any, count: int) -> Any:
    """A copy of an array with `count` entries, the new ones zero."""
    if cython.compiled:
        old = numpy.asarray(view)
        fresh = numpy.zeros(count, old.dtype)
        fresh[: len(old)] = old
        return fresh
    longer = array(view.typecode, view)
    longer.frombytes(bytes((count - len(view)) * view.itemsize))
    return longer


def new_state(start_break: int, page: int, limit_bytes: int) -> State:
    """A process that has not allocated anything, with glibc's default parameters; still without a shadow."""
    s = State()
    s.limit = min(limit_bytes // GRANULE_BYTES, 0x7FFFFFFF - 2 * FIRST)
    _new_place(s, start_break, page)
    _new_arena(s)
    _new_parameters(s)
    new_table(s, 64)
    s.b_used = 0
    _new_event(s)
    return s


def _new_place(s: State, start_break: int, page: int) -> None:
    """An unknown break (0) is put somewhere until the first result shows where it was."""
    s.page = page
    s.base_known = start_break != 0
    s.base = start_break if start_break else 0x100000000000
    s.brk = s.base
    s.brk_queried = False
    s.top = 0
    s.last_remainder = 0


def _new_arena(s: State) -> None:
    s.have_fast = False
    s.fast = new_longs(FAST_SLOTS)
    s.binmap = new_longs(4)
    s.tc_slots = 1
    s.tc_head = new_ints(TCACHE_SLOTS)
    s.tc_count = new_ints(TCACHE_SLOTS)
    s.tc_ready = new_ints(1)
    s.tc_struct = new_ints(1)
    s.tc_other = new_ints(1)
    s.thread = 0
    s.slot = 0
    s.tc = -1
    s.live_bytes = s.live_blocks = s.hole = s.cached = s.foreign = s.mapped_bytes = 0


def _new_parameters(s: State) -> None:
    s.top_pad = DEFAULT_TOP_PAD_BYTES
    s.trim_threshold = DEFAULT_TRIM_BYTES
    s.mmap_threshold = DEFAULT_MMAP_BYTES
    s.mmap_max = DEFAULT_MMAP_MAX
    s.dynamic = True
    s.n_mmaps = 0
    s.max_fast = 8
    s.tc_bins = TCACHE_SLOTS
    s.tc_limit = 7
    s.tc_unsorted_limit = 0


def new_table(s: State, count: int) -> None:
    """An empty table for blocks outside the heap, of a power of two entries (blocks.py)."""
    s.b_mask = count - 1
    s.b_key = new_longs(count)
    s.b_base = new_longs(count)
    s.b_length = new_longs(count)
    s.b_requested = new_longs(count)
    s.b_seq = new_longs(count)
    s.b_time = new_longs(count)
    s.b_stack = new_longs(count)
    s.b_kind = new_bytes(count)


def _new_event(s: State) -> None:
    s.observed = s.observed_word = s.grew = s.old_top = s.source = s.map_length = s.map_lead = 0
    s.deny = s.unbacked = False
    s.wrapped = 0
    s.seq = s.time = s.stack = s.kind = 0
    s.predicted = s.exact = s.forced = s.adopted_bases = s.word_mismatches = s.unknown_frees = s.syscalls = 0
    s.why = new_longs(WHY_COUNT)
    s.examples = []
    s.log = None


def clone(s: State) -> State:
    """An independent copy: what fork does to malloc; still without a shadow."""
    t = State()
    _clone_bins(s, t)
    _clone_scalars(s, t)
    _clone_profile(s, t)
    _clone_blocks(s, t)
    return t


def _clone_bins(s: State, t: State) -> None:
    t.limit = s.limit
    t.fast = lengthened(s.fast, FAST_SLOTS)
    t.binmap = lengthened(s.binmap, 4)
    t.tc_slots = s.tc_slots
    t.tc_head = lengthened(s.tc_head, TCACHE_SLOTS * s.tc_slots)
    t.tc_count = lengthened(s.tc_count, TCACHE_SLOTS * s.tc_slots)
    t.tc_ready = lengthened(s.tc_ready, s.tc_slots)
    t.tc_struct = lengthened(s.tc_struct, s.tc_slots)
    t.tc_other = lengthened(s.tc_other, s.tc_slots)


def _clone_scalars(s: State, t: State) -> None:
    t.base, t.base_known, t.brk, t.brk_queried = s.base, s.base_known, s.brk, s.brk_queried
    t.top, t.last_remainder, t.have_fast = s.top, s.last_remainder, s.have_fast
    t.thread, t.slot, t.tc = s.thread, s.slot, s.tc
    t.page, t.top_pad, t.trim_threshold = s.page, s.top_pad, s.trim_threshold
    t.mmap_threshold, t.mmap_max, t.dynamic, t.n_mmaps = s.mmap_threshold, s.mmap_max, s.dynamic, s.n_mmaps
    t.max_fast, t.tc_bins, t.tc_limit, t.tc_unsorted_limit = s.max_fast, s.tc_bins, s.tc_limit, s.tc_unsorted_limit
    _new_event(t)
    t.live_bytes, t.live_blocks, t.hole, t.cached = s.live_bytes, s.live_blocks, s.hole, s.cached
    t.foreign, t.mapped_bytes = s.foreign, s.mapped_bytes
    t.predicted, t.exact, t.forced, t.adopted_bases = s.predicted, s.exact, s.forced, s.adopted_bases
    t.word_mismatches, t.unknown_frees, t.syscalls = s.word_mismatches, s.unknown_frees, s.syscalls
    t.why = lengthened(s.why, WHY_COUNT)
    t.examples = list(s.examples)
    t.log = None if s.log is None else list(s.log)


def _clone_profile(s: State, t: State) -> None:
    t.tc_struct_size, t.tc_lazy = s.tc_struct_size, s.tc_lazy
    t.calloc_tcache, t.memalign_tcache = s.calloc_tcache, s.memalign_tcache
    t.memalign_tail, t.memalign_front_merges = s.memalign_tail, s.memalign_front_merges
    t.aligned_alloc_strict, t.realloc_fits = s.aligned_alloc_strict, s.realloc_fits
    t.internal_tcache, t.small_to_own_bin = s.internal_tcache, s.small_to_own_bin
    t.strict_limit, t.threshold_limited = s.strict_limit, s.threshold_limited


def _clone_blocks(s: State, t: State) -> None:
    t.b_used, t.b_mask = s.b_used, s.b_mask
    t.b_key = lengthened(s.b_key, s.b_mask + 1)
    t.b_base = lengthened(s.b_base, s.b_mask + 1)
    t.b_length = lengthened(s.b_length, s.b_mask + 1)
    t.b_requested = lengthened(s.b_requested, s.b_mask + 1)
    t.b_seq = lengthened(s.b_seq, s.b_mask + 1)
    t.b_time = lengthened(s.b_time, s.b_mask + 1)
    t.b_stack = lengthened(s.b_stack, s.b_mask + 1)
    t.b_kind = lengthened(s.b_kind, s.b_mask + 1)


@cython.cfunc
@cython.inline
def address_of(s: State, g: cython.longlong) -> cython.longlong:
    """Address of granule g; a chunk's user pointer is 16 further on."""
    return s.base + (g - FIRST) * GRANULE_BYTES


@cython.cfunc
@cython.inline
def granule_of(s: State, address: cython.longlong) -> cython.longlong:
    """Granule of an address, 0 where the heap has none there."""
    offset: cython.longlong = address - s.base
    if offset < 0 or offset & 15 or s.top == 0:
        return 0
    g: cython.longlong = (offset >> 4) + FIRST
    return g if g < s.top + s.head[s.top] else 0


@cython.cfunc
@cython.inline
def top_end(s: State) -> cython.longlong:
    """Address of the end of top; 0 before the heap exists."""
    return address_of(s, s.top + s.head[s.top]) if s.top else 0


@cython.cfunc
@cython.inline
def size_for(s: State, request: cython.longlong) -> cython.longlong:
    """Chunk size for a request in bytes; 0 where malloc refuses (a negative request is one of 2**63 or more).

    Before 2.30 only those are refused that come within 64 bytes of 2**64 when padded; the others are looked for, in
    vain. (BZ 22774; seen on 2.27.)
    """
    if request < 0:
        return 0 if s.strict_limit or request >= REFUSED_FROM else HUGE
    if request > 0x3FFFFFFFFFFFFF00:
        return HUGE
    n: cython.longlong = (request + 23) >> 4
    return n if n > MIN_CHUNK else MIN_CHUNK


@cython.cfunc
@cython.inline
def set_top(s: State, g: cython.longlong, n: cython.longlong) -> cython.void:
    """Top is now the n granules from g."""
    s.top = g
    s.head[g] = n
    s.prev[g] = 0
    s.state[g] = TOP


@cython.cfunc
@cython.inline
def set_chunk(s: State, g: cython.longlong, n: cython.longlong, state: cython.longlong) -> cython.void:
    """A chunk in use of n granules at g; whatever was known of the chunk before it stays."""
    s.head[g] = n
    s.state[g] = state


@cython.cfunc
@cython.inline
def as_int(value: cython.longlong) -> cython.longlong:
    """A 32-bit pattern as a C int."""
    return value - 0x100000000 if value > 0x7FFFFFFF else value


@cython.cfunc
@cython.inline
def make_live(s: State, g: cython.longlong, requested: cython.longlong) -> cython.void:
    """The chunk at g belongs to the program, which asked for `requested` bytes in the event under way."""
    size: cython.longlong = s.head[g] * GRANULE_BYTES
    slack: cython.longlong = size - requested
    if requested < 0 or slack < 0:
        slack = 0
    if slack > 0x7FFFFFFF:
        slack = 0x7FFFFFFF
    s.state[g] = LIVE
    s.link[g] = as_int(s.stack)
    s.link[g + 1] = slack
    s.when[g] = s.seq
    s.when[g + 1] = s.time
    s.live_bytes += size - slack
    s.live_blocks += 1


@cython.cfunc
@cython.inline
def drop_live(s: State, g: cython.longlong) -> cython.void:
    """Takes the live chunk at g out of the sums."""
    s.live_bytes -= s.head[g] * GRANULE_BYTES - s.link[g + 1]
    s.live_blocks -= 1


@cython.cfunc
@cython.inline
def wrapped_size(request: cython.longlong) -> cython.longlong:
    """Chunk size for a request not far below 2**64, less 2**60 granules: what is added to it wraps around. 0 for all
    other requests."""
    return (request + 23) >> 4 if -ADDRESS_LIMIT_BYTES < request < REFUSED_FROM else 0


@cython.cfunc
def note(s: State, call: cython.longlong, length: cython.longlong) -> cython.void:
    """malloc makes a system call; brk's length is the signed distance, 0 the query."""
    s.syscalls += 1
    if s.log is not None:
        s.log.append((call, length))
