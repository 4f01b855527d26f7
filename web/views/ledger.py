"""The ledger at one moment: a waterfall of owners that ends at the kernel's Rss, and the table beside it.

Identity: the bars add up to `total_bytes`, the kernel's Rss (smaps). What no owner explains is the bar `unexplained`,
shown even when it is 0; where smaps and pagemap disagree, the difference is a bar of its own: nothing is hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from heapledger.web.units import shorten
from heapledger.web.views.kinds import SMALL_PARTS, kind_text, position

Json = Mapping[str, Any]

#: Call sites with a bar of their own, if each is at least this share of Rss; libraries are one bar a kind.
SITE_BARS = 6
SITE_SHARE = 0.02
#: Kinds below this share of Rss share a bar with others of their family.
KIND_SHARE = 0.01
#: Owners that have a row of their own in the table.
TABLE_ROWS = 60


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of the waterfall; `left` and `width` in percent of Rss."""

    label: str
    detail: str
    family: str
    bytes: int
    share: float
    left: float
    width: float

    @property
    def right(self) -> float:
        return round(self.left + self.width, 4)


@dataclass(frozen=True, slots=True)
class Row:
    kind: str
    kind_label: str
    family: str
    name: str
    full_name: str
    bytes: int
    share: float


@dataclass(frozen=True, slots=True)
class LedgerView:
    at: str
    title: str
    total_bytes: int
    unexplained_bytes: int
    unexplained_share: float
    owners_sum_bytes: int
    difference_bytes: int
    bars: tuple[Bar, ...]
    rows: tuple[Row, ...]
    hidden_rows: int
    hidden_bytes: int
    summary: str

    @property
    def balances(self) -> bool:
        return self.difference_bytes == 0


@dataclass(slots=True)
class _Slice:
    label: str
    detail: str
    kind: str
    bytes: int


def owners_with_unexplained(report: Json) -> list[Json]:
    """The report's owners that hold something; the unexplained and what smaps counts beyond pagemap are among them."""
    owners = [owner for owner in report["owners"] if owner["rss_bytes"]]
    if not any(owner["kind"] == "unexplained" for owner in owners):
        owners.append({"kind": "unexplained", "name": "", "rss_bytes": report["unexplained_bytes"]})
    difference = report.get("smaps_difference_bytes") or 0
    if difference:
        owners.append({"kind": "smaps_difference", "name": "", "rss_bytes": difference})
    return owners


def slices(owners: Iterable[Json], rss_bytes: int) -> list[_Slice]:
    """Owners as bars: one a kind, but the largest call sites for themselves."""
    by_kind: dict[str, list[Json]] = {}
    for owner in owners:
        by_kind.setdefault(owner["kind"], []).append(owner)
    result: list[_Slice] = []
    for kind in sorted(by_kind, key=position):
        members = sorted(by_kind[kind], key=lambda owner: -owner["rss_bytes"])
        text = kind_text(kind)
        rest = members
        if kind in ("live", "mmap"):
            named = [owner for owner in members if not is_rest(owner)]
            large = [owner for owner in named[:SITE_BARS] if owner["rss_bytes"] >= SITE_SHARE * rss_bytes]
            result += [_Slice(shorten(o["name"], 60), text.label, kind, o["rss_bytes"]) for o in large]
            rest = [owner for owner in members if owner not in large]
            if large and rest:
                result.append(_Slice("Other call sites", text.label, kind, sum(o["rss_bytes"] for o in rest)))
                continue
        if rest:
            detail = shorten(rest[0]["name"], 40) if len(rest) == 1 else f"{len(rest):,} owners"
            result.append(_Slice(text.label, detail, kind, sum(o["rss_bytes"] for o in rest)))
    return merge_small([part for part in result if part.bytes or part.kind == "unexplained"], rss_bytes)


def merge_small(parts: list[_Slice], rss_bytes: int) -> list[_Slice]:
    """Those of one family that are each below KIND_SHARE of Rss become one bar, behind the family's larger ones."""
    result: list[_Slice] = []
    for family, members in itertools.groupby(parts, lambda part: kind_text(part.kind).family):
        large: list[_Slice] = []
        small: list[_Slice] = []
        for part in members:
            is_small = family in SMALL_PARTS and 0 <= part.bytes < KIND_SHARE * rss_bytes
            (small if is_small else large).append(part)
        if len(small) > 1:
            labels = ", ".join(dict.fromkeys(part.label for part in small))
            small = [_Slice(SMALL_PARTS[family], labels, small[0].kind, sum(part.bytes for part in small))]
        result += large + small
    return result


def is_rest(owner: Json) -> bool:
    """The report sums small call sites in one owner without a stack: never a bar of its own name."""
    return not owner.get("stack") and str(owner["name"]).startswith("(")


def bars(parts: Iterable[_Slice], rss_bytes: int) -> list[Bar]:
    """Each bar begins where the one before it ends."""
    scale = 100 / max(rss_bytes, 1)
    result, start = [], 0
    for part in parts:
        result.append(
            Bar(
                part.label,
                part.detail,
                kind_text(part.kind).family,
                part.bytes,
                part.bytes / max(rss_bytes, 1),
                round(start * scale, 4),
                round(part.bytes * scale, 4),
            )
        )
        start += part.bytes
    return result


def table(owners: Iterable[Json], rss_bytes: int) -> list[Row]:
    ordered = sorted(owners, key=lambda owner: -owner["rss_bytes"])
    rows = []
    for owner in ordered:
        text = kind_text(owner["kind"])
        name = owner["name"] or ""
        share = owner["rss_bytes"] / max(rss_bytes, 1)
        rows.append(
            Row(owner["kind"], text.label, text.family, shorten(name, 80), name, owner["rss_bytes"], share),
        )
    return rows


def ledger_view(report: Json, title: str) -> LedgerView:
    rss = int(report["rss_bytes"])
    owners = owners_with_unexplained(report)
    drawn = bars(slices(owners, rss), rss)
    total = sum(bar.bytes for bar in drawn)
    rows = table(owners, rss)
    # `unexplained` is always among the rows that are shown.
    shown = [row for i, row in enumerate(rows) if i < TABLE_ROWS or row.kind == "unexplained"]
    hidden = [row for i, row in enumerate(rows) if i >= TABLE_ROWS and row.kind != "unexplained"]
    largest = max(drawn, key=lambda bar: bar.bytes, default=None)
    summary = f"{len(owners):,} owners" + (f"; the largest bar is {largest.label}" if largest else "")
    unexplained = int(report["unexplained_bytes"])
    return LedgerView(
        at=str(report.get("at", "")),
        title=title,
        total_bytes=rss,
        unexplained_bytes=unexplained,
        unexplained_share=unexplained / max(rss, 1),
        owners_sum_bytes=total,
        difference_bytes=rss - total,
        bars=tuple(drawn),
        rows=tuple(shown),
        hidden_rows=len(hidden),
        hidden_bytes=sum(row.bytes for row in hidden),
        summary=summary,
    )
