"""Which memory the program itself mapped, and from where: the MMAP, MUNMAP and MREMAP events as an interval map.

Identity: the regions are disjoint, not empty, and ascending; `check()` says so.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np

from heapledger.store.events import Events, Kind

#: What a failed mmap or mremap returns.
MAP_FAILED = 2**64 - 1
#: No address of user space lies above.
_LIMIT = 2**57


@dataclass(frozen=True, slots=True)
class Region:
    """Memory [start, end) that the call of `stack` mapped at `time` ns."""

    start: int
    end: int
    stack: int
    time: int


class Mappings:
    """The regions that are mapped now. Adding or removing costs O(log n) and a list insertion."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._regions: list[Region] = []

    def __len__(self) -> int:
        return len(self._regions)

    def copy(self) -> Mappings:
        """An independent map in the same state (a fork's child)."""
        other = Mappings()
        other._starts = list(self._starts)
        other._regions = list(self._regions)
        return other

    def regions(self) -> list[Region]:
        """By ascending address."""
        return list(self._regions)

    def feed(self, events: Events) -> None:
        """Takes in the mapping calls among `events`; others are ignored."""
        kinds = events.kind
        chosen = np.flatnonzero((kinds == Kind.MMAP) | (kinds == Kind.MUNMAP) | (kinds == Kind.MREMAP))
        for i in chosen.tolist():
            kind, addr, size = int(kinds[i]), int(events.addr[i]), int(events.size[i])
            stack, time = int(events.stack[i]), int(events.time[i])
            if kind == Kind.MMAP:
                self.add(addr, size, stack, time)
            elif kind == Kind.MUNMAP:
                # A call that was never seen to return may well have worked: its memory is not ours to book any more.
                if int(events.arg[i]) == 0:
                    self.remove(addr, size)
            elif addr != MAP_FAILED:
                self.remove(int(events.arg[i]), int(events.word[i]))
                self.add(addr, size, stack, time)

    def add(self, start: int, length: int, stack: int, time: int) -> None:
        """A new mapping; whatever was there before is replaced (MAP_FIXED). Nonsense is ignored."""
        end = _page_up(start + length)
        if length <= 0 or start <= 0 or end > _LIMIT:
            return
        self.remove(start, length)
        at = bisect_left(self._starts, start)
        self._starts.insert(at, start)
        self._regions.insert(at, Region(start, end, stack, time))

    def remove(self, start: int, length: int) -> None:
        """Unmaps [start, start + length); parts of regions outside stay."""
        end = _page_up(start + length)
        if length <= 0 or end > _LIMIT:
            return
        first = bisect_right(self._starts, start) - 1
        if first < 0 or self._regions[first].end <= start:
            first += 1
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        kept = []
        for region in self._regions[first:last]:
            if region.start < start:
                kept.append(Region(region.start, start, region.stack, region.time))
            if region.end > end:
                kept.append(Region(end, region.end, region.stack, region.time))
        self._regions[first:last] = kept
        self._starts[first:last] = [region.start for region in kept]

    def check(self) -> None:
        """Raises AssertionError unless the identity of this module holds."""
        assert self._starts == [region.start for region in self._regions]
        for region in self._regions:
            assert region.start < region.end
        for before, after in zip(self._regions, self._regions[1:], strict=False):
            assert before.end <= after.start


def _page_up(address: int) -> int:
    return (address + 4095) & ~4095
