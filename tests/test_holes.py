"""Holes and their pins, on heaps written down by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from heapledger.analyzer.glibc.states import ChunkState
from heapledger.analyzer.holes import Holes, find_holes
from heapledger.analyzer.kernel.maps_check import compare
from heapledger.analyzer.kernel.residency import Residency
from heapledger.analyzer.kernel.vma import Vma
from heapledger.analyzer.ledger import HeapState
from heapledger.analyzer.replay import ChunkTable, LiveTable

PAGE = 4096
HEAP = 0x5555_0000_0000
LIVE, FREE, TCACHE, FASTBIN, TOP = (
    ChunkState.LIVE,
    ChunkState.FREE,
    ChunkState.TCACHE,
    ChunkState.FASTBIN,
    ChunkState.TOP,
)


def table(rows: list[tuple[int, int]], start: int = HEAP) -> ChunkTable:
    """Chunks of (size, state); a live one asks for all it can, has stack = its index, and was made at index µs."""
    size = np.array([r[0] for r in rows], np.uint64)
    state = np.array([r[1] for r in rows], np.uint8)
    index = np.arange(len(rows))
    before = np.concatenate(([0], np.cumsum(size)[:-1])).astype(np.uint64)[: len(rows)]
    return ChunkTable(
        start=np.uint64(start) + before,
        size=size,
        state=state,
        requested=np.where(state == LIVE, size - np.uint64(8), 0).astype(np.uint64),
        stack=index.astype(np.uint32),
        seq=index.astype(np.uint64),
        time=index.astype(np.uint64) * np.uint64(1000),
        arena=np.zeros(len(rows), np.uint32),
    )


def holes_of(rows: list[tuple[int, int]], limit: int = 100, resident: bool = True) -> Holes:
    """The holes of a heap whose pages are all resident, or none."""
    total = sum(size for size, _ in rows)
    pages = -(-total // PAGE) * PAGE * resident
    residency = Residency(np.array([HEAP], np.int64), np.array([pages], np.int64))
    empty = np.zeros(0, np.uint64)
    live = LiveTable(empty, empty, empty.astype(np.uint32), empty, empty, empty, empty.astype(np.bool_))
    return find_holes(HeapState(table(rows), table([]), live, HEAP, HEAP + total), residency, limit=limit)


def test_a_hole_is_pinned_by_the_live_chunk_above_it() -> None:
    found = holes_of([(64, LIVE), (3 * PAGE, FREE), (48, LIVE), (PAGE, TOP)])
    assert found.count == 1
    hole = found.holes[0]
    assert (hole.address, hole.bytes, hole.resident_bytes, hole.held_by) == (HEAP + 64, 3 * PAGE, 3 * PAGE, "live")
    assert hole.pin is not None
    assert (hole.pin.address, hole.pin.bytes, hole.pin.stack, hole.pin.time) == (HEAP + 64 + 3 * PAGE + 16, 40, 2, 2000)
    assert found.break_pin == hole.pin


def test_neighbouring_free_chunks_are_one_hole() -> None:
    found = holes_of([(64, FREE), (128, FREE), (48, LIVE), (PAGE, TOP)])
    assert [(h.bytes, h.address) for h in found.holes] == [(192, HEAP)]


def test_a_cached_chunk_holds_the_hole_and_the_pin_lies_behind_it() -> None:
    found = holes_of([(64, FREE), (48, TCACHE), (32, FASTBIN), (96, LIVE), (PAGE, TOP)])
    assert found.holes[0].held_by == "tcache"
    assert found.holes[0].pin is not None
    assert found.holes[0].pin.bytes == 88


def test_a_hole_under_nothing_live_has_no_pin() -> None:
    found = holes_of([(64, LIVE), (64, FREE), (32, FASTBIN), (PAGE, TOP)])
    assert found.holes[0].pin is None
    assert found.holes[0].held_by == "fastbin"
    assert found.break_pin is not None
    assert found.holes_below_pin_bytes == 0
    assert found.pins == []


def test_holes_come_by_resident_bytes_and_sums_include_those_not_listed() -> None:
    found = holes_of([(64, FREE), (32, LIVE), (128, FREE), (32, LIVE), (96, FREE), (32, LIVE), (PAGE, TOP)], limit=2)
    assert [h.bytes for h in found.holes] == [128, 96]
    assert (found.count, found.total_bytes, found.total_resident_bytes) == (3, 288, 288)


def test_memory_that_was_given_back_is_free_but_not_resident() -> None:
    found = holes_of([(9 * PAGE, FREE), (32, LIVE), (PAGE, TOP)], resident=False)
    assert (found.total_bytes, found.total_resident_bytes, found.total_reclaimable_bytes) == (9 * PAGE, 0, 0)


def test_the_top_gives_back_all_but_33_bytes_in_whole_pages() -> None:
    found = holes_of([(PAGE - 16, LIVE), (2 * PAGE + 16, TOP)])
    assert found.top is not None
    # page_floor(2 * PAGE + 16 - 33) is one page.
    assert (found.top.bytes, found.top.reclaimable_bytes) == (2 * PAGE + 16, PAGE)


def test_an_empty_heap_has_no_holes() -> None:
    found = holes_of([])
    assert (found.count, found.holes, found.top, found.break_pin) == (0, [], None, None)


CHUNKS = st.lists(st.tuples(st.integers(2, 600).map(lambda n: 16 * n), st.sampled_from(list(ChunkState))), max_size=30)


@given(CHUNKS)
@settings(deadline=None)
def test_in_any_heap_reclaimable_is_within_resident_and_a_pin_is_the_next_live_chunk(
    rows: list[tuple[int, int]],
) -> None:
    found = holes_of(rows)
    chunks = table(rows)
    free = [int(s) for (_, state), s in zip(rows, chunks.size, strict=True) if state == FREE]
    assert found.total_bytes == sum(free)
    assert sum(p.holes for p in found.pins) == sum(h.pin is not None for h in found.holes)
    for hole in found.holes:
        assert 0 <= hole.reclaimable_bytes <= hole.resident_bytes <= hole.bytes
        end = hole.address + hole.bytes
        above = [int(c) for c, s in zip(chunks.start, chunks.state, strict=True) if s == LIVE and c >= end]
        assert (hole.pin.address - 16 if hole.pin else None) == (min(above) if above else None)


# ---- the model's mappings against the kernel's


def vma(start: int, end: int, path: str = "", perms: str = "rw-p") -> Vma:
    nothing = np.zeros(0, np.uint32)
    return Vma(start, end, perms, 0, path, 0, 0, 0, 0, nothing, nothing.astype(np.uint8))


def test_a_heap_that_ends_where_it_should_is_exact() -> None:
    heap = [vma(HEAP, HEAP + 8 * PAGE, "[heap]")]
    good = compare(heap, table([]), heap_start=HEAP, heap_end=HEAP + 8 * PAGE - 100, start_break=HEAP)
    assert (good.compared, good.exact) == (1, 1)
    bad = compare(heap, table([]), heap_start=HEAP, heap_end=HEAP + 9 * PAGE, start_break=HEAP)
    assert (bad.compared, bad.exact) == (1, 0)
    assert "[heap] is" in bad.differences[0]


def test_a_heap_only_one_of_the_two_knows_is_a_difference() -> None:
    missing = compare([], table([]), heap_start=HEAP, heap_end=HEAP + PAGE)
    assert (missing.compared, missing.exact) == (1, 0)
    unknown = compare([vma(HEAP, HEAP + PAGE, "[heap]")], table([]), heap_start=0, heap_end=0, start_break=HEAP)
    assert (unknown.compared, unknown.exact) == (1, 0)


def test_each_mapped_chunk_must_lie_wholly_in_writable_anonymous_memory() -> None:
    base = 0x7F00_0000_0000
    mapped = table([(4 * PAGE, LIVE), (4 * PAGE, LIVE)], base)
    both = compare([vma(base - PAGE, base + 9 * PAGE)], mapped, heap_start=0, heap_end=0)
    assert (both.compared, both.exact) == (2, 2)
    cut = compare([vma(base, base + 7 * PAGE)], mapped, heap_start=0, heap_end=0)
    assert (cut.compared, cut.exact) == (2, 1)
    locked = compare([vma(base, base + 8 * PAGE, perms="---p")], mapped, heap_start=0, heap_end=0)
    assert locked.exact == 0
