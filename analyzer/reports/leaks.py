"""Blocks not freed at the end, by call stack."""

from __future__ import annotations

from typing import Any

from heapledger.analyzer.facts import site_words
from heapledger.analyzer.leaks.not_freed import KIND
from heapledger.analyzer.reports import common
from heapledger.analyzer.reports.report import frame_name, short_name, trimmed
from heapledger.analyzer.reports.text import Page, about, about_count, counted, duration, percent, size
from heapledger.analyzer.session import Analysis
from heapledger.analyzer.sites import base_name, site_of
from heapledger.store.reader import Trace

#: Frames of a stack that the text shows.
_TEXT_FRAMES = 8


def build(trace: Trace, analysis: Analysis, *, top: int | None = 100) -> dict[str, Any]:
    """The report as JSON, with the `top` largest call stacks (None: all that were kept)."""
    found = analysis.leaks()
    names = common.names_of(trace, analysis.process)
    groups = found["groups"] if top is None else found["groups"][:top]
    lifetimes = common.lifetimes_by_site(analysis)
    leaks = []
    for group in groups:
        frames = names.frames(*group["stack"])
        stack, site = common.stack_of(names, group["stack"])
        # What a fork's child inherited was allocated by the parent: its call sites are not among the child's.
        alike = None if group["inherited"] else lifetimes.get(common.site_key(site_words(site_of(frames))))
        fields = ("bytes", "blocks", "inherited", "oldest_ns", "newest_ns", "fingerprint")
        leaks.append(
            {"kind": KIND, **{key: group[key] for key in fields}, "site": site, "stack": stack}
            | common.errors(analysis, bytes=group["bytes_error"], blocks=group["blocks_error"])
            | common.freed_at_json(analysis, alike, names)
        )
    report = common.header("leaks", analysis.process)
    return report | {
        "leaks": leaks,
        "total_bytes": found["own"][0],
        "total_blocks": found["own"][1],
        "suppressed_bytes": 0,
        "inherited_bytes": found["inherited"][0],
        "inherited_blocks": found["inherited"][1],
        **common.errors(analysis, bytes=found["own"][2], blocks=found["own"][3]),
        "shown": len(leaks),
        "stacks": found["stacks"],
        "notes": [*common.common_notes(analysis), *_notes(trace, analysis)],
    }


def _notes(trace: Trace, analysis: Analysis) -> list[str]:
    notes = ["Reachability is not looked at: a block that is still in use at the end is listed like a lost one."]
    if trace.session.source == "mtrace":
        notes.append("An mtrace log has no times and one frame a call stack.")
    if analysis.sample_bytes:
        notes.append("Small blocks are rarely in a sample: a leak of few of them may not be listed at all.")
    return notes


def render(report: dict[str, Any], page: Page) -> None:
    """The report for people."""
    process = report["process"]
    page.line(
        f"{_bytes(report, 'total_bytes')} in {_blocks(report, 'total_blocks')} "
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
            f"{number}. {_leaked(leak)} in {_blocks(leak, 'blocks')}{ages}{origin}",
            style="bold",
        )
        for line in frame_lines(leak["stack"]):
            page.line("     " + line)
        if leak["freed_at"]:
            page.line(f"     {_freed_words(leak)}", style="dim")
    if report["shown"] < report["stacks"]:
        page.line()
        page.line(f"... and {report['stacks'] - report['shown']:,} more call stacks (--top N, or --format json)")
    page.notes([*report["notes"], *process["notes"]])


def _bytes(figures: dict[str, Any], key: str) -> str:
    """`9.8 KiB (10,000 bytes)`, or an estimate."""
    standard_error = figures.get("standard_error_bytes")
    if standard_error is not None:
        return about(figures[key], standard_error)
    return f"{size(figures[key])} ({figures[key]:,} bytes)"


def _leaked(leak: dict[str, Any]) -> str:
    standard_error = leak.get("standard_error_bytes")
    return counted(leak["bytes"], "byte") if standard_error is None else about(leak["bytes"], standard_error)


def _blocks(figures: dict[str, Any], key: str) -> str:
    standard_error = figures.get("standard_error_blocks")
    if standard_error is None:
        return counted(figures[key], "block")
    return f"{about_count(figures[key], standard_error)} blocks"


def _freed_words(leak: dict[str, Any]) -> str:
    """Where others of the same call site go: `others of this site are freed at: drop (a.c:7) (98 %), ...`."""
    places = [f"{short_name(p, where=True)} ({percent(p['share'])})" for p in map(_as_frame, leak["freed_at"][:2])]
    others = about_count(leak["freed_blocks"], leak.get("standard_error_freed_blocks"))
    return f"{others} others of this site were freed at: {', '.join(places)}"


def _as_frame(place: dict[str, Any]) -> dict[str, Any]:
    """A place where blocks are freed, as a frame: the one its call stack names it by."""
    frame = next((f for f in place["stack"] if frame_name(f) == place["name"]), None)
    bare = {"function": place["name"], "file": None, "line": None, "module": "", "address": 0, "offset": None}
    return {**(frame or {**bare, "inlined": False}), "share": place["share"]}


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
