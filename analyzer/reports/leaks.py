"""Blocks not freed at the end, by call stack."""

from __future__ import annotations

from typing import Any

from heapledger.analyzer.leaks.not_freed import KIND
from heapledger.analyzer.reports import common
from heapledger.analyzer.reports.report import frame_name, trimmed
from heapledger.analyzer.reports.text import Page, counted, duration, size
from heapledger.analyzer.session import Analysis
from heapledger.analyzer.sites import base_name
from heapledger.store.reader import Trace

#: Frames of a stack that the text shows.
_TEXT_FRAMES = 8


def build(trace: Trace, analysis: Analysis, *, top: int | None = 100) -> dict[str, Any]:
    """The report as JSON, with the `top` largest call stacks (None: all that were kept)."""
    found = analysis.leaks()
    names = common.names_of(trace, analysis.process)
    groups = found["groups"] if top is None else found["groups"][:top]
    leaks = []
    for group in groups:
        stack, site = common.stack_of(names, group["stack"])
        fields = ("bytes", "blocks", "inherited", "oldest_ns", "newest_ns", "fingerprint")
        leaks.append({"kind": KIND, **{key: group[key] for key in fields}, "site": site, "stack": stack})
    report = common.header("leaks", analysis.process)
    return report | {
        "leaks": leaks,
        "total_bytes": found["own"][0],
        "total_blocks": found["own"][1],
        "suppressed_bytes": 0,
        "inherited_bytes": found["inherited"][0],
        "inherited_blocks": found["inherited"][1],
        "shown": len(leaks),
        "stacks": found["stacks"],
        "notes": [*common.common_notes(analysis), *_notes(trace)],
    }


def _notes(trace: Trace) -> list[str]:
    notes = ["Reachability is not looked at: a block that is still in use at the end is listed like a lost one."]
    if trace.session.source == "mtrace":
        notes.append("An mtrace log has no times and one frame a call stack.")
    return notes


def render(report: dict[str, Any], page: Page) -> None:
    """The report for people."""
    process = report["process"]
    blocks = counted(report["total_blocks"], "block")
    page.line(
        f"{size(report['total_bytes'])} ({report['total_bytes']:,} bytes) in {blocks} "
        f"not freed by pid {process['pid']} ({base_name(process['exe']) or 'unknown program'})",
        style="bold",
    )
    if report["inherited_blocks"]:
        inherited = f"{size(report['inherited_bytes'])} in {counted(report['inherited_blocks'], 'block')}"
        page.line(f"{inherited} came with the fork from the parent")
    for number, leak in enumerate(report["leaks"], 1):
        page.line()
        origin = "  inherited from the parent" if leak["inherited"] else ""
        ages = "" if not leak["newest_ns"] else f"  allocated {_span(leak)}"
        page.line(
            f"{number}. {counted(leak['bytes'], 'byte')} in {counted(leak['blocks'], 'block')}{ages}{origin}",
            style="bold",
        )
        for line in frame_lines(leak["stack"]):
            page.line("     " + line)
    if report["shown"] < report["stacks"]:
        page.line()
        page.line(f"... and {report['stacks'] - report['shown']:,} more call stacks (--top N, or --format json)")
    page.notes([*report["notes"], *process["notes"]])


def _span(leak: dict[str, Any]) -> str:
    oldest, newest = duration(leak["oldest_ns"]), duration(leak["newest_ns"])
    return f"at {oldest}" if oldest == newest else f"from {oldest} to {newest}"


def frame_lines(stack: list[dict[str, Any]], limit: int = _TEXT_FRAMES) -> list[str]:
    """A stack as lines, innermost first; what is left out is counted."""
    if not stack:
        return ["(no call stack)"]
    lines = []
    shown = trimmed(stack)
    for frame in shown[:limit]:
        line = f":{frame['line']}" if frame["line"] else ""
        where = f"{frame['file']}{line}" if frame["file"] else base_name(frame["module"])
        if frame["function"]:
            lines.append(f"{frame['function']}  {where}" if where else frame["function"])
        else:
            lines.append(frame_name(frame))
    if len(shown) > limit:
        lines.append(f"... {len(shown) - limit} more")
    return lines
