"""Blocks not freed, summed by call stack, and the names of call sites."""

from __future__ import annotations

import numpy as np
import pytest

from heapledger.analyzer.leaks.not_freed import not_freed
from heapledger.analyzer.replay import LiveTable
from heapledger.analyzer.sites import Frame, fingerprint, is_wrapper, short_function, site_name, site_of


def live(*rows: tuple[int, int, int]) -> LiveTable:
    """Blocks of (requested, stack, time)."""
    count = len(rows)
    return LiveTable(
        address=np.arange(1, count + 1, dtype=np.uint64) * np.uint64(64),
        requested=np.array([r[0] for r in rows], np.uint64),
        stack=np.array([r[1] for r in rows], np.uint32),
        seq=np.arange(count, dtype=np.uint64),
        time=np.array([r[2] for r in rows], np.uint64),
        chunk_size=np.zeros(count, np.uint64),
        mmapped=np.zeros(count, np.bool_),
    )


def frame(
    function: str, file: str | None = None, line: int | None = None, module: str = "/bin/x", offset: int = 5
) -> Frame:
    return Frame(function, file, line, module, 0x5000 + offset, False, offset)


def test_blocks_of_one_call_stack_are_one_entry_with_its_oldest_and_newest_block() -> None:
    found = not_freed(live((10, 1, 700), (20, 2, 5), (30, 1, 300)))
    assert [(f.stack, f.bytes, f.blocks, f.oldest_ns, f.newest_ns) for f in found] == [
        (1, 40, 2, 300, 700),
        (2, 20, 1, 5, 5),
    ]


def test_nothing_live_is_nothing_leaked() -> None:
    assert not_freed(live()) == []


def test_a_childs_own_blocks_come_before_larger_ones_it_inherited() -> None:
    found = not_freed(live((1000, 4, 10), (8, 4, 99), (500, 4, 2)), own_since=(50, 5, 0))
    assert [(f.origin, f.bytes) for f in found] == [(0, 8), (1, 1000), (2, 500)]


def test_sizes_beyond_all_bounds_are_summed_without_a_crash() -> None:
    found = not_freed(live((2**63, 1, 0), (2**62, 2**32 - 1, 0)))
    assert [(f.stack, f.bytes) for f in found] == [(1, 2**63), (2**32 - 1, 2**62)]


@pytest.mark.parametrize(
    "name",
    ["malloc", "xmalloc", "git__realloc", "sqlite3DbMallocRawNN", "g_strdup", "operator new(unsigned long)",
     "_PyMem_RawCalloc", "PyObject_Malloc", "std::vector<int>::_M_realloc_insert(int*)", "CRYPTO_zalloc",
     "xcalloc_n", "__gnu_cxx::x"],
)  # fmt: skip
def test_wrappers_of_malloc_are_not_call_sites(name: str) -> None:
    assert is_wrapper(name)


@pytest.mark.parametrize("name", ["main", "parse", "allocate_dtv", "mallocate_room(int)", "load_config", "et_new_tree"])
def test_other_functions_are_call_sites(name: str) -> None:
    assert not is_wrapper(name)


def test_the_site_is_the_first_frame_that_is_no_wrapper() -> None:
    stack = [frame("xmalloc"), frame("operator new(unsigned long)"), frame("parse", "/src/json.c", 41), frame("main")]
    assert site_of(stack) == stack[2]
    assert site_name(stack) == "parse (json.c:41)"
    assert site_name([frame("xmalloc", "x.c", 1)]) == "xmalloc (x.c:1)"
    assert site_name([]) == "(no call stack)"
    assert site_name([frame("", module="/usr/lib/libz.so", offset=0x1234)]) == "libz.so+0x1234"


def test_a_fingerprint_does_not_depend_on_where_things_were_loaded() -> None:
    here, there = frame("f", "a.c", 3), Frame("f", "a.c", 3, "/elsewhere/x", 0x9999, False, 77)
    assert fingerprint([here]) == fingerprint([there])
    assert fingerprint([here]) != fingerprint([frame("f", "a.c", 4)])
    assert fingerprint([frame("", offset=8)]) != fingerprint([frame("", offset=9)])


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("main", "main"),
        ("toplev::main(int, char**)", "toplev::main"),
        ("f(void (*)(int)) const", "f"),
        ("operator()(int)", "operator()"),
        ("std::map<int, std::string, std::less<int>>::insert_or_assign(int)", "std::map<...>::insert_or_assign"),
        ("(anonymous namespace)::run(int)", "(anonymous namespace)::run"),
    ],
)
def test_cpp_names_are_shortened_to_what_one_says(full: str, short: str) -> None:
    assert short_function(full) == short
