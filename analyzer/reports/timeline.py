"""Memory over time: what the model held, and what the kernel counted."""

from __future__ import annotations

from typing import Any

from heapledger.analyzer.reports import common
from heapledger.analyzer.reports.text import Page, duration, size
from heapledger.analyzer.session import START, Analysis
from heapledger.analyzer.timeline import MODEL_SERIES, SAMPLE_SERIES
from heapledger.store.pyramid import Buckets
from heapledger.store.reader import Trace

_LABELS = {
    "rss": "RSS",
    "live_bytes": "live bytes",
    "heap_bytes": "heap (brk)",
    "mmapped_bytes": "large blocks",
    "hole_bytes": "holes",
    "cached_bytes": "caches",
    "top_bytes": "top",
    "live_blocks": "live blocks",
}


def build(
    trace: Trace, analysis: Analysis, *, t0: int | None = None, t1: int | None = None, points: int = 400
) -> dict[str, Any]:
    """The series as JSON, at most `points` points each, within [t0, t1] ns."""
    row = analysis.process
    series: dict[str, Any] = {}
    start = end = None
    for name in (*SAMPLE_SERIES, *MODEL_SERIES):
        pyramid = analysis.pyramid(name)
        if pyramid is None:
            continue
        # The budget of the pyramid counts two ends of a line a bucket; here a bucket is one point.
        found = pyramid.query(t0, t1, 2 * points)
        if not len(found):
            continue
        series[name] = _series(name, found)
        if name == "live_bytes":
            series[name] |= common.errors(analysis, bytes=analysis.summary["peak_live_error"])
        elif name == "live_blocks":
            series[name] |= common.errors(analysis)
        start = int(found.t0[0]) if start is None else min(start, int(found.t0[0]))
        end = int(found.t1[-1]) if end is None else max(end, int(found.t1[-1]))
    report = common.header("timeline", row)
    return report | {
        "start_ns": start,
        "end_ns": end,
        "series": series,
        "snapshots": [
            {"id": s.id, "reason": s.reason, "time_ns": s.time_ns, "rss_bytes": s.rss_bytes}
            for s in trace.snapshots(row.id)
            if s.reason != START
        ],
        "notes": common.common_notes(analysis),
    }


def _series(name: str, found: Buckets) -> dict[str, Any]:
    columns = (found.t0.tolist(), found.min.tolist(), found.max.tolist(), found.last.tolist())
    return {
        "unit": "blocks" if name == "live_blocks" else "bytes",
        "points": [list(point) for point in zip(*columns, strict=True)],
        "min": int(found.min.min()),
        "max": int(found.max.max()),
        "last": int(found.last[-1]),
    }


def render(report: dict[str, Any], page: Page) -> None:
    """One line of small bars a series, on one scale where the unit is bytes."""
    series = report["series"]
    if not series:
        page.line("There is nothing over time in this trace: no events and no samples.")
        return
    width = max(page.width - 38, 10)
    start, end = report["start_ns"], report["end_ns"]
    page.line(f"From {duration(start)} to {duration(end)}, {width} columns, highest value in each", style="bold")
    scale = max((s["max"] for s in series.values() if s["unit"] == "bytes"), default=0)
    rows = []
    for name, label in _LABELS.items():
        if name not in series:
            continue
        found = series[name]
        is_bytes = found["unit"] == "bytes"
        line = page.spark(_columns(found["points"], start, end, width), scale if is_bytes else found["max"])
        show = size if is_bytes else "{:,}".format
        tilde = "~" if found.get("estimated") else ""
        rows.append([label, line, tilde + show(found["max"]), tilde + show(found["last"])])
    page.table(["", "", ">highest", ">last"], rows, styles={1: "cyan"})
    page.line(f"One scale for all bytes: a full bar is {size(scale)}.")
    marks = [f"{s['reason']} at {duration(s['time_ns'])}" for s in report["snapshots"]]
    if marks:
        page.line("Snapshots: " + ", ".join(marks[:8]))
    page.notes(report["notes"])


def _columns(points: list[list[int]], start: int, end: int, width: int) -> list[float]:
    """The highest value in each of `width` equal stretches of time; a value holds until the next one. -1: none yet."""
    columns = [-1.0] * width
    step = max(end - start, 1) / width
    before, at = -1.0, 0
    for column in range(width):
        limit = start + (column + 1) * step
        highest = before
        while at < len(points) and (points[at][0] < limit or column == width - 1):
            highest = max(highest, float(points[at][2]))
            before = float(points[at][3])
            at += 1
        columns[column] = highest
    return columns
