"""The whole page of a process, put together."""

from __future__ import annotations

from dataclasses import dataclass

from heapledger.web.books import Books, Json
from heapledger.web.units import visible
from heapledger.web.views.agreement import AgreementView, agreement_view
from heapledger.web.views.header import HeaderView, header_view
from heapledger.web.views.ledger import LedgerView, ledger_view
from heapledger.web.views.series import SeriesRow, series_rows
from heapledger.web.views.sites import (
    HolesView,
    LeaksView,
    SiteRow,
    TemporaryView,
    holes_view,
    leaks_view,
    site_rows,
    snapshot_words,
    temporary_view,
)

LEDGER_TITLES = {"exit": "At exit", "peak": "At peak", "request": "As asked for", "exec": "Before exec"}

#: Points of the series table: its figures are extremes, which no coarseness loses.
TABLE_POINTS = 2


@dataclass(frozen=True, slots=True)
class KeyFigures:
    """The strip under the title. None: not measured."""

    #: The moment of the figures: "at exit" if a snapshot was taken then.
    moment: str
    rss_bytes: int | None
    #: Of which the tracer's own pages.
    shim_bytes: int
    peak_rss_bytes: int | None
    live_bytes: int
    live_blocks: int
    #: Standard error of the live bytes, where they are an estimate.
    live_error: int | None
    hole_bytes: int | None
    unexplained_bytes: int | None
    addresses_share: float | None


@dataclass(frozen=True, slots=True)
class Overview:
    process_id: int
    header: HeaderView
    figures: KeyFigures
    series: tuple[SeriesRow, ...]
    ledgers: tuple[LedgerView, ...]
    ledger_moments: tuple[str, ...]
    #: The one ledger there is was also taken at the highest RSS.
    is_highest: bool
    #: Whether times are known at all: an imported mtrace log has none.
    has_time: bool
    sites: tuple[SiteRow, ...]
    sites_at: str
    leaks: LeaksView
    #: None: not measured, for a reason that `holes_problem` says.
    holes: HolesView | None
    holes_problem: str
    #: None where a sample does not tell.
    temporary: TemporaryView | None
    agreement: AgreementView


def moment_title(report: Json) -> str:
    """What the moment of a report is called; without a snapshot it is the end of what is known."""
    at = report["at"]
    return "At the end" if at is None else LEDGER_TITLES.get(at) or visible(at)


def _holes_problem(report: Json) -> str:
    """Why there are no holes to show."""
    if report["process"]["sample_bytes"]:
        return (
            "This trace is a sample: between the recorded blocks may be free memory, or blocks that were not recorded."
        )
    return "No snapshot of this process was taken, so nobody knows which holes were resident."


def overview(books: Books) -> Overview:
    main = books.report
    agreement = agreement_view(books.verify, books.process_id)
    measured = [report for report in (main, books.peak) if report and report["rss_bytes"] is not None]
    heap, peak = main["heap"], main["peak"]
    timeline = books.timeline(None, None, TABLE_POINTS)
    return Overview(
        process_id=books.process_id,
        header=header_view(main),
        figures=KeyFigures(
            moment=moment_title(main).lower(),
            rss_bytes=main["rss_bytes"],
            shim_bytes=sum(kind["rss_bytes"] for kind in main["kinds"] if kind["kind"] == "self"),
            peak_rss_bytes=peak.get("hwm_bytes") or peak.get("rss_bytes"),
            live_bytes=heap["live_bytes"],
            live_blocks=heap["live_blocks"],
            live_error=heap.get("standard_error_bytes"),
            hole_bytes=heap["hole_bytes"],
            unexplained_bytes=main["unexplained_bytes"] if main["rss_bytes"] is not None else None,
            addresses_share=agreement.checks[0].share,
        ),
        series=series_rows(timeline),
        ledgers=tuple(ledger_view(report, moment_title(report)) for report in measured),
        is_highest=len(measured) == 1,
        has_time=timeline["end_ns"] is not None and timeline["end_ns"] > timeline["start_ns"],
        ledger_moments=tuple(snapshot_words(report["snapshot"]) for report in measured),
        sites=site_rows(main),
        sites_at=moment_title(main).lower(),
        leaks=leaks_view(books.leaks),
        holes=holes_view(books.holes) if books.holes else None,
        holes_problem=_holes_problem(main),
        temporary=temporary_view(books.temporary) if books.temporary else None,
        agreement=agreement,
    )
