"""Series over time: built from portions, with no extreme lost."""

from __future__ import annotations

import numpy as np

from heapledger.analyzer.replay import Series
from heapledger.analyzer.reports.timeline import _columns
from heapledger.analyzer.timeline import MODEL_SERIES, TimelineBuilder, sample_pyramids
from heapledger.store.events import Events


def portion(times: list[int], values: list[int]) -> tuple[Events, Series]:
    events = Events.empty(len(times))
    events.time[:] = times
    column = np.array(values, np.int64)
    return events, Series(*(column for _ in MODEL_SERIES))


def test_series_keep_their_extremes_and_their_last_value() -> None:
    builder = TimelineBuilder()
    rng = np.random.default_rng(1)
    values = rng.integers(0, 10**9, 20_000)
    for part in range(0, 20_000, 3_000):
        count = len(values[part : part + 3_000])
        builder.add(*portion(list(range(part, part + count)), values[part : part + 3_000].tolist()))
    few = builder.finish()["live_bytes"].query(None, None, 40)
    assert len(few) <= 40
    assert (few.max.max(), few.min.min(), few.last[-1]) == (values.max(), values.min(), values[-1])
    assert builder.peak_live_bytes == values.max()
    assert builder.peak_live_ns == int(values.argmax())


def test_clocks_of_two_threads_that_disagree_do_not_turn_time_back() -> None:
    builder = TimelineBuilder()
    builder.add(*portion([10, 9, 12], [1, 2, 3]))
    builder.add(*portion([11], [4]))
    found = builder.finish()["heap_bytes"].query(None, None, 100)
    assert found.t0.tolist() == [10, 10, 12, 12]


def test_no_events_are_no_series() -> None:
    assert TimelineBuilder().finish() == {}


def test_samples_that_were_not_read_are_left_out() -> None:
    samples = {"time_ns": np.array([1, 2, 3]), "rss": np.array([5, -1, 7]), "rss_anon": np.array([-1, -1, -1])}
    found = sample_pyramids(samples)
    assert list(found) == ["rss"]
    assert found["rss"].query(None, None, 100).max.tolist() == [5, 7]


def test_a_value_holds_until_the_next_one_and_columns_show_the_highest() -> None:
    points = [[0, 1, 1, 1], [50, 2, 9, 3]]
    assert _columns(points, 0, 100, 4) == [1.0, 1.0, 9.0, 3.0]
    assert _columns([[30, 4, 4, 4]], 0, 40, 4) == [-1.0, -1.0, -1.0, 4.0]
