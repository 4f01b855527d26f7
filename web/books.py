"""All that is known about one process: the JSON of the reports, made once and kept.

The pages print these same objects that the API returns and the command line prints:
a figure cannot differ between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heapledger.analyzer.reports import holes, leaks, report, temporary, timeline, verify
from heapledger.analyzer.session import Analysis, analyse, analyse_all
from heapledger.errors import NotMeasuredError, UsageError
from heapledger.store.reader import Trace
from heapledger.store.schema import Process
from heapledger.web.desk import EVERY_PROCESS, Progress

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Books:
    """Results for one process of one content of a file. The trace stays open for zooms of the timeline."""

    process_id: int
    #: The report at exit, or of the moment nearest to it that there is.
    report: Json
    #: The report at the highest RSS, where that is another moment.
    peak: Json | None
    leaks: Json
    #: None where no snapshot says which holes are resident.
    holes: Json | None
    #: None where the trace is a sample that does not tell.
    temporary: Json | None
    #: Of this process, or of all where all were asked for.
    verify: Json
    trace: Trace
    analysis: Analysis

    def report_at(self, at: str | int | None) -> Json:
        """`at`: "exit", "peak", the id of a snapshot, or None for the best there is."""
        if at is None:
            return self.report
        return report.build(self.trace, self.analysis, at=at)

    def holes_or_error(self) -> Json:
        """The holes; NotMeasuredError with its reason where they are not known."""
        return holes.build(self.trace, self.analysis) if self.holes is None else self.holes

    def temporary_or_error(self) -> Json:
        """Temporary allocations; NotMeasuredError with its reason where they are not known."""
        return temporary.build(self.trace, self.analysis) if self.temporary is None else self.temporary

    def timeline(self, start_ns: int | None, end_ns: int | None, points: int) -> Json:
        return timeline.build(self.trace, self.analysis, t0=start_ns, t1=end_ns, points=points)


def make_books(path: Path, process_id: int | None, progress: Progress) -> Books:
    """Analyses a process (None: the main one), or takes what an earlier analysis left in the file."""
    trace = Trace(path)
    try:
        return _make_books(trace, process_id, progress)
    except BaseException:
        trace.close()
        raise


def _make_books(trace: Trace, process_id: int | None, progress: Progress) -> Books:
    def note(done: int, total: int) -> None:
        progress(done / max(total, 1))

    if process_id == EVERY_PROCESS:
        analyses = analyse_all(trace, progress=note)
        if not analyses:
            raise NotMeasuredError("this trace has no process in it")
    else:
        analyses = [analyse(trace, find_process(trace, process_id), progress=note)]
    analysis = analyses[0]
    main = report.build(trace, analysis)
    return Books(
        process_id=analysis.process.id,
        report=main,
        peak=_peak(trace, analysis, main),
        leaks=leaks.build(trace, analysis),
        holes=_holes(trace, analysis),
        temporary=_temporary(trace, analysis),
        verify=verify.build(trace, analyses),
        trace=trace,
        analysis=analysis,
    )


def find_process(trace: Trace, process_id: int | None) -> Process:
    """By its id (pids may repeat within a trace); None: the main one, which comes first."""
    processes = trace.processes()
    for process in processes:
        if process_id is None or process.id == process_id:
            return process
    raise UsageError(f"this trace holds no process {process_id}" if processes else "this trace holds no process")


def _peak(trace: Trace, analysis: Analysis, main: Json) -> Json | None:
    if main["snapshot"] is None:
        return None
    peak = report.build(trace, analysis, at="peak")
    return None if peak["snapshot"]["id"] == main["snapshot"]["id"] else peak


def _holes(trace: Trace, analysis: Analysis) -> Json | None:
    try:
        return holes.build(trace, analysis)
    except NotMeasuredError:
        return None


def _temporary(trace: Trace, analysis: Analysis) -> Json | None:
    try:
        return temporary.build(trace, analysis)
    except NotMeasuredError:
        return None
