"""How often each reason forced a result: the same sums in the stored analysis, in verify, and on the page."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from heapledger.analyzer.reports import report, verify
from heapledger.analyzer.reports.text import Page
from heapledger.analyzer.session import analyse, analyse_all
from heapledger.store.events import Events, Kind
from heapledger.store.reader import Trace
from heapledger.store.writer import TraceWriter
from heapledger.web.views.agreement import agreement_view

BREAK = 0x555555560000
OTHERS, WRONG = 250, 3


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """One process: a block as predicted, many of another arena, a few on top of the first."""
    count = 1 + OTHERS + WRONG
    events = Events.empty(count)
    events.kind[:], events.size[:] = Kind.MALLOC, 24
    events.addr[:], events.word[:] = BREAK + 0x2A0, 0x21
    others = slice(1, 1 + OTHERS)
    events.addr[others] = 0x7FFFE8000B70 + 32 * np.arange(OTHERS, dtype=np.uint64)
    events.thread[others], events.word[others] = 1, 0x25
    events.seq[:] = np.arange(1, count + 1) * 2
    events.seq_exit[:] = events.seq + np.uint64(1)
    path = tmp_path / "x.heapledger"
    with TraceWriter(path, source="run", command=["x"], cwd="/", start_ns=1, start_unix_ns=1, host={}) as writer:
        process = writer.add_process(
            pid=1, image=0, parent_id=None, start="start", fork_seq=None, exe="/bin/x", argv=["x"], environment={},
            libc_version="2.36", start_break=BREAK, start_ns=0, end_ns=10**9, end="exit", exit_status=0, self_low=0,
            self_high=0, page_size=4096, notes=[], events=count,
        )  # fmt: skip
        writer.append_events(process, events)
        writer.close(end_ns=10**9)
    return path


def test_reasons_sum_to_forced_far_beyond_the_examples_that_are_kept(trace_file: Path) -> None:
    expected = {"OTHER_ARENA": OTHERS, "OVERLAP": WRONG}
    with Trace(trace_file) as trace:
        analysis = analyse(trace, trace.processes()[0])
        assert analysis.summary["reasons"] == expected
        assert analysis.summary["agreement"]["forced"] == OTHERS + WRONG
        assert len(analysis.summary["agreement"]["forced_examples"]) == 100
        assert "reasons" not in analysis.summary["agreement"]
        assert report.model_json(analysis)["reasons"] == expected


def test_verify_and_the_page_say_how_many_for_which_reason(trace_file: Path) -> None:
    with Trace(trace_file) as trace:
        stated = verify.build(trace, analyse_all(trace))
    assert stated["reasons"] == stated["processes"][0]["reasons"] == {"OTHER_ARENA": OTHERS, "OVERLAP": WRONG}
    note = next(line for line in stated["notes"] if "arenas" in line)
    assert "250 addresses" in note
    assert "3 predictions were wrong" in note
    assert agreement_view(stated, stated["processes"][0]["id"]).reasons == (("other arena", OTHERS), ("overlap", WRONG))
    printed = io.StringIO()
    verify.render(stated, Page(Console(file=printed, width=100, highlight=False, markup=False, emoji=False)))
    assert "because of: other arena 250, overlap 3" in printed.getvalue()
