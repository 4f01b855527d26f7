"""Trace files from anywhere: nonsense in events, mappings, threads, snapshots and stored results ends in figures or
in an error of ours, never in a crash.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from heapledger.analyzer.fact_shapes import is_sound
from heapledger.analyzer.reports import holes, leaks, report, temporary, timeline, verify
from heapledger.analyzer.reports.text import Page
from heapledger.analyzer.session import ANALYZER_VERSION, analyse, analyse_all
from heapledger.errors import HeapledgerError
from heapledger.store.events import COLUMNS, Events
from heapledger.store.reader import Trace
from heapledger.store.residency import encode_runs
from heapledger.store.writer import TraceWriter

PAGE = 4096
DOCS = Path(__file__).parent.parent / "docs" / "json.md"
#: Addresses that hit one another often, and wild ones.
ADDRESS = (
    st.integers(0, 40).map(lambda n: 0x5000_0000 + n * 0x110 + 16)
    | st.integers(0, 8).map(lambda n: 0x7F00_0000_0000 + n * PAGE)
    | st.sampled_from([0, 1, 15, PAGE, 2**47, 2**63 - 1, 2**63, 2**64 - 1])
)
SIZE = st.integers(0, 5000) | st.sampled_from([2**20, 2**31, 2**47, 2**63, 2**64 - 1])
EVENT = st.tuples(
    st.sampled_from([*range(1, 10), *range(16, 23), *range(32, 39), 0, 77]),
    st.integers(0, 2),
    ADDRESS,
    SIZE,
    ADDRESS,
    SIZE,
    SIZE,
)
NAME = st.sampled_from(
    ["", "[heap]", "[stack]", "/lib/a.so", "/dev/shm/x", "/x/1.0/ring.1", "evil\x1b[31m\u202e", "[vdso]"]
)
VMA = st.tuples(ADDRESS, st.integers(0, 2**40), NAME, st.sampled_from(["rw-p", "r-xp", "---p", "rw-s", "", "rwxsxyz"]))


def events_of(rows: list[tuple[int, ...]]) -> Events:
    found = Events.empty(len(rows))
    found.seq[:] = np.arange(1, len(rows) + 1) * 2
    found.seq_exit[:] = found.seq + np.uint64(1)
    found.time[:] = np.arange(len(rows)) * 1000
    for i, row in enumerate(rows):
        names = ("kind", "thread", "addr", "size", "arg", "arg2", "word")
        for name, value in zip(names, row, strict=True):
            getattr(found, name)[i] = COLUMNS[name].type(value)
        found.stack[i] = i % 5
    return found


def process_fields(pid: int, **fields: Any) -> dict[str, Any]:
    return {
        "pid": pid, "image": 0, "parent_id": None, "start": "start", "fork_seq": None, "exe": "/bin/x\x1b]0;title\x07",
        "argv": ["x\ny", "[bold]"], "environment": {"MALLOC_ARENA_MAX": 3, "GLIBC_TUNABLES": "glibc.malloc.x=-1"},
        "libc_version": "2.36", "start_break": 0x5000_0000, "start_ns": 0, "end_ns": 10**9, "end": "exit",
        "exit_status": 0, "self_low": 0, "self_high": 0, "page_size": PAGE, "notes": ["\x1b[2J"], **fields,
    }  # fmt: skip


def vma_rows(rows: list[tuple[int, int, str, str]]) -> list[dict[str, Any]]:
    """Mappings with one resident run each (starts are a key, so each is taken once)."""
    found: dict[int, dict[str, Any]] = {}
    for start, length, path, perms in rows:
        end = min(start + length, 2**64 - 1)
        runs = encode_runs([min((end - start) // PAGE + 3, 2**31)], [1 + len(path) % 3])
        found[start] = {
            "start": start, "end": end, "perms": perms, "offset": 0, "device": "", "inode": 0, "path": path,
            "vm_flags": "", "rss_bytes": length, "pss_bytes": 0, "swap_bytes": 0, "private_bytes": 0,
            "anonymous_bytes": length * 2,
            "runs": runs,
        }  # fmt: skip
    return list(found.values())


def write(
    path: Path, events: Events, child: Events, vmas: list[dict[str, Any]], spans: list[int], sample_bytes: int = 0
) -> Path:
    """A trace of two processes, one forked from the other, with these contents."""
    path.unlink(missing_ok=True)
    with TraceWriter(path, source="run", command=["x"], cwd="/", start_ns=1, start_unix_ns=1, host={}) as writer:
        low, high = min(spans), max(spans)
        first = writer.add_process(
            **process_fields(1, self_low=spans[0], self_high=spans[1], events=len(events), sample_bytes=sample_bytes)
        )
        second = writer.add_process(
            **process_fields(
                2,
                start="fork",
                parent_id=first,
                fork_seq=spans[2] % 2**62,
                start_ns=spans[1] % 2**40,
                sample_bytes=sample_bytes,
            )
        )
        for process_id, part in ((first, events), (second, child)):
            writer.append_events(process_id, part)
            thread = {
                "number": 0,
                "tid": 1,
                "name": "\x1b",
                "thread_pointer": spans[2],
                "stack_low": low,
                "stack_high": high,
            }
            writer.add_threads(process_id, [thread])
            module = {
                "number": 0,
                "path": "/lib/a.so",
                "build_id": "",
                "bias": 0,
                "low": low,
                "high": high,
                "load_seq": 0,
            }
            writer.add_modules(process_id, [module])
            for reason in ("start", "exit", "request"):
                rss_bytes = sum(v["rss_bytes"] for v in vmas)
                writer.add_snapshot(
                    process_id, vmas, reason=reason, time_ns=5, seq=spans[3] % 2**62, rss_bytes=rss_bytes,
                    pss_bytes=0, pagemap_bytes=0, method="pagemap", consistent=False, pause_ns=0, threads=-1,
                )  # fmt: skip
        writer.close(end_ns=10**9)
    return path


def look_at_all(path: Path) -> Iterator[dict[str, Any]]:
    """Every report of every process, built, printed, and as JSON text."""
    screen = io.StringIO()
    page = Page(Console(file=screen, width=80, highlight=False, markup=False))
    with Trace(path) as trace:
        # What a small machine would allow: a claimed heap of terabytes must not take the memory of the tests.
        analyses = analyse_all(trace, heap_limit=64 << 20)
        for analysis in analyses:
            whole = [(holes.build, holes.render), (temporary.build, temporary.render)]
            for build, render in (
                (report.build, report.render), (leaks.build, leaks.render), (timeline.build, timeline.render),
                *(whole if not analysis.sample_bytes else []),
            ):  # fmt: skip
                found = build(trace, analysis)
                render(found, page)
                json.dumps(found)
                yield found
        found = verify.build(trace, analyses)
        verify.render(found, page)
        yield found
    assert "\x1b" not in screen.getvalue()
    assert "\u202e" not in screen.getvalue()


@given(
    st.lists(EVENT, max_size=60),
    st.lists(EVENT, max_size=10),
    st.lists(VMA, max_size=8),
    st.lists(ADDRESS.filter(lambda a: a < 2**63), min_size=4, max_size=4),
    st.sampled_from([0, 1, 2**20, 2**62, -5]),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nonsense_ends_in_figures_that_balance(
    tmp_path: Path,
    rows: list[tuple[int, ...]],
    child: list[tuple[int, ...]],
    vmas: list[tuple[int, int, str, str]],
    spans: list[int],
    sample_bytes: int,
) -> None:
    path = write(tmp_path / "x.heapledger", events_of(rows), events_of(child), vma_rows(vmas), spans, sample_bytes)
    for found in look_at_all(path):
        if found["format"] == "heapledger.report":
            assert sum(o["rss_bytes"] for o in found["owners"]) == found["pagemap_bytes"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small trace that makes sense."""
    rows = [(1, 0, 0x5000_02A0 + i * 0x70, 100, 0, 0, 0x71) for i in range(5)]
    heap = vma_rows([(0x5000_0000, 33 * PAGE, "[heap]", "rw-p")])
    return write(tmp_path / "s.heapledger", events_of(rows), events_of([]), heap, [0, 0, 2, 99])


BROKEN: list[Any] = [{}, {"agreement": 7}, {"snapshots": ["x"]}, {"groups": [{}]}, {"own": [1]}]


@pytest.mark.parametrize("name", ["analysis", "leaks", "lifetimes", "ledger.2", "holes.2"])
@pytest.mark.parametrize("value", BROKEN)
def test_stored_results_that_make_no_sense_are_made_anew(small: Path, name: str, value: dict[str, Any]) -> None:
    with Trace(small) as trace:
        good = report.build(trace, analyse(trace, 1))
        assert trace.save_fact(1, name, ANALYZER_VERSION, value)
    with Trace(small) as trace:
        assert report.build(trace, analyse(trace, 1)) == good


def test_results_of_another_version_are_made_anew(small: Path) -> None:
    with Trace(small) as trace:
        good = leaks.build(trace, analyse(trace, 1))
        for name in ("analysis", "leaks"):
            trace.save_fact(1, name, "0", {"groups": []})
    with Trace(small) as trace:
        assert leaks.build(trace, analyse(trace, 1)) == good


def test_what_is_stored_has_the_shape_that_is_asked_for(small: Path) -> None:
    with Trace(small) as trace:
        analysis = analyse(trace, 1)
        for name in ("analysis", "leaks", "lifetimes", "ledger.2", "holes.2"):
            assert is_sound(name, analysis.stored(name)), name
        assert not is_sound("unknown", {})


def test_every_field_of_every_report_is_documented(small: Path) -> None:
    documented = set(re.findall(r'"(\w+)"', DOCS.read_text())) | set(re.findall(r"`(\w+)`", DOCS.read_text()))
    for found in look_at_all(small):
        assert set(found) <= documented, found["format"]
        for owner in found.get("owners", []):
            assert set(owner) <= documented


def test_a_snapshot_that_was_not_taken_is_an_error_of_ours(small: Path) -> None:
    with Trace(small) as trace:
        analysis = analyse(trace, 1)
        for at in ("exec", "12345", 77):
            with pytest.raises(HeapledgerError):
                report.build(trace, analysis, at=at)
