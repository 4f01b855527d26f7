"""Tables of call sites: what is held, what was never freed, and what pins holes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heapledger.web.units import format_duration, shorten, visible
from heapledger.web.views.frames import FrameLine, callers_of, frame_line, frame_lines, site_position

Json = Mapping[str, Any]

SITE_ROWS = 25

#: The report's `held_by` → words. A live neighbour is the pin itself.
HELD_BY = {"tcache": "a cached block (tcache)", "fastbin": "a cached block (fastbin)", "other": "malloc's own chunk"}


@dataclass(frozen=True, slots=True)
class PlaceRow:
    """A place where blocks of a call site are freed."""

    name: str
    blocks: int
    share: float
    frames: tuple[FrameLine, ...]


@dataclass(frozen=True, slots=True)
class SiteRow:
    name: str
    place: str
    full: str
    callers: str
    frames: tuple[FrameLine, ...]
    bytes: int
    blocks: int
    #: None where no snapshot says what is resident.
    rss_bytes: int | None
    share: float | None
    freed_at: tuple[PlaceRow, ...]
    #: Standard errors, where the figures are estimates.
    bytes_error: int | None
    blocks_error: int | None
    rss_error: int | None


@dataclass(frozen=True, slots=True)
class LeakRow:
    kind: str
    name: str
    callers: str
    frames: tuple[FrameLine, ...]
    bytes: int
    blocks: int
    share: float
    inherited: bool
    freed_blocks: int
    freed_at: tuple[PlaceRow, ...]
    bytes_error: int | None
    blocks_error: int | None


@dataclass(frozen=True, slots=True)
class TemporaryRow:
    name: str
    callers: str
    frames: tuple[FrameLine, ...]
    blocks: int
    blocks_error: int | None
    bytes: int
    share: float
    share_of_site: float


@dataclass(frozen=True, slots=True)
class TemporaryView:
    rows: tuple[TemporaryRow, ...]
    blocks: int
    blocks_error: int | None
    bytes: int
    allocated_blocks: int
    share: float


@dataclass(frozen=True, slots=True)
class LeaksView:
    rows: tuple[LeakRow, ...]
    bytes_error: int | None
    total_bytes: int
    total_blocks: int
    suppressed_bytes: int
    inherited_bytes: int
    stacks: int
    hidden_bytes: int


@dataclass(frozen=True, slots=True)
class HoleRow:
    address: str
    bytes: int
    resident_bytes: int
    reclaimable_bytes: int
    is_top: bool
    #: What the direct neighbour above is, where that is no live block.
    held_by: str
    pin_name: str
    pin_callers: str
    pin_bytes: int | None
    pin_age: str
    pin_age_ns: int
    pin_frames: tuple[FrameLine, ...]


@dataclass(frozen=True, slots=True)
class HolesView:
    rows: tuple[HoleRow, ...]
    count: int
    total_bytes: int
    total_resident_bytes: int
    total_reclaimable_bytes: int
    break_pin: HoleRow | None
    break_pin_below_bytes: int
    #: Who freed what lies in them; `share` of all that is known of it.
    freed_at: tuple[PlaceRow, ...]
    snapshot: str


def site_rows(report: Json) -> tuple[SiteRow, ...]:
    """The call sites that hold most, in the report's order."""
    rows = []
    for site in report["sites"][:SITE_ROWS]:
        stack = site.get("stack")
        chosen = frame_line(stack[site_position(stack, site["name"])]) if stack else None
        name = chosen.function if chosen else shorten(site["name"], 100)
        rows.append(
            SiteRow(
                name=name,
                place=chosen.place if chosen else "",
                full=chosen.full if chosen else visible(site["name"]),
                callers=callers_of(stack, site["name"]),
                frames=frame_lines(stack),
                bytes=site["bytes"],
                blocks=site["blocks"],
                rss_bytes=site.get("rss_bytes"),
                share=site.get("share"),
                freed_at=place_rows(site.get("freed_at")),
                bytes_error=site.get("standard_error_bytes"),
                blocks_error=site.get("standard_error_blocks"),
                rss_error=site.get("standard_error_rss_bytes") if site.get("rss_bytes") is not None else None,
            )
        )
    return tuple(rows)


def place_rows(places: Sequence[Json] | None) -> tuple[PlaceRow, ...]:
    """Where blocks are freed, the most frequent place first."""
    return tuple(
        PlaceRow(shorten(place["name"], 120), place["blocks"], place["share"], frame_lines(place["stack"]))
        for place in places or ()
    )


def temporary_view(temporary: Json) -> TemporaryView:
    """Blocks freed before anything else was allocated."""
    amount = temporary["temporary"]
    return TemporaryView(
        rows=tuple(
            TemporaryRow(
                name=shorten(site["name"], 120),
                callers=callers_of(site["stack"], site["name"]),
                frames=frame_lines(site["stack"]),
                blocks=site["blocks"],
                blocks_error=site.get("standard_error_blocks"),
                bytes=site["bytes"],
                share=site["share"],
                share_of_site=site["share_of_site"],
            )
            for site in temporary["sites"][:SITE_ROWS]
        ),
        blocks=amount["blocks"],
        blocks_error=amount.get("standard_error_blocks"),
        bytes=amount["bytes"],
        allocated_blocks=temporary["allocated"]["blocks"],
        share=temporary["share"],
    )


def leaks_view(leaks: Json) -> LeaksView:
    total = leaks["total_bytes"]
    shown = leaks["leaks"][:SITE_ROWS]
    rows = tuple(
        LeakRow(
            kind=visible(leak["kind"]),
            name=shorten(leak["site"], 120),
            callers=callers_of(leak["stack"], leak["site"]),
            frames=frame_lines(leak["stack"]),
            bytes=leak["bytes"],
            blocks=leak["blocks"],
            share=leak["bytes"] / max(total, 1),
            inherited=bool(leak.get("inherited")),
            freed_blocks=leak.get("freed_blocks") or 0,
            freed_at=place_rows(leak.get("freed_at")),
            bytes_error=leak.get("standard_error_bytes"),
            blocks_error=leak.get("standard_error_blocks"),
        )
        for leak in shown
    )
    return LeaksView(
        rows=rows,
        bytes_error=leaks.get("standard_error_bytes"),
        total_bytes=total,
        total_blocks=leaks["total_blocks"],
        suppressed_bytes=leaks["suppressed_bytes"],
        inherited_bytes=leaks.get("inherited_bytes") or 0,
        stacks=leaks.get("stacks") or len(leaks["leaks"]),
        hidden_bytes=max(0, total - sum(row.bytes for row in rows if not row.inherited)),
    )


def hole_row(hole: Json) -> HoleRow:
    pin = hole.get("pin") or {}
    return HoleRow(
        address=f"0x{hole.get('address') or 0:x}",
        bytes=hole["bytes"],
        resident_bytes=hole["resident_bytes"],
        reclaimable_bytes=hole["reclaimable_bytes"],
        is_top=hole.get("kind") == "top",
        held_by=HELD_BY.get(str(hole.get("held_by")), ""),
        pin_name=shorten(pin.get("site") or "", 120),
        pin_callers=callers_of(pin.get("stack"), pin.get("site") or ""),
        pin_bytes=pin.get("bytes"),
        pin_age=format_duration(pin.get("age_ns")) if pin else "",
        pin_age_ns=pin.get("age_ns") or 0,
        pin_frames=frame_lines(pin.get("stack")),
    )


def snapshot_words(snapshot: Json | None, notes: Sequence[str] = ()) -> str:
    """Where the figures of a moment come from."""
    if not snapshot:
        return notes[0] if notes else "no snapshot"
    return f"{snapshot['reason']}, {format_duration(snapshot['time_ns'])} after the start"


def holes_view(holes: Json) -> HolesView:
    pin = holes.get("break_pin")
    freed = sum(place["bytes"] for place in holes["freed_at"])
    pin_row = None
    if pin:
        empty = {"bytes": 0, "resident_bytes": 0, "reclaimable_bytes": 0, "address": pin.get("address")}
        pin_row = hole_row({**empty, "pin": pin})
    return HolesView(
        rows=tuple(hole_row(hole) for hole in holes["holes"][:SITE_ROWS]),
        count=holes["count"],
        total_bytes=holes["total_bytes"],
        total_resident_bytes=holes["total_resident_bytes"],
        total_reclaimable_bytes=holes["total_reclaimable_bytes"],
        break_pin=pin_row,
        break_pin_below_bytes=(pin or {}).get("holes_below_bytes") or 0,
        freed_at=place_rows([{**p, "share": p["bytes"] / max(freed, 1)} for p in holes["freed_at"][:SITE_ROWS]]),
        snapshot=snapshot_words(holes.get("snapshot"), holes.get("notes") or ()),
    )
