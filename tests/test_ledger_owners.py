"""Who owns memory that is not malloc's: kinds of mappings, and pieces that tile them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heapledger.analyzer.kernel.mappings import Region
from heapledger.analyzer.kernel.vma import Vma
from heapledger.analyzer.owners import Claims, ModuleSpan, OwnerKind, Piece, ThreadSpan, tile

PAGE = 4096
MIB = 1 << 20
LIB = "/usr/lib/libx.so.1"


def vma(start: int, pages: int, path: str = "", perms: str = "rw-p", anonymous: int = 0) -> Vma:
    nothing = np.zeros(0, np.uint32)
    return Vma(start, start + pages * PAGE, perms, 0, path, 0, 0, anonymous, 0, nothing, nothing.astype(np.uint8))


def found(vmas: list[Vma], claims: Claims | None = None) -> list[tuple[str, str, int]]:
    """(kind, name, pages) of each piece."""
    return [(str(p.kind), p.name, (p.end - p.start) // PAGE) for p in tile(vmas, claims or Claims())]


@pytest.mark.parametrize(
    ("mapping", "kind", "name"),
    [
        (vma(0, 1, "[stack]"), "stack", "main"),
        (vma(0, 1, "[vdso]", "r-xp"), "vdso", "[vdso]"),
        (vma(0, 1, "/memfd:cache (deleted)", "rw-s"), "shm", "/memfd:cache (deleted)"),
        (vma(0, 1, "/dev/shm/segment", "rw-p"), "shm", "/dev/shm/segment"),
        (vma(0, 1, "/SYSV00000000 (deleted)", "rw-s"), "shm", "/SYSV00000000 (deleted)"),
        (vma(0, 1, "", "rw-s"), "shm", "shared anonymous"),
        (vma(0, 1, "/usr/lib/locale/locale-archive", "r--p"), "file_mapping", "/usr/lib/locale/locale-archive"),
        (vma(0, 1, "/dev/shm/hl.1/77.0/ring.3", "rw-s"), "self", "spool"),
        (vma(0, 1, "/x/_preload/libheapledger.so", "r-xp"), "self", "libheapledger.so"),
        (vma(0, 1), "unexplained", "anonymous"),
        (vma(0, 1, "[heap]"), "foreign_sbrk", ""),
    ],
)
def test_a_mapping_by_its_name(mapping: Vma, kind: str, name: str) -> None:
    assert found([mapping]) == [(kind, name, 1)]


def test_an_objects_segments_are_told_apart_as_readelf_would() -> None:
    base = 0x7F00_0000_0000
    rows = [("r--p", 0), ("r-xp", 0), ("r--p", 0), ("r--p", PAGE), ("rw-p", PAGE)]
    vmas = [vma(base + i * PAGE, 1, LIB, perms, anonymous) for i, (perms, anonymous) in enumerate(rows)]
    vmas.append(vma(base + 5 * PAGE, 2))
    claims = Claims(modules=[ModuleSpan(LIB, base, base + 6 * PAGE + 100)])
    assert [kind for kind, _, _ in found(vmas, claims)] == [
        "library_rodata", "library_text", "library_rodata", "library_relro", "library_data", "library_bss",
    ]  # fmt: skip


def test_an_object_that_no_module_line_named_is_known_by_its_code() -> None:
    vmas = [vma(PAGE, 1, LIB, "r-xp"), vma(2 * PAGE, 1, LIB, "rw-p")]
    assert [kind for kind, _, _ in found(vmas)] == ["library_text", "library_data"]


def test_the_heap_wins_over_a_bss_that_reaches_into_it_and_what_lies_below_it_is_foreign() -> None:
    claims = Claims(modules=[ModuleSpan("/bin/x", 0, 3 * PAGE)], heap_start=2 * PAGE, heap_end=4 * PAGE)
    pieces = found([vma(PAGE, 5, "[heap]")], claims)
    assert pieces == [("library_bss", "/bin/x", 1), ("unexplained", "[heap]", 4)]


def test_a_threads_stack_has_its_control_block_at_the_high_end() -> None:
    low, high = 0x7F00_0000_0000, 0x7F00_0000_0000 + 16 * PAGE
    thread = ThreadSpan(2, "worker", high - 0x940, low, high)
    pieces = found([vma(low, 16)], Claims(threads=[thread], regions=[Region(low, high, 5, 0)]))
    assert pieces == [("thread_stack", "thread 2 (worker)", 15), ("tls", "thread 2 (worker)", 1)]


def test_the_main_threads_tls_is_the_small_mapping_around_its_thread_pointer() -> None:
    base = 0x7F00_0000_0000
    thread = ThreadSpan(0, "", base + 0x740, 0x7FFF_0000_0000, 0x7FFF_0001_0000)
    claims = Claims(threads=[thread], at_start=[(base, base + 3 * PAGE)])
    assert found([vma(base, 3)], claims) == [("tls", "thread 0", 3)]


def test_tls_does_not_swallow_a_large_mapping_that_was_merged_with_it() -> None:
    base = 0x7F00_0000_0000
    thread = ThreadSpan(0, "", base + 0x740, 0, 0)
    pieces = found([vma(base, 1024)], Claims(threads=[thread], at_start=[]))
    assert pieces[0][0] == "tls"
    assert pieces[1][0] == "unexplained"
    assert pieces[0][2] < 32


def test_memory_of_the_program_is_named_by_its_mmap_calls() -> None:
    base = 0x7F00_0000_0000
    regions = [Region(base, base + 2 * PAGE, 7, 0), Region(base + 3 * PAGE, base + 9 * PAGE, 8, 0)]
    pieces = tile([vma(base, 4)], Claims(regions=regions))
    assert [(p.kind, p.stack, (p.end - p.start) // PAGE) for p in pieces] == [
        (OwnerKind.MMAP, 7, 2),
        (OwnerKind.UNEXPLAINED, 0, 1),
        (OwnerKind.MMAP, 8, 1),
    ]


def test_anonymous_memory_from_before_the_first_call_is_the_loaders() -> None:
    base = 0x7F00_0000_0000
    assert found([vma(base, 2)], Claims(at_start=[(base, base + PAGE)])) == [
        ("loader", "ld.so", 1),
        ("unexplained", "anonymous", 1),
    ]


def test_without_the_maps_at_the_start_small_pieces_between_objects_are_the_loaders() -> None:
    base = 0x7F00_0000_0000
    modules = [ModuleSpan(LIB, base, base + PAGE)]
    vmas = [vma(base + 4 * PAGE, 2), vma(base + 64 * MIB, 2)]
    assert [kind for kind, _, _ in found(vmas, Claims(modules=modules))] == ["loader", "unexplained"]


def test_a_heap_of_another_arena_is_known_by_its_border_or_by_a_block_in_it() -> None:
    base = 0x7F00_0000_0000
    used, rest = vma(base, 33), vma(base + 33 * PAGE, (64 * MIB) // PAGE - 33, perms="---p")
    assert found([used, rest])[0][0] == "arena_unmodelled"
    assert found([vma(base + PAGE, 1)], Claims(arena_blocks=[base + PAGE + 64]))[0][0] == "arena_unmodelled"
    assert found([used])[0][0] == "unexplained"


def test_the_shims_own_memory_wins_over_everything() -> None:
    base = 0x1000_0000_0000
    claims = Claims(self_low=base, self_high=base + 2 * PAGE, regions=[Region(base, base + 4 * PAGE, 1, 0)])
    assert [kind for kind, _, _ in found([vma(base, 4)], claims)] == ["self", "mmap"]


PAGES = st.integers(1, 60)


@st.composite
def span(draw: st.DrawFn) -> tuple[int, int]:
    low = draw(PAGES)
    return low * PAGE, draw(st.integers(low, 64)) * PAGE


@given(
    st.lists(st.tuples(PAGES, st.integers(1, 9), st.sampled_from(["", "[heap]", "[stack]", LIB]))),
    st.lists(span()),
    st.lists(span()),
    st.lists(st.tuples(span(), st.integers(0, 64 * PAGE))),
    span(),
    span(),
)
def test_pieces_tile_every_mapping_whatever_is_claimed(
    mapped: list[tuple[int, int, str]],
    regions: list[tuple[int, int]],
    modules: list[tuple[int, int]],
    threads: list[tuple[tuple[int, int], int]],
    own: tuple[int, int],
    heap: tuple[int, int],
) -> None:
    vmas: list[Vma] = []
    for page, count, path in sorted(mapped):
        if not vmas or page * PAGE >= vmas[-1].end:
            vmas.append(vma(page * PAGE, count, path))
    claims = Claims(
        modules=[ModuleSpan(LIB, low, high) for low, high in modules],
        threads=[ThreadSpan(i, "", pointer, low, high) for i, ((low, high), pointer) in enumerate(threads)],
        regions=[Region(low, high, 1, 0) for low, high in regions],
        self_low=own[0], self_high=own[1], heap_start=heap[0], heap_end=heap[1],
    )  # fmt: skip
    pieces = tile(vmas, claims)
    check_tiling(vmas, pieces)


def check_tiling(vmas: list[Vma], pieces: list[Piece]) -> None:
    covered: list[tuple[int, int]] = []
    for piece in pieces:
        assert piece.start < piece.end
        if covered and covered[-1][1] == piece.start and not any(v.start == piece.start for v in vmas):
            covered[-1] = (covered[-1][0], piece.end)
        else:
            covered.append((piece.start, piece.end))
    assert covered == [(v.start, v.end) for v in vmas]
