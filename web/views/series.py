"""The timeline's series: names, and the figures that stand in a table below the drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]

#: Series name → what it is called, in the order of the legend. timeline.js draws these.
LABELS = {
    "rss": "RSS, sampled",
    "heap_bytes": "Heap size",
    "live_bytes": "Live bytes",
    "hole_bytes": "Holes",
}


@dataclass(frozen=True, slots=True)
class SeriesRow:
    name: str
    label: str
    highest: int
    last: int
    estimated: bool


def series_rows(timeline: Json) -> tuple[SeriesRow, ...]:
    """Series that have points at all; without events or samples there is nothing to say."""
    series = timeline["series"]
    return tuple(
        SeriesRow(name, label, series[name]["max"], series[name]["last"], bool(series[name].get("estimated")))
        for name, label in LABELS.items()
        if name in series and series[name]["points"]
    )
