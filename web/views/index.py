"""The list of traces, a row each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from heapledger.web.catalogue import Entry, Summary
from heapledger.web.units import shorten, visible
from heapledger.web.views.header import command_text


@dataclass(frozen=True, slots=True)
class IndexRow:
    id: str
    name: str
    command: str
    full_command: str
    start_unix_ns: int
    duration_ns: int | None
    size_bytes: int
    events: int
    lost: int
    processes: int
    peak_rss_bytes: int | None
    problem: str


def index_rows(traces: Iterable[tuple[Entry, Summary]]) -> list[IndexRow]:
    return [
        IndexRow(
            id=entry.id,
            name=visible(entry.name),
            command=shorten(command_text(summary.command), 120),
            full_command=command_text(summary.command),
            start_unix_ns=summary.start_unix_ns,
            duration_ns=summary.duration_ns,
            size_bytes=summary.size_bytes,
            events=summary.events,
            lost=summary.lost,
            processes=summary.processes,
            peak_rss_bytes=summary.peak_rss_bytes,
            problem=visible(summary.problem),
        )
        for entry, summary in traces
    ]
