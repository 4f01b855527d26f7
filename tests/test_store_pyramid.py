"""Pyramids and residency runs, against brute force."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heapledger.errors import TraceError
from heapledger.store import pyramid, residency
from heapledger.store.pyramid import Buckets, Builder, Pyramid
from heapledger.store.residency import HUGE, Category

SERIES = st.lists(st.tuples(st.integers(0, 1000), st.integers(-(2**62), 2**62)), min_size=1, max_size=400)


def in_time_order(steps: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(times that do not fall, values) from steps of time and values."""
    return np.cumsum([step for step, _ in steps]), np.array([value for _, value in steps], np.int64)


def check(found: Buckets) -> None:
    """The identities that `Buckets` states."""
    assert np.all(found.t0 <= found.t1)
    assert np.all(found.t0[1:] >= found.t0[:-1])
    for column in (found.first, found.last):
        assert np.all((found.min <= column) & (column <= found.max))


@given(SERIES, st.lists(st.integers(1, 50), max_size=20), st.sampled_from([2, 4, 16, 64]))
@settings(max_examples=200, deadline=None)
def test_a_pyramid_built_in_portions_has_the_extremes_of_the_whole(
    steps: list[tuple[int, int]], cuts: list[int], limit: int
) -> None:
    times, values = in_time_order(steps)
    builder, at = Builder(limit), 0
    for cut in [*cuts, len(times)]:
        builder.add(times[at : at + cut], values[at : at + cut])
        at += cut
    built = builder.finish()
    for level in map(built.level, range(len(built.sizes))):
        check(level)
        assert (level.min.min(), level.max.max()) == (values.min(), values.max())
        assert (level.first[0], level.last[-1]) == (values[0], values[-1])
        assert (level.t0[0], level.t1[-1]) == (times[0], times[-1])
    assert built.sizes[0] <= limit + 1


@given(SERIES, st.integers(0, 200_000), st.integers(0, 200_000), st.integers(2, 300))
@settings(max_examples=200, deadline=None)
def test_no_window_loses_an_extreme_or_exceeds_its_budget(
    steps: list[tuple[int, int]], one: int, other: int, points: int
) -> None:
    times, values = in_time_order(steps)
    t0, t1 = sorted((one, other))
    found = pyramid.build(times, values).query(t0, t1, points)
    check(found)
    inside = values[(times >= t0) & (times <= t1)]
    if len(inside):
        assert found.min.min() <= inside.min()
        assert found.max.max() >= inside.max()
        assert {int(found.min.min()), int(found.max.max())} <= set(values.tolist())
    line_times, line_values = found.line()
    assert len(line_times) <= max(points, 2)
    assert np.all(line_times[1:] >= line_times[:-1])
    if len(inside):
        assert (line_values.min(), line_values.max()) == (found.min.min(), found.max.max())


def test_a_single_peak_among_two_million_points_is_drawn() -> None:
    times, values = np.arange(2_000_000), np.zeros(2_000_000, np.int64)
    values[1_234_567] = 99
    built = pyramid.build(times, values)
    assert built.sizes[0] <= pyramid.LEVEL_0
    found = built.query(max_points=100)
    assert len(found) <= 50
    peak = int(np.argmax(found.max))
    assert found.max[peak] == 99
    assert found.t0[peak] <= 1_234_567 <= found.t1[peak]
    zoomed = built.query(1_234_000, 1_235_000, 4000)
    assert zoomed.t1[np.argmax(zoomed.max)] - zoomed.t0[np.argmax(zoomed.max)] < 16


def test_a_short_series_is_kept_point_by_point() -> None:
    times, values = pyramid.build([5, 6, 9], [1, -1, 4]).query().line()
    assert (times.tolist(), values.tolist()) == ([5, 6, 9], [1, -1, 4])


def test_an_empty_series_has_no_points() -> None:
    found = pyramid.build([], []).query(0, 10)
    assert (len(found), len(found.line()[0])) == (0, 0)


@given(SERIES)
@settings(max_examples=100, deadline=None)
def test_a_level_comes_back_from_its_blob(steps: list[tuple[int, int]]) -> None:
    level = Buckets.of_points(*in_time_order(steps)).merged(3)
    data = pyramid.encode_level(level)
    again = pyramid.decode_level(data, len(level), zlib.crc32(data))
    for before, after in zip(level.columns(), again.columns(), strict=True):
        assert np.array_equal(before, after)


def test_a_damaged_level_is_refused() -> None:
    level = Buckets.of_points(np.arange(100), np.arange(100) ** 2)
    data = pyramid.encode_level(level)
    crc = zlib.crc32(data)
    with pytest.raises(TraceError, match="checksum"):
        pyramid.decode_level(data[:-1] + b"x", 100, crc)
    for cut in range(0, len(data), 7):
        with pytest.raises(TraceError):
            pyramid.decode_level(data[:cut], 100, zlib.crc32(data[:cut]))
    for buckets in (99, 101, 10**12, -1):
        with pytest.raises(TraceError):
            pyramid.decode_level(data, buckets, crc)


def test_levels_are_decoded_only_when_a_query_needs_them() -> None:
    whole = pyramid.build(np.arange(100_000), np.arange(100_000) % 977)
    asked: list[int] = []

    def load(level: int) -> Buckets:
        asked.append(level)
        return whole.level(level)

    Pyramid(whole.sizes, load).query(max_points=100)
    assert 0 not in asked


RUNS = st.lists(
    st.tuples(st.integers(1, 2**20), st.sampled_from([*Category, Category.ANON | HUGE, Category.FILE | HUGE])),
    max_size=300,
)


@given(RUNS)
@settings(max_examples=150, deadline=None)
def test_residency_runs_come_back_and_count_what_is_resident(runs: list[tuple[int, int]]) -> None:
    pages, category = [p for p, _ in runs], [c for _, c in runs]
    data = residency.encode_runs(pages, category)
    again_pages, again_category = residency.decode_runs(data)
    assert (again_pages.tolist(), again_category.tolist()) == (pages, category)
    expected = sum(p for p, c in runs if c & 0x0F in (Category.ANON, Category.FILE))
    assert residency.resident_bytes(data) == expected * 4096


def test_the_drawn_example_of_residency_runs_is_true() -> None:
    data = residency.encode_runs([2, 3], [Category.ANON, Category.ABSENT])
    assert data[:5].hex() == "0002000000"
    assert data[9:].hex() == "02000000030000000100"


def test_residency_runs_that_nobody_wrote_are_refused() -> None:
    good = residency.encode_runs(np.arange(1, 200), np.ones(199))
    assert good[0] == 1, "long enough to be compressed"
    for cut in range(1, len(good), 5):
        with pytest.raises(TraceError):
            residency.decode_runs(good[:cut])
    for at in range(len(good)):
        flipped = bytearray(good)
        flipped[at] ^= 0x10
        with pytest.raises(TraceError):
            residency.decode_runs(bytes(flipped))
    for pages, category in (([1], [9]), ([2**32 - 1] * 9, [1] * 9)):
        with pytest.raises(TraceError, match="cannot exist"):
            residency.decode_runs(residency.encode_runs(pages, category))
