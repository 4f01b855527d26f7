"""Temporary allocations: blocks that a thread frees before it allocates anything else."""

from __future__ import annotations

from typing import Any

from heapledger.analyzer.reports import common
from heapledger.analyzer.reports.report import callers
from heapledger.analyzer.reports.text import Page, about, about_count, percent
from heapledger.analyzer.session import Analysis
from heapledger.errors import NotMeasuredError
from heapledger.store.reader import Trace


def build(trace: Trace, analysis: Analysis, *, top: int | None = 100) -> dict[str, Any]:
    """The report as JSON, with the `top` call sites that have most of them (None: all that were kept)."""
    found = analysis.lifetimes()
    if found.get("temporary") is None:
        raise NotMeasuredError(
            "this trace is a sample, and does not say whether something was allocated in between",
            hint="Trace the program without --sample.",
        )
    names = common.names_of(trace, analysis.process)
    sites = sorted((s for s in found["sites"] if s["temporary"][0]), key=lambda s: (-s["temporary"][0], s["name"]))
    shown = sites if top is None else sites[:top]
    report = common.header("temporary", analysis.process)
    return report | {
        "allocated": _amount(analysis, found["allocated"]),
        "temporary": _amount(analysis, found["temporary"]),
        "share": found["temporary"][0] / max(found["allocated"][0], 1),
        "sites": [
            {
                **{key: site[key] for key in ("name", "function", "file", "line", "module")},
                **_amount(analysis, site["temporary"]),
                "share": site["temporary"][0] / max(found["temporary"][0], 1),
                "share_of_site": site["temporary"][0] / max(site["allocated"][0], 1),
                "stack": common.stack_of(names, site["stack"])[0],
            }
            for site in shown
        ],
        "shown": len(shown),
        "notes": common.common_notes(analysis),
    }


def _amount(analysis: Analysis, amount: list[int]) -> dict[str, Any]:
    blocks, count, blocks_error, bytes_error = amount
    return {"blocks": blocks, "bytes": count, **common.errors(analysis, blocks=blocks_error, bytes=bytes_error)}


def render(report: dict[str, Any], page: Page) -> None:
    """The report for people."""
    allocated, temporary = report["allocated"], report["temporary"]
    page.line(
        f"{_blocks(temporary)} of {_blocks(allocated)} allocations ({percent(report['share'])}) were temporary: "
        f"{_bytes(temporary)} in all",
        style="bold",
    )
    page.line("Freed by the thread that allocated them, before it allocated anything else.")
    if report["sites"]:
        page.heading("By call site")
        page.table(
            [">blocks", ">bytes", ">of all", ">of the site's", "site"],
            [
                [
                    _blocks(s),
                    _bytes(s),
                    percent(s["share"]),
                    percent(s["share_of_site"]),
                    callers(s["stack"], s["name"]),
                ]
                for s in report["sites"]
            ],
        )
    page.notes([*report["notes"], *report["process"]["notes"]])


def _blocks(figures: dict[str, Any]) -> str:
    return about_count(figures["blocks"], figures.get("standard_error_blocks"))


def _bytes(figures: dict[str, Any]) -> str:
    return about(figures["bytes"], figures.get("standard_error_bytes"))
