"""Reports of real programs, to the byte: what the program did is known, the rest is the kernel's own count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heapledger.analyzer.reports import holes, leaks, report, timeline, verify
from heapledger.analyzer.session import analyse, analyse_all
from heapledger.store.reader import Trace

pytestmark = pytest.mark.slow
PAGE = 4096
#: What tests/native/known_leak_hole.c does.
BLOCKS, CHUNK, PIN, LEAKED, LEAK = 1000, 10_016, 48, 7, 1234


@pytest.fixture(scope="module")
def record(
    native: Callable[..., Path], heapledger: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`record("known_leak_hole.c", "arg")` compiles, traces, and gives the trace; once for each command."""
    folder, made = tmp_path_factory.mktemp("traces"), dict[tuple[str, ...], Path]()

    def run(source: str, *args: str, status: int = 0) -> Path:
        key = (source, *args)
        if key not in made:
            made[key] = folder / f"{len(made)}.heapledger"
            program = native(source, "-O1", "-pthread", "-Wno-unused-result")
            done = heapledger("run", "-q", "-o", made[key], "--", program, *args)
            assert done.returncode == status, done.stderr
        return made[key]

    return run


@pytest.fixture(scope="module")
def known(record: Callable[..., Path]) -> Path:
    return record("known_leak_hole.c")


def by_kind(result: dict[str, Any]) -> dict[str, int]:
    return {k["kind"]: k["rss_bytes"] for k in result["kinds"]}


def balanced(result: dict[str, Any]) -> None:
    """The identity of docs/json.md, and nothing unexplained."""
    assert sum(o["rss_bytes"] for o in result["owners"]) == result["pagemap_bytes"]
    assert result["pagemap_bytes"] + result["smaps_difference_bytes"] == result["rss_bytes"]
    assert sum(k["rss_bytes"] for k in result["kinds"]) == result["pagemap_bytes"]
    assert result["unexplained_bytes"] == by_kind(result).get("unexplained", 0)
    assert result["unexplained_bytes"] < 0.005 * result["rss_bytes"], result["owners"]


def functions(stack: list[dict[str, Any]]) -> list[str]:
    return [frame["function"] for frame in stack[:2]]


def test_the_known_leak_is_found_to_the_byte_with_its_line(known: Path) -> None:
    with Trace(known) as trace:
        found = leaks.build(trace, analyse(trace))
    assert (found["total_bytes"], found["total_blocks"]) == (LEAKED * LEAK + PIN, LEAKED + 1)
    first, second = found["leaks"]
    assert (first["bytes"], first["blocks"], functions(first["stack"])) == (
        LEAKED * LEAK,
        LEAKED,
        ["leak_some", "main"],
    )
    assert (second["bytes"], second["blocks"], functions(second["stack"])) == (PIN, 1, ["make_pin", "main"])
    assert first["kind"] == "not freed at exit"
    source = Path(first["stack"][0]["file"]).read_text().splitlines()
    assert "/* leak */" in source[first["stack"][0]["line"] - 1]


def test_the_known_hole_is_found_to_the_byte_with_its_pin(known: Path) -> None:
    with Trace(known) as trace:
        found = holes.build(trace, analyse(trace))
    assert found["count"] == 1
    hole = next(h for h in found["holes"] if h["kind"] == "hole")
    # Every page of it was written to, so all of it is resident.
    assert hole["bytes"] == hole["resident_bytes"] == BLOCKS * CHUNK
    low, high = -(-(hole["address"] + 48) // PAGE) * PAGE, (hole["address"] + hole["bytes"]) // PAGE * PAGE
    assert hole["reclaimable_bytes"] == high - low
    assert hole["held_by"] == "live"
    assert hole["pin"]["bytes"] == PIN
    assert hole["pin"]["address"] == hole["address"] + hole["bytes"] + 16
    assert functions(hole["pin"]["stack"]) == ["make_pin", "main"]
    assert found["break_pin"]["address"] == hole["pin"]["address"]
    assert found["break_pin"]["holes_below_bytes"] == hole["bytes"]
    # The free() of main made all of it.
    for place in (hole["freed_at"][0], found["freed_at"][0]):
        assert (place["function"], place["blocks"], place["bytes"]) == ("main", BLOCKS, BLOCKS * CHUNK)


def test_malloc_trim_gives_back_exactly_what_was_called_reclaimable(known: Path, record: Callable[..., Path]) -> None:
    with Trace(known) as before, Trace(record("known_leak_hole.c", "trim")) as after:
        promised = holes.build(before, analyse(before))
        left = holes.build(after, analyse(after))
    assert left["total_bytes"] == promised["total_bytes"]
    assert left["total_resident_bytes"] == promised["total_resident_bytes"] - promised["total_reclaimable_bytes"]
    assert left["total_reclaimable_bytes"] == 0


def test_the_known_programs_ledger_balances_and_its_live_bytes_are_resident(known: Path) -> None:
    with Trace(known) as trace:
        found = report.build(trace, analyse(trace))
    balanced(found)
    assert found["unexplained_bytes"] == 0
    assert by_kind(found)["live"] == LEAKED * LEAK + PIN
    sites = {s["function"]: (s["bytes"], s["blocks"], s["rss_bytes"]) for s in found["sites"]}
    assert sites == {"leak_some": (LEAKED * LEAK, LEAKED, LEAKED * LEAK), "make_pin": (PIN, 1, PIN)}
    assert by_kind(found)["hole_reclaimable"] + by_kind(found)["hole_pinned"] == BLOCKS * CHUNK
    assert found["heap"]["hole_bytes"] == BLOCKS * CHUNK
    assert found["model"]["share_exact"] == 1.0


def test_the_timeline_of_the_known_program_has_its_highest_live_bytes(known: Path) -> None:
    with Trace(known) as trace:
        found = timeline.build(trace, analyse(trace), points=50)
    highest = BLOCKS * 10_000 + PIN + LEAKED * LEAK
    assert found["series"]["live_bytes"]["max"] == highest
    assert max(p[2] for p in found["series"]["live_bytes"]["points"]) == highest
    assert found["series"]["live_bytes"]["last"] == LEAKED * LEAK + PIN
    assert found["series"]["live_blocks"]["max"] == BLOCKS + 1 + LEAKED
    assert found["series"]["hole_bytes"]["max"] == BLOCKS * CHUNK
    assert all(len(s["points"]) <= 50 for s in found["series"].values())


def test_a_second_look_uses_what_the_first_one_stored(known: Path) -> None:
    with Trace(known) as trace:
        first = report.build(trace, analyse(trace))
    with Trace(known) as trace:
        # Were it not stored, this would read events; that would fail, for there are none left to read.
        trace.events = None  # type: ignore[assignment,method-assign]
        assert report.build(trace, analyse(trace)) == first


def test_a_forks_child_is_told_what_is_its_own_and_what_it_inherited(record: Callable[..., Path]) -> None:
    with Trace(record("reports_family.c", status=5)) as trace:
        child = next(p for p in trace.processes() if p.start == "fork")
        found = leaks.build(trace, analyse(trace, child.id))
        books = report.build(trace, analyse(trace, child.id))
    own = [(leak["bytes"], leak["blocks"]) for leak in found["leaks"] if not leak["inherited"]]
    inherited = [(leak["bytes"], functions(leak["stack"])[0]) for leak in found["leaks"] if leak["inherited"]]
    assert own == [(777, 1)]
    assert inherited == [(400_000, "main")]
    assert (found["total_bytes"], found["inherited_bytes"]) == (777, 400_000)
    balanced(books)
    mapped = next(o for o in books["owners"] if o["kind"] == "mmap")
    assert (mapped["rss_bytes"], functions(mapped["stack"])) == ((1 << 19) - PAGE, ["map_memory", "main"])


def test_every_kind_of_memory_of_a_program_is_booked_to_its_owner(record: Callable[..., Path]) -> None:
    with Trace(record("reports_family.c", status=5)) as trace:
        found = report.build(trace, analyse(trace))
    balanced(found)
    kinds = by_kind(found)
    assert kinds["mmap"] == (1 << 19) - PAGE
    assert kinds["shm"] == 2 * PAGE
    copies = [o for o in found["owners"] if o["kind"] == "private_copy" and o["name"] == "/etc/passwd"]
    assert [o["rss_bytes"] for o in copies] == [PAGE]
    # 300,000 of 400,000 bytes were written, from byte 16 of their first page; and all of 10,000.
    big = -(-(300_000 + 16) // PAGE) * PAGE - 16
    assert kinds["live"] == big + 10_000
    for kind in ("stack", "tls", "library_text", "library_data", "library_bss", "self", "vdso", "top"):
        assert kinds[kind] > 0, kind


def test_threads_arenas_are_one_sum_and_their_stacks_are_named(record: Callable[..., Path]) -> None:
    with Trace(record("reports_family.c", "threads", status=5)) as trace:
        found = report.build(trace, analyse(trace))
        child = next(p for p in trace.processes() if p.start == "fork")
        of_child = report.build(trace, analyse(trace, child.id))
    for books in (found, of_child):
        balanced(books)
        assert by_kind(books)["arena_unmodelled"] > 0
        assert by_kind(books)["thread_stack"] > 0
        assert any("not modelled yet" in note for note in books["notes"])
    worker = next(s for s in found["sites"] if s["function"] == "worker")
    assert worker["bytes"] == sum(100 + i for i in range(1, 200, 2)) * 2
    assert worker["blocks"] == 200


def test_all_processes_in_one_pass_say_the_same_as_each_on_its_own(record: Callable[..., Path]) -> None:
    path = record("reports_family.c", status=5)
    with Trace(path) as trace:
        single = [analyse(trace, p.id, fresh=True).summary for p in trace.processes()]
    with Trace(path) as trace:
        for p in trace.processes():
            trace.save_fact(p.id, "analysis", "another version", {})
        together = [a.summary for a in analyse_all(trace)]
        checked = verify.build(trace, analyse_all(trace))
    assert together == single
    assert checked["ok"], checked
    assert checked["addresses"]["exact"] == checked["addresses"]["predicted"] > 0
    assert checked["maps"]["exact"] == checked["maps"]["compared"] > 0
    assert checked["rss"]["ledger_bytes"] == checked["rss"]["kernel_bytes"]
    assert len(checked["processes"]) == 2
