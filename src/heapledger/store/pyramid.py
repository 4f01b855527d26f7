"""Min/max pyramids: a series of any length drawn in any window with few points, and no extreme ever lost.

    level 2   [                bucket                ]     one of 8 buckets of level 1 each
    level 1   [ bucket ][ bucket ][ bucket ] ...           one of 8 buckets of level 0 each
    level 0   |b|b|b|b|b|b|b|b| ...                        one of 1, 2, 4 ... points each

A bucket says: t0, t1 (first and last time in it), min, max, first, last (values). Level 0 has at most LEVEL_0 buckets:
while a series grows, neighbours are merged whenever it would get more, so the memory for building stays the same for a
hundred points and for a hundred million. Whatever the window and the budget, the highest and the lowest value of each
drawn bucket are the true ones.

A level in the file (`pyramid.data`): six columns of `buckets` signed 64-bit values in the order above, each
    u8 width | u32 length | length bytes: byte planes of the zigzag of the differences (store.planes)
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from heapledger.errors import TraceError
from heapledger.store import planes

Int64s = npt.NDArray[np.int64]

FAN_OUT = 8
#: Buckets of the finest level: 12 MiB before compression, the most the reader accepts.
LEVEL_0 = 1 << 18
_COLUMNS = 6
_HEAD = struct.Struct("<BI")
#: Arrays a builder keeps before it joins them.
_PARTS = 256


@dataclass(slots=True, frozen=True)
class Buckets:
    """Consecutive buckets, one array a column. t0 <= t1, min <= first, last <= max; t0 never falls."""

    t0: Int64s
    t1: Int64s
    min: Int64s
    max: Int64s
    first: Int64s
    last: Int64s

    def __len__(self) -> int:
        return len(self.t0)

    @classmethod
    def of_points(cls, times: npt.ArrayLike, values: npt.ArrayLike) -> Buckets:
        """One bucket a point."""
        t, v = np.asarray(times).astype(np.int64), np.asarray(values).astype(np.int64)
        return cls(t, t, v, v, v, v)

    def part(self, low: int, high: int) -> Buckets:
        return Buckets(*(column[low:high] for column in self.columns()))

    def columns(self) -> tuple[Int64s, ...]:
        return (self.t0, self.t1, self.min, self.max, self.first, self.last)

    def merged(self, fan: int) -> Buckets:
        """Each `fan` neighbours as one bucket (the last may have fewer)."""
        starts = np.arange(0, len(self), fan)
        if not len(starts):
            return self
        ends = np.minimum(starts + fan, len(self)) - 1
        low, high = np.minimum.reduceat(self.min, starts), np.maximum.reduceat(self.max, starts)
        return Buckets(self.t0[starts], self.t1[ends], low, high, self.first[starts], self.last[ends])

    def line(self) -> tuple[Int64s, Int64s]:
        """(times, values) of a line through each bucket's lowest and highest value, 2 points a bucket.

        Which of the two comes first follows the bucket's direction; a bucket of one value gives one point.
        """
        rising = self.last >= self.first
        times = np.stack([self.t0, self.t1], axis=1)
        values = np.stack([np.where(rising, self.min, self.max), np.where(rising, self.max, self.min)], axis=1)
        keep = np.ones((len(self), 2), np.bool_)
        keep[:, 1] = (self.t0 != self.t1) | (self.min != self.max)
        return times[keep], values[keep]


class Builder:
    """Makes a pyramid from points that come in portions, in bounded memory."""

    def __init__(self, limit: int = LEVEL_0) -> None:
        assert limit % 2 == 0
        self._limit = limit
        self._points = 1  # a bucket of level 0 holds this many
        self._buckets: list[Buckets] = []
        self._count = 0
        self._rest = Buckets.of_points([], [])  # points that do not fill a bucket yet

    def add(self, times: npt.ArrayLike, values: npt.ArrayLike) -> None:
        """More points; times do not fall."""
        points = Buckets.of_points(times, values)
        step = 1 << 20
        for low in range(0, len(points), step):
            self._add(points.part(low, low + step))

    def _add(self, points: Buckets) -> None:
        points = _joined([self._rest, points])
        whole = len(points) // self._points * self._points
        self._rest = points.part(whole, len(points))
        if whole:
            self._buckets.append(points.part(0, whole).merged(self._points))
            self._count += whole // self._points
        if len(self._buckets) > _PARTS:
            self._buckets = [_joined(self._buckets)]
        while self._count > self._limit:
            self._halve()

    def _halve(self) -> None:
        """Merges pairs of buckets; an odd one out would break the pairing, so it waits with its points merged."""
        joined = _joined(self._buckets)
        even = len(joined) // 2 * 2
        self._points *= 2
        self._buckets = [joined.part(0, even).merged(2)]
        self._count = even // 2
        if even != len(joined):
            # The odd bucket stands for half of a new one; it is joined with what comes next, whatever that is.
            self._rest = _joined([joined.part(even, len(joined)), self._rest])

    def finish(self) -> Pyramid:
        """The pyramid of all points so far."""
        finest = _joined([*self._buckets, self._rest.merged(self._points)])
        return Pyramid.of(finest)


def _joined(parts: Sequence[Buckets]) -> Buckets:
    return Buckets(*(np.concatenate(columns) for columns in zip(*(part.columns() for part in parts), strict=True)))


@dataclass(slots=True)
class Pyramid:
    """All levels of a series, the finest first; levels are decoded when they are looked at."""

    sizes: list[int]  #: buckets of each level
    _load: Callable[[int], Buckets]
    _cache: dict[int, Buckets] = field(default_factory=dict)

    @classmethod
    def of(cls, finest: Buckets) -> Pyramid:
        levels = [finest]
        while len(levels[-1]) > FAN_OUT:
            levels.append(levels[-1].merged(FAN_OUT))
        return cls([len(level) for level in levels], levels.__getitem__)

    def level(self, index: int) -> Buckets:
        """Level `index`, 0 being the finest."""
        if index not in self._cache:
            self._cache[index] = self._load(index)
        return self._cache[index]

    def query(self, t0: int | None = None, t1: int | None = None, max_points: int = 4000) -> Buckets:
        """The finest buckets that touch [t0, t1] (None: no bound) and draw with at most `max_points` points.

        One bucket before the window comes along where there is one, so that a line enters it from its true height.
        """
        budget = max(1, max_points // 2)
        found = self.level(len(self.sizes) - 1)
        for index in reversed(range(len(self.sizes))):
            # Going down, a level has at most FAN_OUT times the buckets: none is decoded that could not be used.
            level = self.level(index)
            low = 0 if t0 is None else max(0, int(np.searchsorted(level.t1, t0, "left")) - 1)
            high = len(level) if t1 is None else int(np.searchsorted(level.t0, t1, "right"))
            part = level.part(low, max(low, high))
            if len(part) > budget:
                return found if len(found) <= budget else found.merged(-(-len(found) // budget))
            found = part
        return found


def build(times: npt.ArrayLike, values: npt.ArrayLike) -> Pyramid:
    """The pyramid of a whole series. `times` do not fall; values are 64-bit integers."""
    builder = Builder()
    builder.add(times, values)
    return builder.finish()


def encode_level(level: Buckets) -> bytes:
    """The blob of a level, as drawn above."""
    out = []
    for column in level.columns():
        values = column.astype(np.uint64)
        values[1:] -= values[:-1].copy()
        width, data = planes.pack(planes.zigzag(values))
        out.append(_HEAD.pack(width, len(data)) + data)
    return b"".join(out)


def decode_level(data: bytes, buckets: int, crc: int) -> Buckets:
    """Undoes `encode_level`; TraceError for anything it would not have written."""
    if zlib.crc32(data) != crc:
        raise TraceError("a timeline is damaged (checksum)")
    if not 0 <= buckets <= LEVEL_0 + FAN_OUT:
        raise TraceError(f"a timeline claims {buckets} buckets")
    columns, at = [], 0
    for _ in range(_COLUMNS):
        if len(data) < at + _HEAD.size:
            raise TraceError("a timeline is cut short")
        width, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        values = planes.unpack(data[at : at + length], width, buckets)
        columns.append(np.cumsum(planes.unzigzag(values), dtype=np.uint64).astype(np.int64))
        at += length
    return Buckets(*columns)
