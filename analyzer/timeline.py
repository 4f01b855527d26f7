"""Figures of the heap over time, built while events pass by, as min/max pyramids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heapledger.analyzer.replay import Series
from heapledger.store.events import Events
from heapledger.store.pyramid import Builder, Pyramid, build

#: From the replay, after each event: the fields of `replay.Series`.
MODEL_SERIES = (
    "live_bytes",
    "live_blocks",
    "heap_bytes",
    "mmapped_bytes",
    "hole_bytes",
    "cached_bytes",
    "top_bytes",
)
#: Of a sampled trace, as estimates: where free memory is, nobody knows.
SAMPLED_SERIES = ("live_bytes", "live_blocks")
#: From the /proc samples: series → column.
SAMPLE_SERIES = {"rss": "rss", "rss_anon": "rss_anon"}
#: Buckets of the finest level. Eight times what a plot draws; seven series of it take about 0.7 MB in the file.
_FINEST = 1 << 15


class TimelineBuilder:
    """Collects the model's series. Memory is bounded, whatever the number of events."""

    def __init__(self, series: Sequence[str] = MODEL_SERIES) -> None:
        self._builders = {name: Builder(_FINEST) for name in series}
        self._reached = 0
        self.events = 0
        self.peak_live_bytes = 0
        self.peak_live_ns = 0

    def add(self, events: Events, series: Series) -> None:
        """The figures after each of `events`."""
        if not len(events):
            return
        # Clocks of two threads may differ by a hair: a timeline never runs backwards.
        times = np.maximum.accumulate(np.maximum(events.time.astype(np.int64), self._reached))
        self._reached = int(times[-1])
        self.events += len(events)
        for name, builder in self._builders.items():
            builder.add(times, getattr(series, name))
        highest = int(np.argmax(series.live_bytes))
        if int(series.live_bytes[highest]) > self.peak_live_bytes:
            self.peak_live_bytes = int(series.live_bytes[highest])
            self.peak_live_ns = int(times[highest])

    def finish(self) -> dict[str, Pyramid]:
        """The pyramids of all series; none without events."""
        return {name: builder.finish() for name, builder in self._builders.items()} if self.events else {}


def sample_pyramids(samples: Mapping[str, Any]) -> dict[str, Pyramid]:
    """Pyramids of what /proc said. Samples without a value are left out."""
    pyramids = {}
    times = np.asarray(samples.get("time_ns", ()), dtype=np.float64)
    for name, column in SAMPLE_SERIES.items():
        # NULL columns come as NaN or -1; bytes are far below 2**53, so doubles hold them exactly.
        values = np.asarray(samples.get(column, ()), dtype=np.float64)
        known = np.isfinite(values) & (values >= 0) if len(values) == len(times) else np.zeros(0, bool)
        if known.any():
            ordered = np.maximum.accumulate(times[known])
            pyramids[name] = build(ordered.astype(np.int64), values[known].astype(np.int64))
    return pyramids
