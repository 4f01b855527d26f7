"""Holes in the heap and the blocks that pin them."""

from __future__ import annotations

from typing import Any

from heapledger.analyzer.facts import Names
from heapledger.analyzer.reports import common
from heapledger.analyzer.reports.report import callers, moment
from heapledger.analyzer.reports.text import Page, counted, duration, size
from heapledger.analyzer.session import Analysis
from heapledger.errors import NotMeasuredError
from heapledger.store.reader import Trace


def build(trace: Trace, analysis: Analysis, *, at: str | int | None = None, top: int | None = 100) -> dict[str, Any]:
    """The report as JSON, with the `top` holes that have most resident bytes (None: all that were kept)."""
    row = analysis.process
    if analysis.sample_bytes:
        raise NotMeasuredError(
            "this trace is a sample: between the recorded blocks may be free memory, or blocks that were not recorded",
            hint="Trace it without --sample to see holes; `heapledger report` says how much of the heap is resident.",
        )
    snapshot = common.choose_snapshot(trace.snapshots(row.id), at)
    found = analysis.holes(snapshot.id) if snapshot is not None else None
    if snapshot is None or found is None:
        raise NotMeasuredError(
            "nobody looked at this process's pages, so resident holes are not known",
            hint="A trace made by `heapledger run` has snapshots; `heapledger timeline` shows hole bytes without one.",
        )
    names = common.names_of(trace, row)
    # The process may have ended a while before its pages were looked at: it was held.
    time = min(snapshot.time_ns, row.end_ns if row.end_ns is not None else snapshot.time_ns)
    listed = sorted(
        [*found["holes"], *([found["top"]] if found["top"] else [])],
        key=lambda h: (-h["resident_bytes"], -h["bytes"], h["address"]),
    )
    shown = listed if top is None else listed[:top]
    places = [_place(place, names) for place in found["places"]]
    report = common.header("holes", row)
    return report | {
        "at": at if at in ("peak", "exit") else snapshot.reason,
        "snapshot": common.snapshot_json(snapshot),
        "holes": [_hole(h, names, time, places) for h in shown],
        **{key: found[key] for key in ("total_bytes", "total_resident_bytes", "total_reclaimable_bytes", "count")},
        "shown": len(shown),
        "top": _amounts(found["top"]) if found["top"] else None,
        "break_pin": _break_pin(found, names, time),
        "pins": [_pinned_site(p, names) for p in (found["pins"] if top is None else found["pins"][:top])],
        "freed_at": _freed_at(found["freed"] if top is None else found["freed"][:top], places),
        "notes": common.common_notes(analysis, snapshot),
    }


def _amounts(hole: dict[str, Any]) -> dict[str, int]:
    return {key: hole[key] for key in ("bytes", "resident_bytes", "reclaimable_bytes")}


def _place(place: dict[str, Any], names: Names) -> dict[str, Any]:
    words = {key: place[key] for key in ("name", "function", "file", "line", "module")}
    return {**words, "stack": common.stack_of(names, place["stack"])[0]}


def _freed_at(freed: list[list[int]], places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Who freed what lies in a hole (or in all): [place, blocks, bytes] each. What makes no sense is left out."""
    known = [(places[at], blocks, size_) for at, blocks, size_ in freed if 0 <= at < len(places)]
    return [{**place, "blocks": blocks, "bytes": size_} for place, blocks, size_ in known]


def _hole(hole: dict[str, Any], names: Names, time: int, places: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **_amounts(hole),
        "arena": "main",
        "kind": hole["kind"],
        "address": hole["address"],
        "held_by": hole["held_by"],
        "pin": _pin(hole["pin"], names, time),
        "freed_at": _freed_at(hole["freed"], places),
    }


def _pin(pin: dict[str, Any] | None, names: Names, time: int) -> dict[str, Any] | None:
    if pin is None:
        return None
    stack, site = common.stack_of(names, pin["stack"])
    age = max(time - pin["time_ns"], 0)
    return {"bytes": pin["bytes"], "age_ns": age, "address": pin["address"], "site": site, "stack": stack}


def _break_pin(found: dict[str, Any], names: Names, time: int) -> dict[str, Any] | None:
    pin = _pin(found["break_pin"], names, time)
    return None if pin is None else pin | {"holes_below_bytes": found["holes_below_pin_bytes"]}


def _pinned_site(pinned: dict[str, Any], names: Names) -> dict[str, Any]:
    stack, site = common.stack_of(names, pinned["stack"])
    fields = ("holes", "bytes", "resident_bytes", "reclaimable_bytes")
    return {"site": site, **{key: pinned[key] for key in fields}, "stack": stack}


def render(report: dict[str, Any], page: Page, *, rows: int = 10) -> None:
    """The report for people."""
    page.line(
        f"{counted(report['count'], 'hole')} {moment(report)}: {size(report['total_bytes'])} free inside the heap, "
        f"{size(report['total_resident_bytes'])} of it resident",
        style="bold",
    )
    page.line(f"malloc_trim(0) would give back {size(report['total_reclaimable_bytes'])} of it: whole pages")
    if report["top"]:
        page.line(
            f"Top of the heap: {size(report['top']['bytes'])}, {size(report['top']['resident_bytes'])} resident, "
            f"kept for what comes next"
        )
    _render_break_pin(report, page)
    if report["pins"]:
        page.heading("Who pins them: the live block next above each hole, by call site")
        page.table(
            [">resident", ">whole pages", ">holes", "site of the pin"],
            [
                [
                    size(p["resident_bytes"]),
                    size(p["reclaimable_bytes"]),
                    f"{p['holes']:,}",
                    callers(p["stack"], p["site"]),
                ]
                for p in report["pins"][:rows]
            ],
        )
    if any(place["stack"] for place in report["freed_at"]):
        page.heading("Who freed what lies in them, by call site")
        page.table(
            [">bytes", ">blocks", "site of the free"],
            [[size(p["bytes"]), f"{p['blocks']:,}", callers(p["stack"], p["name"])] for p in report["freed_at"][:rows]],
        )
    holes = [h for h in report["holes"] if h["kind"] == "hole"][:rows]
    if holes:
        page.heading("Largest holes")
        page.table([">bytes", ">resident", ">whole pages", "pin"], [_row(h) for h in holes])
    page.notes([*report["notes"], *report["process"]["notes"]])


def _row(hole: dict[str, Any]) -> list[str]:
    pin = hole["pin"]
    held = "nothing live above" if pin is None else f"{pin['bytes']:,} B, {duration(pin['age_ns'])} old, {pin['site']}"
    if hole["held_by"] != "live":
        held = f"[{hole['held_by']}] {held}"
    return [size(hole["bytes"]), size(hole["resident_bytes"]), size(hole["reclaimable_bytes"]), held]


def _render_break_pin(report: dict[str, Any], page: Page) -> None:
    pin = report["break_pin"]
    if pin is None:
        return
    page.line(
        f"The break is kept up by a block of {pin['bytes']:,} bytes, {duration(pin['age_ns'])} old "
        f"({size(pin['holes_below_bytes'])} of holes below it):"
    )
    page.line("  " + callers(pin["stack"], pin["site"]))
