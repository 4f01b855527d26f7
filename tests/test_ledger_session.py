"""The one pass: where events are cut for a snapshot or a fork, and what a snapshot in the middle sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from heapledger.analyzer.reports import report
from heapledger.analyzer.session import _cut, analyse, fork_chain
from heapledger.store.events import Events, Kind
from heapledger.store.reader import Trace
from heapledger.store.residency import encode_runs
from heapledger.store.schema import Process
from heapledger.store.writer import TraceWriter

PAGE = 4096
HEAP = 0x5000_0000


def numbered(seqs: list[int]) -> Events:
    events = Events.empty(len(seqs))
    events.seq[:] = seqs
    return events


def cut(blocks: list[list[int]], stops: list[int]) -> list[list[int] | str]:
    """Runs of seq, and the stops between them, as `_cut` gives them."""
    found = _cut(map(numbered, blocks), stops)
    return [f"stop {stop}" if events is None else events.seq.tolist() for events, stop in found]


def test_a_stop_comes_before_the_event_of_its_own_seq() -> None:
    assert cut([[1, 2, 3], [5, 6]], [3, 5]) == [[1, 2], "stop 0", [3], "stop 1", [5, 6]]


def test_stops_before_the_first_and_behind_the_last_event_are_not_lost() -> None:
    assert cut([[4, 5]], [0, 1, 99, 99]) == ["stop 0", "stop 1", [4, 5], "stop 2", "stop 3"]
    assert cut([], [7]) == ["stop 0"]


@given(st.sets(st.integers(1, 60)), st.lists(st.integers(0, 70)), st.integers(1, 9))
def test_every_event_comes_once_and_each_stop_in_its_place(seqs: set[int], stops: list[int], size: int) -> None:
    ordered, stops = sorted(seqs), sorted(stops)
    blocks = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    seen: list[int] = []
    reached = 0
    for part in cut(blocks, stops):
        if isinstance(part, str):
            assert part == f"stop {reached}"
            assert seen == [s for s in ordered if s < stops[reached]]
            reached += 1
        else:
            seen += part
    assert (seen, reached) == (ordered, len(stops))


def test_a_fork_chain_begins_where_a_program_began() -> None:
    first = Process(id=1, start="start", parent_id=None, fork_seq=None)
    child = Process(id=2, start="fork", parent_id=1, fork_seq=10)
    grandchild = Process(id=3, start="fork", parent_id=2, fork_seq=4)
    other = Process(id=4, start="exec", parent_id=3, fork_seq=None)
    rows = [first, child, grandchild, other]
    assert [p.id for p in fork_chain(rows, grandchild)] == [1, 2, 3]
    assert [p.id for p in fork_chain(rows, other)] == [4]


def test_a_fork_chain_that_bites_its_tail_ends() -> None:
    one = Process(id=1, start="fork", parent_id=2, fork_seq=1)
    two = Process(id=2, start="fork", parent_id=1, fork_seq=1)
    orphan = Process(id=3, start="fork", parent_id=77, fork_seq=1)
    assert len(fork_chain([one, two, orphan], one)) == 2
    assert [p.id for p in fork_chain([one, two, orphan], orphan)] == [3]


def test_a_snapshot_sees_the_events_before_it_and_none_behind(tmp_path: Path) -> None:
    """Three blocks of 100 bytes, a snapshot after the second: hand-fed, at glibc 2.36's own addresses."""
    events = Events.empty(3)
    events.kind[:] = Kind.MALLOC
    events.seq[:] = [1, 3, 5]
    events.seq_exit[:] = [2, 4, 6]
    events.size[:] = 100
    # Behind tcache's 0x290 bytes; chunks of 0x70.
    events.addr[:] = HEAP + 0x290 + 16 + np.arange(3) * 0x70
    events.word[:] = 0x71
    path = tmp_path / "t.heapledger"
    with TraceWriter(path, source="run", command=["x"]) as writer:
        process = writer.add_process(
            pid=1, start="start", exe="x", libc_version="2.36", start_break=HEAP, page_size=PAGE, end="exit"
        )
        writer.append_events(process, events)
        heap = {"start": HEAP, "end": HEAP + 33 * PAGE, "perms": "rw-p", "path": "[heap]"}
        vma = {**heap, "rss_bytes": PAGE, "anonymous_bytes": PAGE, "runs": encode_runs([1, 32], [1, 0])}
        for seq, reason in ((5, "request"), (7, "exit")):
            writer.add_snapshot(
                process, [vma], reason=reason, seq=seq, rss_bytes=PAGE, pagemap_bytes=PAGE, consistent=True, method="x"
            )
        writer.close(1)
    with Trace(path) as trace:
        analysis = analyse(trace)
        middle, end = report.build(trace, analysis, at="request"), report.build(trace, analysis, at="exit")
    for found, blocks in ((middle, 2), (end, 3)):
        kinds = {k["kind"]: k["rss_bytes"] for k in found["kinds"]}
        assert found["heap"]["live_blocks"] == blocks
        assert kinds["live"] == 100 * blocks
        assert kinds["chunk_overhead"] == 12 * blocks
        assert kinds["arena"] == 0x290 + 8
        assert found["unexplained_bytes"] == 0
    assert end["model"]["share_exact"] == 1.0
