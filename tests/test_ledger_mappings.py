"""The program's own mappings: MMAP, MUNMAP and MREMAP events against a table of single pages."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from heapledger.analyzer.kernel.mappings import MAP_FAILED, Mappings
from heapledger.store.events import Events, Kind

PAGE = 4096


def events(*rows: dict[str, Any]) -> Events:
    """Events with the given columns; seq counts up."""
    found = Events.empty(len(rows))
    for i, row in enumerate(rows):
        found.seq[i] = i + 1
        for name, value in row.items():
            getattr(found, name)[i] = np.uint64(value & (2**64 - 1)).astype(getattr(found, name).dtype)
    return found


def fed(*rows: dict[str, Any]) -> Mappings:
    mappings = Mappings()
    mappings.feed(events(*rows))
    mappings.check()
    return mappings


def spans(mappings: Mappings) -> list[tuple[int, int, int]]:
    return [(r.start // PAGE, r.end // PAGE, r.stack) for r in mappings.regions()]


def mmap(page: int, pages: int, stack: int = 1) -> dict[str, int]:
    return {"kind": Kind.MMAP, "addr": page * PAGE, "size": pages * PAGE, "stack": stack}


def munmap(page: int, pages: int, result: int = 0) -> dict[str, int]:
    return {"kind": Kind.MUNMAP, "addr": page * PAGE, "size": pages * PAGE, "arg": result}


def test_a_hole_in_the_middle_leaves_both_ends() -> None:
    assert spans(fed(mmap(10, 10), munmap(13, 2))) == [(10, 13, 1), (15, 20, 1)]


def test_a_mapping_on_top_of_another_replaces_it() -> None:
    assert spans(fed(mmap(10, 10, 1), mmap(12, 3, 2))) == [(10, 12, 1), (12, 15, 2), (15, 20, 1)]


def test_what_failed_changes_nothing() -> None:
    failed = {"kind": Kind.MMAP, "addr": MAP_FAILED, "size": PAGE}
    unmoved = {"kind": Kind.MREMAP, "addr": MAP_FAILED, "size": PAGE, "arg": 10 * PAGE, "word": PAGE}
    assert spans(fed(mmap(10, 2), failed, unmoved, munmap(10, 1, result=-1))) == [(10, 12, 1)]


def test_mremap_moves_the_memory_and_takes_its_own_call_site() -> None:
    moved = {"kind": Kind.MREMAP, "addr": 50 * PAGE, "size": 8 * PAGE, "arg": 10 * PAGE, "word": 4 * PAGE, "stack": 3}
    assert spans(fed(mmap(10, 6, 1), moved)) == [(14, 16, 1), (50, 58, 3)]


def test_a_length_that_is_no_whole_page_is_rounded_up() -> None:
    assert spans(fed({"kind": Kind.MMAP, "addr": PAGE, "size": 1, "stack": 1})) == [(1, 2, 1)]


def test_nonsense_is_ignored() -> None:
    wild = [
        mmap(0, 5),
        {"kind": Kind.MMAP, "addr": PAGE, "size": 2**64 - 1},
        {"kind": Kind.MMAP, "addr": 2**63, "size": 1},
    ]
    assert spans(fed(*wild, {"kind": Kind.MUNMAP, "addr": 2**64 - 1, "size": 2**64 - 1})) == []


def test_a_copy_goes_its_own_way() -> None:
    mappings = fed(mmap(1, 4))
    copy = mappings.copy()
    copy.remove(PAGE, 4 * PAGE)
    assert len(mappings) == 1
    assert len(copy) == 0


CALLS = st.tuples(st.booleans(), st.integers(1, 30), st.integers(1, 12))


@given(st.lists(CALLS, max_size=40))
def test_any_sequence_maps_the_pages_that_a_page_table_would(calls: list[tuple[bool, int, int]]) -> None:
    mappings, pages = Mappings(), dict[int, int]()
    for number, (is_map, page, count) in enumerate(calls, 1):
        mappings.feed(events(mmap(page, count, number) if is_map else munmap(page, count)))
        for each in range(page, page + count):
            pages.pop(each, None)
            if is_map:
                pages[each] = number
        mappings.check()
    found = {p: r.stack for r in mappings.regions() for p in range(r.start // PAGE, r.end // PAGE)}
    assert found == pages
