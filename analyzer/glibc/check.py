"""The invariants of a state as code. For tests: costs the whole heap."""

from __future__ import annotations

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.bins import bin_number
from heapledger.analyzer.glibc.chunk import State
from heapledger.analyzer.glibc.constants import (
    FAST_SLOTS,
    FASTBIN,
    FIRST,
    FOREIGN,
    FREE,
    GRANULE_BYTES,
    LIVE,
    TCACHE,
    TCACHE_FIRST,
    TCACHE_SLOTS,
    TCACHE_STRUCT,
    TOP,
    WHY_COUNT,
)


def check(s: State) -> None:
    """Raises AssertionError where the state is not one that malloc could be in."""
    sums = check_tiling(s)
    binned = check_bins(s)
    assert binned == sums[FREE], (binned, "granules in bins, free", sums[FREE])
    fast = check_fastbins(s)
    assert fast == sums[FASTBIN], (fast, "granules in fastbins, marked so", sums[FASTBIN])
    cached = check_tcaches(s)
    assert cached == sums[TCACHE], (cached, "granules in tcaches, marked so", sums[TCACHE])
    assert s.hole == sums[FREE], (s.hole, "granules counted free, are", sums[FREE])
    assert s.cached == sums[FASTBIN] + sums[TCACHE]
    assert s.foreign == sums[FOREIGN]
    check_blocks(s)
    assert s.exact + s.forced == s.predicted, f"{s.exact} + {s.forced} of {s.predicted}"
    reasons = [s.why[i] for i in range(WHY_COUNT)]
    assert reasons[0] == 0
    assert sum(reasons) == s.forced, f"{reasons} do not sum to {s.forced}"


def check_tiling(s: State) -> list[int]:
    """Chunks tile the heap; neighbours know each other. Returns granules by state."""
    sums = [0] * 16
    g: cython.longlong = FIRST
    before_free: cython.longlong = 0
    end: cython.longlong = s.top + s.head[s.top] if s.top else FIRST
    while g < end:
        n: cython.longlong = s.head[g]
        kind: cython.longlong = s.state[g]
        assert n > 0, f"no chunk at granule {g}"
        assert kind > 0, f"no chunk at granule {g}"
        assert s.prev[g] == before_free, f"chunk {g}: prev {s.prev[g]}, is {before_free}"
        assert not (before_free and kind in (FREE, TOP)), f"free neighbours at {g}"
        inside: cython.longlong
        for inside in range(g + 1, g + n):
            assert s.state[inside] == 0, f"a chunk at {inside} inside {g} + {n}"
        assert (kind == TOP) == (g == s.top)
        sums[kind] += n
        before_free = n if kind == FREE else 0
        g += n
    assert g == end, "chunks overrun the heap"
    return sums


def check_bins(s: State) -> int:
    """Lists are linked both ways, sorted, and hold chunks of their bin. Returns granules."""
    total: int = 0
    b: cython.longlong
    for b in range(1, 127):
        bin: cython.longlong = 2 * b
        g: cython.longlong = s.link[bin]
        before: cython.longlong = bin
        while g != bin:
            assert s.state[g] == FREE, f"bin {b} at {g}"
            assert s.link[g + 1] == before, f"bin {b} at {g}"
            assert b == 1 or bin_number(s.head[g]) == b, f"chunk of {s.head[g]} in bin {b}"
            assert b == 1 or (s.binmap[b >> 5] >> (b & 31)) & 1, f"bin {b} not marked"
            if b >= 64 and before != bin:
                assert s.head[g] <= s.head[before], f"bin {b} not sorted"
            if b >= 64:
                first: cython.bint = before == bin or s.head[before] != s.head[g]
                assert first == (s.link[g + 2] != 0), f"size ring of bin {b} at {g}"
                assert not first or s.link[s.link[g + 2] + 3] == g, f"size ring of bin {b} at {g}"
            total += s.head[g]
            before = g
            g = s.link[g]
        assert s.link[bin + 1] == before
    return total


def check_fastbins(s: State) -> int:
    """Returns granules."""
    total: int = 0
    n: cython.longlong
    for n in range(FAST_SLOTS):
        g: cython.longlong = s.fast[n]
        while g != 0:
            assert s.state[g] == FASTBIN, f"fastbin {n} at {g}"
            assert s.head[g] == n, f"fastbin {n} at {g}"
            total += n
            g = s.link[g]
    assert total == 0 or s.have_fast
    return total


def check_tcaches(s: State) -> int:
    """Returns granules."""
    total: int = 0
    i: cython.longlong
    for i in range(TCACHE_SLOTS * s.tc_slots):
        count: cython.longlong = 0
        g: cython.longlong = s.tc_head[i]
        while g != 0:
            assert s.state[g] == TCACHE, f"tcache {i} at {g}"
            assert s.head[g] == i % TCACHE_SLOTS + TCACHE_FIRST, f"tcache {i} at {g}"
            total += s.head[g]
            count += 1
            g = s.link[g]
        assert count == s.tc_count[i], f"tcache {i}: {count} chunks, {s.tc_count[i]} counted"
    for i in range(s.tc_slots):
        g = s.tc_struct[i]
        assert g == 0 or s.state[g] == TCACHE_STRUCT, f"tcache heads of slot {i} at {g}"
    return total


def check_blocks(s: State) -> None:
    """The sums of live blocks: in the heap and in the table."""
    live_bytes: int = 0
    live_blocks: int = 0
    g: cython.longlong = FIRST
    end: cython.longlong = s.top + s.head[s.top] if s.top else FIRST
    while g < end:
        if s.state[g] == LIVE:
            live_blocks += 1
            live_bytes += s.head[g] * GRANULE_BYTES - s.link[g + 1]
        g += s.head[g]
    used: int = 0
    i: cython.longlong
    for i in range(s.b_mask + 1):
        if s.b_key[i]:
            used += 1
            live_bytes += s.b_requested[i]
    assert used == s.b_used
    assert live_blocks + used == s.live_blocks, f"{live_blocks} + {used} live, {s.live_blocks} counted"
    assert live_bytes == s.live_bytes, f"{live_bytes} live, {s.live_bytes} counted"
