"""One event after another: what the call does to the model, and whether the model foresaw its result."""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.alloc import malloc_request, tcache_maybe_init
from heapledger.analyzer.glibc.blocks import block_add, block_find, block_remove
from heapledger.analyzer.glibc.chunk import State, address_of, drop_live, granule_of, make_live, size_for, top_end
from heapledger.analyzer.glibc.constants import (
    ADDRESS_LIMIT_BYTES,
    BLOCK_MAPPED,
    FAILED,
    FIRST,
    FROM_ARENA,
    GRANULE_BYTES,
    KIND_BRK,
    KIND_CALLOC,
    KIND_FREE,
    KIND_MALLOC,
    KIND_MALLOC_TRIM,
    KIND_MALLOPT,
    KIND_MEMALIGN,
    KIND_PVALLOC,
    KIND_REALLOC,
    KIND_SBRK,
    KIND_THREAD_END,
    KIND_VALLOC,
    LIVE,
    MAPPED,
    MIN_BYTES,
    PTRDIFF_MAX,
    TC_NONE,
    TC_OFF,
    TC_READY,
    TCACHE_FIRST,
    TCACHE_SLOTS,
    WHY_ADDRESS,
    WHY_FAILED,
    WHY_FOREIGN_BREAK,
    WHY_OTHER_ARENA,
    WHY_OUTSIDE,
    WHY_OVERLAP,
    WHY_RESULT,
    WHY_SIZE,
    WHY_UNBACKED,
    WHY_UNKNOWN_OLD,
)
from heapledger.analyzer.glibc.force import (
    adopt,
    adopt_base,
    carve,
    count_forced,
    give_back,
    retry_apart,
)
from heapledger.analyzer.glibc.free import free_chunk, free_to_arena
from heapledger.analyzer.glibc.memalign import memalign_request
from heapledger.analyzer.glibc.mmapped import block_lead, unmap_block
from heapledger.analyzer.glibc.options import mallopt
from heapledger.analyzer.glibc.realloc import realloc_chunk, remap_length
from heapledger.analyzer.glibc.tcache import switch_thread, tcache_fits, tcache_get
from heapledger.analyzer.glibc.trim import malloc_trim


@cython.cfunc
@cython.inline
def word_at(s: State, g: cython.longlong) -> cython.longlong:
    """The word at p-8 of a chunk: its size, and bit 0 where the chunk before it is in use."""
    return s.head[g] * GRANULE_BYTES + (1 if s.prev[g] == 0 else 0)


@cython.cfunc
def confirm(s: State, g: cython.longlong, request: cython.longlong) -> cython.void:
    """The address was right. The word says whether the chunk's size was, and whether its neighbour is what we think."""
    word: cython.longlong = s.observed_word
    if word == 0 or word == word_at(s, g):
        s.exact += 1
        make_live(s, g, request)
        return
    s.word_mismatches += 1
    make_live(s, g, request)
    if (word & -8) == s.head[g] * GRANULE_BYTES:
        s.exact += 1
        return
    count_forced(s, address_of(s, g) + 16, s.observed, WHY_SIZE)
    if word & 6 == 0 and carve(s, g, word >> 4) != 0:
        make_live(s, g, request)


@cython.cfunc
def settle(s: State, g: cython.longlong, request: cython.longlong) -> cython.void:
    """Compares the model's answer with the observed address, which becomes live in any case."""
    s.predicted += 1
    if g > 0:
        if address_of(s, g) + 16 == s.observed:
            confirm(s, g, request)
        else:
            disagree(s, g, request)
    elif g == MAPPED:
        settle_mapped(s, request)
    elif s.observed == 0:
        s.exact += 1
    else:
        why: cython.longlong = WHY_UNBACKED if s.unbacked else WHY_FAILED
        count_forced(s, 0, s.observed, why)
        adopt(s, s.observed, request, s.observed_word)


@cython.cfunc
def disagree(s: State, g: cython.longlong, request: cython.longlong) -> cython.void:
    """The heap chunk g was predicted, and the program was given something else."""
    expected: cython.longlong = address_of(s, g) + 16
    found: cython.longlong = 0
    if s.observed != 0 and s.observed_word & 6 == 0:
        if not s.base_known:
            found = adopt_base(s, g, s.observed)
            if found != 0:
                s.adopted_bases += 1
                confirm(s, found, request)
                return
            expected = address_of(s, g) + 16
        else:
            found = retry_apart(s, g, s.observed)
            if found != 0:
                count_forced(s, expected, s.observed, WHY_FOREIGN_BREAK)
                make_live(s, found, request)
                return
    if s.state[g] == LIVE:
        give_back(s, g)
    if s.observed == 0:
        count_forced(s, expected, 0, WHY_FAILED)
        return
    overlap: cython.bint = adopt(s, s.observed, request, s.observed_word)
    why: cython.longlong = WHY_ADDRESS
    if s.observed_word & 4:
        why = WHY_OTHER_ARENA
    elif overlap:
        why = WHY_OVERLAP
    elif granule_of(s, s.observed - 16) == 0:
        why = WHY_OUTSIDE
    count_forced(s, expected, s.observed, why)


@cython.cfunc
def settle_mapped(s: State, request: cython.longlong) -> cython.void:
    """A mapping of its own was predicted: the base is the kernel's choice, the offset and the length are malloc's."""
    base: cython.longlong = s.observed - 16 - s.map_lead
    word: cython.longlong = s.observed_word
    size: cython.longlong = s.map_length - s.map_lead
    if (
        s.observed <= 0
        or s.observed > ADDRESS_LIMIT_BYTES
        or base & (s.page - 1)
        or (word != 0 and word & 2 == 0)
        or granule_of(s, base) != 0
    ):
        s.n_mmaps -= 1
        overlap: cython.bint = s.observed != 0 and adopt(s, s.observed, request, word)
        count_forced(s, 0, s.observed, WHY_OVERLAP if overlap else WHY_ADDRESS if s.observed else WHY_FAILED)
        return
    s.adopted_bases += 1
    length: cython.longlong = s.map_length
    if word != 0 and word != (size | 2):
        s.word_mismatches += 1
        if (word & -8) != size:
            length = (s.map_lead + (word & 0x7FFFFFFFFFF8) + s.page - 1) & -s.page
    if not block_add(s, s.observed, base, length, request, BLOCK_MAPPED):
        count_forced(s, 0, s.observed, WHY_OVERLAP)
    elif length != s.map_length:
        count_forced(s, 0, s.observed, WHY_SIZE)
    else:
        s.exact += 1


@cython.cfunc
def elsewhere(s: State, request: cython.longlong) -> cython.bint:
    """Deals with an allocation of an arena that is not modelled, and says so; False where it is the main arena's."""
    word: cython.longlong = s.observed_word
    if s.slot > 0 and s.tc_ready[s.slot] == TC_NONE and (word & 4 or word == 0):
        s.tc_other[s.slot] = 1
        s.tc_ready[s.slot] = TC_READY
        s.tc = s.slot * TCACHE_SLOTS
    if word & 4 == 0:
        if s.slot <= 0 or s.tc_other[s.slot] == 0 or s.observed == 0:
            return False
        return from_foreign_tcache(s, request)
    if s.slot > 0:
        s.tc_other[s.slot] = 1
    s.predicted += 1
    count_forced(s, 0, s.observed, WHY_OTHER_ARENA)
    adopt(s, s.observed, request, word)
    return True


@cython.cfunc
def from_foreign_tcache(s: State, request: cython.longlong) -> cython.bint:
    """A thread of another arena was given a block of the main one, out of its tcache, or a mapping. Always True."""
    n: cython.longlong = size_for(s, request)
    i: cython.longlong = s.tc + n - TCACHE_FIRST
    s.predicted += 1
    cached: cython.bint = n >= TCACHE_FIRST and tcache_fits(s, n) and s.tc_head[i] != 0
    if cached and address_of(s, s.tc_head[i]) + 16 == s.observed:
        confirm(s, tcache_get(s, n), request)
        return True
    count_forced(s, 0, s.observed, WHY_OTHER_ARENA)
    adopt(s, s.observed, request, s.observed_word)
    return True


@cython.cfunc
def on_malloc(s: State, request: cython.longlong, cached: cython.bint) -> cython.void:
    """malloc, and calloc where the tcache does not serve it."""
    if not elsewhere(s, request):
        settle(s, malloc_request(s, request, cached), request)


@cython.cfunc
def on_memalign(
    s: State, alignment: cython.longlong, request: cython.longlong, strict: cython.bint, rounded: cython.longlong
) -> cython.void:
    """The memalign family; `strict` where a wrong alignment is refused, `rounded` is what pvalloc makes of the
    request."""
    if elsewhere(s, request):
        return
    g: cython.longlong = FAILED
    if not strict or (alignment > 0 and alignment & (alignment - 1) == 0):
        g = memalign_request(s, alignment, rounded)
    settle(s, g, request)


@cython.cfunc
def on_free(s: State, address: cython.longlong, word: cython.longlong) -> cython.void:
    """free: the block is live in the heap, in the table, or nowhere that we know of."""
    if address == 0:
        return
    g: cython.longlong = granule_of(s, address - 16)
    if g != 0 and s.state[g] == LIVE:
        if word != 0 and word != word_at(s, g):
            word_differs(s, g, word)
        drop_live(s, g)
        if s.tc < 0 and not s.tc_lazy:
            free_starts_tcache(s)
        free_chunk(s, g)
        return
    i: cython.longlong = block_find(s, address)
    if i < 0:
        s.unknown_frees += 1
    elif s.b_kind[i] == BLOCK_MAPPED:
        unmap_block(s, i)
    else:
        block_remove(s, i)


@cython.cfunc
def free_starts_tcache(s: State) -> cython.void:
    """A thread's first call is a free. Other threads than the first are taken to have another arena."""
    if s.slot > 0 and s.tc_ready[s.slot] == TC_NONE:
        s.tc_other[s.slot] = 1
    tcache_maybe_init(s)


@cython.cfunc
def word_differs(s: State, g: cython.longlong, word: cython.longlong) -> cython.void:
    """Before a release, the chunk's word is not the predicted one: its size is corrected where it is plausible."""
    s.word_mismatches += 1
    n: cython.longlong = (word & 0x7FFFFFFFFFFFFFF8) >> 4
    if n == s.head[g] or word & 6:
        return
    requested: cython.longlong = s.head[g] * GRANULE_BYTES - s.link[g + 1]
    if carve(s, g, n) != 0:
        make_live(s, g, requested)


@cython.cfunc
def on_realloc(s: State, old: cython.longlong, request: cython.longlong, old_word: cython.longlong) -> cython.void:
    """realloc, by where the old block is."""
    if old == 0:
        on_malloc(s, request, True)
        return
    if request == 0:
        on_free(s, old, old_word)
        settle(s, FAILED, 0)
        return
    g: cython.longlong = granule_of(s, old - 16)
    if g != 0 and s.state[g] == LIVE:
        if old_word != 0 and old_word != word_at(s, g):
            word_differs(s, g, old_word)
        realloc_in_heap(s, g, request)
        return
    i: cython.longlong = block_find(s, old)
    if i >= 0 and s.b_kind[i] == BLOCK_MAPPED:
        realloc_mapped(s, i, request)
        return
    s.predicted += 1
    if i < 0:
        s.unknown_frees += 1
    elif s.observed != 0:
        block_remove(s, i)
    count_forced(s, 0, s.observed, WHY_UNKNOWN_OLD if i < 0 else WHY_OTHER_ARENA)
    if s.observed != 0:
        adopt(s, s.observed, request, s.observed_word)


@cython.cfunc
def realloc_in_heap(s: State, g: cython.longlong, request: cython.longlong) -> cython.void:
    """The sums change hands only once it is clear that the call succeeded."""
    stack: cython.longlong = s.link[g]
    requested: cython.longlong = s.head[g] * GRANULE_BYTES - s.link[g + 1]
    seq: cython.longlong = s.when[g]
    time: cython.longlong = s.when[g + 1]
    size: cython.longlong = s.head[g]
    moved: cython.longlong = realloc_chunk(s, g, request)
    if moved == FAILED and s.observed == 0:
        s.predicted += 1
        s.exact += 1
        return
    s.live_bytes -= requested
    s.live_blocks -= 1
    if moved == FAILED:
        # The model could not, and the program was given a block: the old one is gone.
        free_to_arena(s, g)
    settle(s, moved, request)
    if s.observed != 0:
        return
    # The call failed where the model succeeded: the old block is still the program's, as it was.
    now: cython.longlong = s.seq
    s.seq, s.time, s.stack = seq, time, stack & 0xFFFFFFFF
    if carve(s, g, size) != 0:
        make_live(s, g, requested)
    s.seq = now


@cython.cfunc
def realloc_mapped(s: State, i: cython.longlong, request: cython.longlong) -> cython.void:
    """realloc of a mapped block: mremap, whose result is the kernel's choice unless the mapping shrinks."""
    old: cython.longlong = s.b_key[i]
    length: cython.longlong = s.b_length[i]
    lead: cython.longlong = block_lead(s, i)
    fresh: cython.longlong = remap_length(s, i, request)
    if s.observed == 0:
        s.predicted += 1
        if fresh == length:
            count_forced(s, old, 0, WHY_FAILED)
            return
        # mremap failed; glibc then tries malloc, which looks through its bins before it fails as well.
        s.exact += 1
        if size_for(s, request) != 0:
            found: cython.longlong = malloc_request(s, request, True)
            if found > 0:
                give_back(s, found)
        return
    if fresh <= length and fresh != FAILED and s.observed != old:
        # Cannot have moved: whatever this is, it is adopted.
        s.predicted += 1
        block_remove(s, i)
        s.n_mmaps -= 1
        count_forced(s, old, s.observed, WHY_ADDRESS)
        adopt(s, s.observed, request, s.observed_word)
        return
    block_remove(s, i)
    if fresh == FAILED:
        s.n_mmaps -= 1
    s.map_length = fresh
    s.map_lead = lead
    settle(s, MAPPED if fresh != FAILED else FAILED, request)


@cython.cfunc
def on_break(s: State, now: cython.longlong) -> cython.void:
    """The program moved the break itself, or asked where it is. Below the heap's end it would have broken malloc."""
    if now < s.page or now >= ADDRESS_LIMIT_BYTES:
        return
    if s.top == 0 and not s.base_known:
        s.base = (now + 15) & -16
        s.base_known = True
    if now >= top_end(s):
        s.brk = now
    s.brk_queried = True


@cython.cfunc
def on_thread_end(s: State) -> cython.void:
    """A thread's tcache goes back to the arena, bins ascending, then its heads. The first thread's stays."""
    if s.slot <= 0 or s.tc_ready[s.slot] != TC_READY:
        return
    first: cython.longlong = s.slot * TCACHE_SLOTS
    s.tc_ready[s.slot] = TC_OFF
    i: cython.longlong = 0
    while i < TCACHE_SLOTS:
        while s.tc_head[first + i] != 0:
            s.tc = first
            g: cython.longlong = tcache_get(s, i + TCACHE_FIRST)
            s.tc = -1
            free_to_arena(s, g)
        i += 1
    s.tc = -1
    g = s.tc_struct[s.slot]
    if g != 0:
        s.tc_struct[s.slot] = 0
        free_to_arena(s, g)


@cython.cfunc
def result(s: State, expected: cython.longlong) -> cython.void:
    """malloc_trim and mallopt return a number."""
    s.predicted += 1
    if expected == s.observed:
        s.exact += 1
    else:
        count_forced(s, expected, s.observed, WHY_RESULT)


@cython.cfunc
def on_other(s: State, size: cython.longlong, arg: cython.longlong, arg2: cython.longlong) -> cython.void:
    """The rarer kinds of events."""
    kind: cython.longlong = s.kind
    if kind == KIND_MEMALIGN:
        bad: cython.bint = arg2 == 2 and arg & 7 != 0
        on_memalign(s, 0 if bad else arg, size, arg2 == 2 or (arg2 == 1 and s.aligned_alloc_strict), size)
    elif kind == KIND_VALLOC:
        on_memalign(s, s.page, size, False, size)
    elif kind == KIND_PVALLOC:
        # Refused where it would wrap around; before 2.30 somewhat earlier than that.
        rounded: cython.longlong = -1
        if 0 <= size <= PTRDIFF_MAX - s.page or (size < -2 * s.page - MIN_BYTES and not s.strict_limit):
            rounded = (size + s.page - 1) & -s.page
        elif size >= 0 and not s.strict_limit:
            rounded = size
        on_memalign(s, s.page, size, False, rounded)
    elif kind == KIND_MALLOC_TRIM:
        result(s, malloc_trim(s, size))
    elif kind == KIND_MALLOPT:
        result(s, mallopt(s, arg, size))
    elif kind == KIND_SBRK:
        if 0 < s.observed < ADDRESS_LIMIT_BYTES and -ADDRESS_LIMIT_BYTES < size < ADDRESS_LIMIT_BYTES:
            on_break(s, s.observed + size)
    elif kind == KIND_BRK:
        on_break(s, s.observed)
    elif kind == KIND_THREAD_END:
        on_thread_end(s)


@cython.cfunc
@cython.inline
def step(
    s: State, size: cython.longlong, arg: cython.longlong, arg2: cython.longlong, returned: cython.bint
) -> cython.void:
    """One event; its kind, result, word, stack and times are in the state."""
    kind: cython.longlong = s.kind
    if kind == KIND_FREE:
        on_free(s, s.observed, s.observed_word)
        return
    if kind > KIND_MALLOPT and kind != KIND_SBRK and kind != KIND_BRK and kind != KIND_THREAD_END:
        return
    # A call that was never seen to return, and has no result, tells nothing.
    if s.observed == 0 and not returned:
        return
    s.deny = s.observed == 0
    if s.deny:
        # No block was handed out, so there is no word before it, whatever a hostile trace claims.
        s.observed_word = 0
    s.grew = 0
    s.source = FROM_ARENA
    s.unbacked = False
    if kind == KIND_MALLOC:
        on_malloc(s, size, True)
    elif kind == KIND_CALLOC:
        on_malloc(s, size, s.calloc_tcache)
    elif kind == KIND_REALLOC:
        on_realloc(s, arg, size, arg2)
    else:
        s.deny = s.deny and kind != KIND_MALLOC_TRIM and kind != KIND_MALLOPT
        on_other(s, size, arg, arg2)


def run(
    s: State,
    kinds: cython.byte_view,
    threads: cython.uint_view,
    times: cython.long_view,
    seqs: cython.long_view,
    exits: cython.long_view,
    addresses: cython.long_view,
    sizes: cython.long_view,
    args: cython.long_view,
    args2: cython.long_view,
    words: cython.long_view,
    stacks: cython.uint_view,
    out: cython.long_view,
) -> None:
    """Feeds every event of the columns, in order; 64-bit columns as signed numbers.

    `out` has room for 7 figures an event, figure by figure: live bytes, live blocks, heap bytes, mapped bytes,
    free bytes, cached bytes, top bytes.
    """
    count: cython.longlong = len(kinds)
    i: cython.longlong
    for i in range(count):
        if threads[i] != s.thread:
            switch_thread(s, threads[i])
        s.kind = kinds[i]
        s.observed = addresses[i]
        s.observed_word = words[i]
        s.seq = seqs[i]
        s.time = times[i]
        s.stack = stacks[i]
        step(s, sizes[i], args[i], args2[i], exits[i] != 0)
        out[i] = s.live_bytes
        out[count + i] = s.live_blocks
        if s.top != 0:
            out[2 * count + i] = (s.top + s.head[s.top] - FIRST - s.foreign) * GRANULE_BYTES
            out[6 * count + i] = s.head[s.top] * GRANULE_BYTES
        out[3 * count + i] = s.mapped_bytes
        out[4 * count + i] = s.hole * GRANULE_BYTES
        out[5 * count + i] = s.cached * GRANULE_BYTES
