"""The books: every resident byte has one owner, found here by painting each byte apart."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heapledger.analyzer.glibc.states import ChunkState
from heapledger.analyzer.kernel.residency import Residency, from_vmas
from heapledger.analyzer.kernel.vma import Vma, sane
from heapledger.analyzer.ledger import HeapState, Ledger, balance
from heapledger.analyzer.owners import Claims, OwnerKind
from heapledger.analyzer.replay import ChunkTable, LiveTable
from heapledger.store.residency import HUGE, Category

PAGE = 4096
HEAP = 0x5555_0000_0000
LIVE, FREE, TCACHE, TOP = ChunkState.LIVE, ChunkState.FREE, ChunkState.TCACHE, ChunkState.TOP


def vma(start: int, categories: list[int], path: str = "", perms: str = "rw-p", **fields: Any) -> Vma:
    """A mapping with one page of each of `categories`."""
    plain = [c & 0x0F for c in categories]
    resident = sum(c in (Category.ANON, Category.FILE) for c in plain) * PAGE
    values: dict[str, Any] = {
        "offset": 0, "inode": 0, "rss_bytes": resident, "swap_bytes": 0,
        "anonymous_bytes": plain.count(Category.ANON) * PAGE,
        "run_pages": np.ones(len(categories), np.uint32), "run_category": np.array(categories, np.uint8),
    }  # fmt: skip
    return Vma(start=start, end=start + len(categories) * PAGE, perms=perms, path=path, **(values | fields))


def chunk_table(rows: list[tuple[int, int, int, int]], start: int = HEAP) -> ChunkTable:
    """Chunks of (size, state, requested, stack) that follow one another from `start`."""
    sizes = np.array([r[0] for r in rows], np.uint64)
    starts = np.uint64(start) + np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.uint64)
    count = len(rows)
    return ChunkTable(
        start=starts[:count],
        size=sizes,
        state=np.array([r[1] for r in rows], np.uint8),
        requested=np.array([r[2] for r in rows], np.uint64),
        stack=np.array([r[3] for r in rows], np.uint32),
        seq=np.arange(count, dtype=np.uint64),
        time=np.arange(count, dtype=np.uint64) * np.uint64(1000),
        arena=np.zeros(count, np.uint32),
    )


def live_table(rows: list[tuple[int, int, int, int, bool]]) -> LiveTable:
    """Live blocks of (address, requested, stack, chunk size, mmapped)."""
    rows = sorted(rows)
    return LiveTable(
        address=np.array([r[0] for r in rows], np.uint64),
        requested=np.array([r[1] for r in rows], np.uint64),
        stack=np.array([r[2] for r in rows], np.uint32),
        seq=np.zeros(len(rows), np.uint64),
        time=np.zeros(len(rows), np.uint64),
        chunk_size=np.array([r[3] for r in rows], np.uint64),
        mmapped=np.array([r[4] for r in rows], np.bool_),
    )


def heap_state(rows: list[tuple[int, int, int, int]]) -> HeapState:
    """A heap of these chunks and nothing else."""
    table = chunk_table(rows)
    live = [
        (int(s) + 16, int(q), int(k), int(z), False)
        for s, z, state, q, k in zip(table.start, table.size, table.state, table.requested, table.stack, strict=True)
        if state == LIVE
    ]
    end = int(table.start[-1] + table.size[-1]) if rows else HEAP
    return HeapState(table, chunk_table([]), live_table(live), HEAP if rows else 0, end if rows else 0)


def kinds(ledger: Ledger) -> Counter[str]:
    """Resident bytes by kind."""
    found = Counter({str(OwnerKind.LIVE): ledger.live_rss_bytes})
    for owner in ledger.owners:
        found[str(owner.kind)] += owner.rss_bytes
    return +found


def claims_of(state: HeapState) -> Claims:
    return Claims(heap_start=state.heap_start, heap_end=state.heap_end)


# ---- residency


@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 1 | HUGE]), min_size=1, max_size=20), st.data())
def test_resident_bytes_between_any_two_addresses_are_those_of_a_byte_by_byte_count(
    categories: list[int], data: st.DataObject
) -> None:
    base = 0x1000_0000
    residency, estimated = from_vmas([vma(base, categories)])
    bytes_of = np.repeat([c & 15 in (1, 2) for c in categories], PAGE)
    low = data.draw(st.integers(0, len(bytes_of)))
    high = data.draw(st.integers(low, len(bytes_of)))
    assert residency.between([base + low], [base + high])[0] == bytes_of[low:high].sum()
    assert not estimated


def test_zero_pages_and_swapped_ones_are_not_resident() -> None:
    residency, _ = from_vmas([vma(PAGE, [Category.ZERO, Category.SWAP, Category.ABSENT])])
    assert residency.total_bytes == 0


def test_counts_without_a_page_map_are_spread_evenly_and_marked_as_an_estimate() -> None:
    nothing = np.zeros(0, np.uint32)
    counted = vma(PAGE, [1] * 8, run_pages=nothing, run_category=nothing.astype(np.uint8), rss_bytes=4 * PAGE)
    residency, estimated = from_vmas([counted])
    assert estimated
    assert residency.total_bytes == 4 * PAGE
    assert residency.between([PAGE], [5 * PAGE])[0] == 2 * PAGE


def test_an_empty_residency_has_nothing_anywhere() -> None:
    nothing = np.zeros(0, np.int64)
    assert Residency(nothing, nothing).between([0, 5], [2**63, 2**64 - 1]).tolist() == [0, 0]


def test_mappings_that_lie_on_one_another_are_taken_once() -> None:
    overlapping = [vma(PAGE, [1, 1]), vma(2 * PAGE, [1, 1]), vma(4 * PAGE, [1]), vma(2**64 - 2 * PAGE, [0])]
    assert [v.start for v in sane(overlapping)] == [PAGE, 4 * PAGE]


# ---- chunks


def test_a_live_blocks_requested_bytes_go_to_its_site_and_the_rest_is_overhead() -> None:
    state = heap_state([(48, LIVE, 30, 7), (PAGE - 48, TOP, 0, 0)])
    ledger = balance([vma(HEAP, [1], "[heap]")], state, claims_of(state))
    ledger.check()
    assert ledger.sites[0].stack.tolist() == [7]
    assert ledger.sites[0].rss_bytes.tolist() == [30]
    # Chunk 0 owns [8, 56): 8 bytes of size word, 30 requested, 10 rounding. The heap's first 8 bytes are the arena's.
    assert kinds(ledger) == {"live": 30, "chunk_overhead": 18, "arena": 8, "top": PAGE - 56}


def test_a_block_of_no_bytes_counts_as_a_block() -> None:
    state = heap_state([(32, LIVE, 0, 7), (PAGE - 32, TOP, 0, 0)])
    ledger = balance([vma(HEAP, [1], "[heap]")], state, claims_of(state))
    assert ledger.sites[0].blocks.tolist() == [1]
    assert kinds(ledger)["chunk_overhead"] == 32


def test_a_free_chunk_is_reclaimable_only_in_whole_pages_behind_its_first_48_bytes() -> None:
    # From 16 to 3 pages and 16: malloc_trim starts at page_up(16 + 48), and ends at page_down(3 * PAGE + 16).
    state = heap_state([(16, ChunkState.FENCE, 0, 0), (3 * PAGE, FREE, 0, 0), (PAGE - 16, TOP, 0, 0)])
    ledger = balance([vma(HEAP, [1] * 4, "[heap]")], state, claims_of(state))
    assert kinds(ledger)["hole_reclaimable"] == 2 * PAGE
    assert kinds(ledger)["hole_pinned"] == PAGE


def test_a_free_chunk_whose_start_is_within_48_bytes_of_a_page_border_keeps_that_page() -> None:
    state = heap_state([(PAGE - 32, LIVE, 8, 1), (PAGE + 32, FREE, 0, 0), (PAGE, TOP, 0, 0)])
    ledger = balance([vma(HEAP, [1] * 3, "[heap]")], state, claims_of(state))
    assert kinds(ledger)["hole_reclaimable"] == 0


def test_a_mapped_block_splits_into_overhead_before_the_block_and_behind() -> None:
    base = 0x7F00_0000_0000
    state = heap_state([])
    state.mapped = chunk_table([(2 * PAGE, LIVE, 0, 0)], base)
    state.live = live_table([(base + 64, 5000, 9, 2 * PAGE, True)])
    ledger = balance([vma(base, [1, 1])], state, Claims())
    ledger.check()
    assert kinds(ledger) == {"live": 5000, "chunk_overhead": 2 * PAGE - 5000}


def test_only_the_resident_part_of_a_block_counts() -> None:
    state = heap_state([(4 * PAGE, LIVE, 4 * PAGE - 8, 3), (PAGE, TOP, 0, 0)])
    ledger = balance([vma(HEAP, [1, 0, 1, 0, 1], "[heap]")], state, claims_of(state))
    # The first page less the 16 bytes before the block, the third, and the first 8 bytes of the fifth.
    assert ledger.live_rss_bytes == PAGE - 16 + PAGE + 8
    assert ledger.sites[0].requested_bytes.tolist() == [4 * PAGE - 8]


def test_blocks_of_other_arenas_are_live_and_the_rest_of_their_heap_is_one_sum() -> None:
    base = 0x7F00_0000_0000
    state = heap_state([])
    state.live = live_table([(base + 0x100, 100, 5, 112, False)])
    claims = Claims(arena_blocks=[base + 0x100])
    ledger = balance([vma(base, [1, 1])], state, claims)
    assert kinds(ledger) == {"live": 100, "chunk_overhead": 12, "arena_unmodelled": 2 * PAGE - 112}


def test_blocks_from_before_the_fork_keep_the_call_stacks_of_the_parent() -> None:
    state = heap_state([(32, LIVE, 24, 1), (32, LIVE, 24, 1), (PAGE - 64, TOP, 0, 0)])  # at 0 ns and at 1,000 ns
    ledger = balance([vma(HEAP, [1], "[heap]")], state, claims_of(state), own_since=(500, 0))
    assert [(s.origin, s.blocks.tolist()) for s in ledger.sites] == [(0, [1]), (1, [1])]


def test_heap_memory_behind_the_models_break_is_unexplained() -> None:
    state = heap_state([(PAGE, TOP, 0, 0)])
    ledger = balance([vma(HEAP, [1, 1], "[heap]")], state, claims_of(state))
    assert ledger.unexplained_bytes == PAGE


# ---- identity, against a count byte by byte

SIZES = st.integers(2, 700).map(lambda n: n * 16)
CHUNKS = st.lists(
    st.tuples(SIZES, st.sampled_from(list(ChunkState)), st.integers(0, 12_000), st.integers(0, 3)),
    min_size=1,
    max_size=14,
)


def painted(state: HeapState, pages: list[int]) -> Counter[str]:
    """Resident bytes by kind, with an owner for every single byte: the rules again, by hand."""
    table, owner = state.chunks, np.full(len(pages) * PAGE, "unexplained", object)
    owner[:8] = "arena"
    end_of_heap = state.heap_end - HEAP
    for start, size, code, requested in zip(table.start, table.size, table.state, table.requested, strict=True):
        c, s, q = int(start) - HEAP, int(size), int(requested)
        e = min(c + s + 8, end_of_heap)
        if code == LIVE:
            owner[c + 8 : e] = "chunk_overhead"
            owner[c + 16 : min(c + 16 + q, e)] = "live"
        elif code == FREE:
            owner[c + 8 : e] = "hole_pinned"
            low, high = -(-(c + 48) // PAGE) * PAGE, (c + s) // PAGE * PAGE
            owner[low : max(low, high)] = "hole_reclaimable"
        else:
            names = {TCACHE: "tcache", ChunkState.FASTBIN: "fastbin", TOP: "top", ChunkState.FOREIGN: "foreign_sbrk"}
            owner[c + 8 : e] = names.get(ChunkState(code), "arena")
    resident = np.repeat([p in (1, 2) for p in pages], PAGE)
    return Counter(owner[resident].tolist())


@given(CHUNKS, st.data())
@settings(max_examples=60, deadline=None)
def test_owners_of_a_heap_are_those_that_painting_every_byte_finds(
    rows: list[tuple[int, ChunkState, int, int]], data: st.DataObject
) -> None:
    rows = [
        (size, state, min(requested, size - 8) if state == LIVE else 0, stack) for size, state, requested, stack in rows
    ]
    state = heap_state([(a, int(b), c, d) for a, b, c, d in rows])
    count = -(-(state.heap_end - HEAP) // PAGE)
    pages = data.draw(st.lists(st.sampled_from([0, 1, 3]), min_size=count, max_size=count))
    ledger = balance([vma(HEAP, pages, "[heap]")], state, claims_of(state))
    ledger.check()
    assert kinds(ledger) == painted(state, pages)


ADDRESS = st.integers(0, 2**48 // PAGE).map(lambda n: n * PAGE + 16) | st.integers(0, 40 * PAGE)


@given(
    st.lists(
        st.tuples(ADDRESS, st.integers(0, 2**48), st.integers(0, 5), st.integers(0, 2**48), st.booleans()), max_size=12
    ),
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=6)), max_size=8
    ),
    CHUNKS,
    st.integers(0, 30 * PAGE),
)
@settings(max_examples=80, deadline=None)
def test_whatever_the_chunks_claim_no_byte_is_booked_twice_or_lost(
    live: list[tuple[int, int, int, int, bool]],
    mapped: list[tuple[int, list[int]]],
    rows: list[tuple[int, ChunkState, int, int]],
    start: int,
) -> None:
    vmas = [vma(page * PAGE, categories) for page, categories in mapped]
    chunks = chunk_table([(a, int(b), c, d) for a, b, c, d in rows], start)
    state = HeapState(
        chunks, chunk_table([(3 * PAGE, LIVE, 0, 0)], 5 * PAGE), live_table(live), start, start + 10 * PAGE
    )
    ledger = balance(vmas, state, claims_of(state))
    ledger.check()
    assert ledger.resident_bytes == from_vmas(sane(vmas))[0].total_bytes


@pytest.mark.parametrize("count", [0, 1, 40_000])
def test_sums_over_many_blocks_are_exact(count: int) -> None:
    state = heap_state([*((32, LIVE, 24, i % 1000) for i in range(count)), (PAGE, TOP, 0, 0)])
    pages = -(-(state.heap_end - HEAP) // PAGE)
    ledger = balance([vma(HEAP, [1] * pages, "[heap]")], state, claims_of(state))
    ledger.check()
    assert sum(int(s.blocks.sum()) for s in ledger.sites) == count
    assert ledger.live_rss_bytes == count * 24


def test_a_block_at_the_very_bottom_of_memory_does_not_reach_below_it() -> None:
    state = heap_state([])
    state.live = live_table([(1, 100, 5, 32, False), (2, 2**63, 5, 2**63, False)])
    ledger = balance([vma(0, [1])], state, Claims())
    ledger.check()
    assert ledger.resident_bytes == PAGE
