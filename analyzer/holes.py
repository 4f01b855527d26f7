"""Free memory inside the heap that stays resident, and the live chunk that keeps it there.

A *hole* is a maximal run of free chunks in the unsorted, small or large bins. Its *pin* is the live chunk next above
it: while that one lives, the hole cannot become part of the top and go back with the break. The *break pin* is the last
live chunk of the heap: everything below it stays.

Identity: resident >= reclaimable, and the holes' resident bytes sum to the ledger's hole_reclaimable + hole_pinned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.glibc.states import ChunkState
from heapledger.analyzer.kernel.residency import Residency
from heapledger.analyzer.ledger import HeapState, whole_pages
from heapledger.analyzer.lifetimes import Released

Int64s = npt.NDArray[np.int64]

#: What `malloc_trim(0)` leaves in the top: glibc's MINSIZE + 1 (glibc-malloc.md §8).
_TOP_KEPT = 33
#: Places that freed what lies in one hole that are kept.
MAX_FREED_AT = 3
_HELD_BY = {ChunkState.LIVE: "live", ChunkState.TCACHE: "tcache", ChunkState.FASTBIN: "fastbin", ChunkState.TOP: "top"}


@dataclass(frozen=True, slots=True)
class Pin:
    """A live chunk. `bytes` as requested; `time` of its allocation in ns; `stack` its call stack's id."""

    address: int
    bytes: int
    time: int
    stack: int


@dataclass(frozen=True, slots=True)
class Hole:
    """A run of free memory [address, address + bytes). `held_by`: what lies directly above."""

    kind: str  # "hole" or "top"
    address: int
    bytes: int
    resident_bytes: int
    reclaimable_bytes: int
    held_by: str
    pin: Pin | None
    freed: tuple[Freed, ...] = ()  #: who freed what lies in it, the most bytes first


@dataclass(frozen=True, slots=True)
class Freed:
    """Freed blocks in holes, by the call site (its number) that freed them. `bytes`: of their chunks."""

    site: int
    blocks: int
    bytes: int


@dataclass(slots=True)
class Holes:
    """All holes of one moment, by resident bytes, and sums over all of them."""

    count: int
    total_bytes: int
    total_resident_bytes: int
    total_reclaimable_bytes: int
    holes: list[Hole]  #: the largest ones, `top` not among them
    top: Hole | None
    break_pin: Pin | None
    holes_below_pin_bytes: int
    pins: list[PinnedSite]
    freed: list[Freed]  #: who freed what lies in all of them


@dataclass(frozen=True, slots=True)
class PinnedSite:
    """All holes whose pins one call stack allocated. `time`: of the oldest of these pins."""

    stack: int
    time: int
    holes: int
    bytes: int
    resident_bytes: int
    reclaimable_bytes: int


def find_holes(
    state: HeapState,
    residency: Residency,
    released: Released | None = None,
    *,
    limit: int = 1000,
    page_size: int = 4096,
) -> Holes:
    """The holes of the main heap; details of the `limit` largest. Cost O(chunks + runs log).

    `released`: the blocks that are no more, for who freed what lies in the holes.
    """
    table = state.chunks
    starts, ends, last = _runs(
        table.state == ChunkState.FREE, table.start.astype(np.int64), table.size.astype(np.int64)
    )
    resident = residency.between(starts + 8, np.minimum(ends + 8, max(state.heap_end, 0)))
    low, high = whole_pages(starts, ends - starts, page_size)
    reclaimable = residency.between(low, high)
    pin_index = _next_live(table.state == ChunkState.LIVE, last)
    order = np.lexsort((starts, -(ends - starts), -resident))[:limit]
    freed, freed_in = _freed(released, starts, ends, order) if released is not None else ([], {})
    holes = [
        Hole(
            "hole",
            int(starts[i]),
            int(ends[i] - starts[i]),
            int(resident[i]),
            int(reclaimable[i]),
            _held_by(state, int(last[i])),
            _pin(state, int(pin_index[i])),
            freed_in.get(i, ()),
        )
        for i in order.tolist()
    ]
    live = np.flatnonzero(table.state == ChunkState.LIVE)
    last_live = int(live[-1]) if len(live) else -1
    below = last < last_live
    return Holes(
        count=len(starts),
        total_bytes=int((ends - starts).sum()),
        total_resident_bytes=int(resident.sum()),
        total_reclaimable_bytes=int(reclaimable.sum()),
        holes=holes,
        top=_top(state, residency, last_live, page_size),
        break_pin=_pin(state, last_live),
        holes_below_pin_bytes=int((ends - starts)[below].sum()),
        pins=_by_site(state, pin_index, ends - starts, resident, reclaimable),
        freed=freed,
    )


def _freed(
    released: Released, starts: Int64s, ends: Int64s, wanted: npt.NDArray[np.intp]
) -> tuple[list[Freed], dict[int, tuple[Freed, ...]]]:
    """Who freed what lies in all holes, and in each of the `wanted` ones (by index).

    A block lies in a hole if its chunk does, all of it, and no part of it has been another block since.
    """
    chunk = released.address.astype(np.int64) - 16
    hole = np.searchsorted(starts, chunk, side="right") - 1
    inside = hole >= 0
    inside[inside] = chunk[inside] + released.chunk_size[inside].astype(np.int64) <= ends[hole[inside]]
    last = released.take(inside).newest()
    hole = np.searchsorted(starts, last.address.astype(np.int64) - 16, side="right") - 1
    everything = _freed_by(last.released_by, last.chunk_size.astype(np.int64))
    each = {}
    low, high = np.searchsorted(hole, wanted, side="left"), np.searchsorted(hole, wanted, side="right")
    for i, begin, end in zip(wanted.tolist(), low.tolist(), high.tolist(), strict=True):
        if begin < end:
            part = slice(begin, end)
            each[i] = tuple(_freed_by(last.released_by[part], last.chunk_size[part].astype(np.int64))[:MAX_FREED_AT])
    return everything, each


def _freed_by(sites: npt.NDArray[np.uint32], sizes: Int64s) -> list[Freed]:
    """Blocks summed by call site, the most bytes first."""
    found, index, blocks = np.unique(sites, return_inverse=True, return_counts=True)
    total = np.bincount(index, weights=sizes, minlength=len(found))
    order = np.argsort(-total, kind="stable")
    return [Freed(int(found[i]), int(blocks[i]), int(total[i])) for i in order.tolist()]


def _runs(free: npt.NDArray[np.bool_], start: Int64s, size: Int64s) -> tuple[Int64s, Int64s, npt.NDArray[np.intp]]:
    """Start, end and last chunk's index of each maximal run of free chunks."""
    edges = np.diff(np.concatenate(([0], free.astype(np.int8), [0])))
    first, last = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    return start[first], start[last] + size[last], last


def _next_live(live: npt.NDArray[np.bool_], after: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Index of the first live chunk behind each of `after`; -1 where there is none."""
    positions = np.flatnonzero(live)
    at = np.searchsorted(positions, after, side="right")
    padded = np.concatenate((positions, [-1]))
    return padded[at]


def _pin(state: HeapState, index: int) -> Pin | None:
    if index < 0:
        return None
    table = state.chunks
    user = int(table.start[index]) + 16
    return Pin(user, int(table.requested[index]), int(table.time[index]), int(table.stack[index]))


def _held_by(state: HeapState, last: int) -> str:
    """What the direct neighbour above is."""
    if last + 1 >= len(state.chunks):
        return "end"
    return _HELD_BY.get(ChunkState(int(state.chunks.state[last + 1])), "other")


def _top(state: HeapState, residency: Residency, last_live: int, page_size: int) -> Hole | None:
    """The end of the heap, with what malloc_trim(0) would return of it (glibc-malloc.md §8: page_floor(top - 33))."""
    table = state.chunks
    which = np.flatnonzero(table.state == ChunkState.TOP)
    if not len(which):
        return None
    start, size = int(table.start[which[-1]]), int(table.size[which[-1]])
    end = start + size
    trimmed = max((size - _TOP_KEPT) & -page_size, 0)
    resident, reclaimable = residency.between([start + 8, end - trimmed], [end, end]).tolist()
    return Hole("top", start, size, resident, reclaimable, "end", _pin(state, last_live))


def _by_site(
    state: HeapState, pins: npt.NDArray[np.intp], sizes: Int64s, resident: Int64s, reclaimable: Int64s
) -> list[PinnedSite]:
    """Holes summed by the call stack of their pins, the most resident bytes first."""
    known = pins >= 0
    if not known.any():
        return []
    stack, time = state.chunks.stack[pins[known]], state.chunks.time[pins[known]]
    stacks, index = np.unique(stack, return_inverse=True)
    sums = []
    for values in (sizes, resident, reclaimable):
        total = np.zeros(len(stacks), np.int64)
        np.add.at(total, index, values[known])
        sums.append(total)
    oldest = np.full(len(stacks), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(oldest, index, time)
    count = np.bincount(index, minlength=len(stacks))
    order = np.argsort(-sums[1], kind="stable")
    return [
        PinnedSite(int(stacks[i]), int(oldest[i]), int(count[i]), int(sums[0][i]), int(sums[1][i]), int(sums[2][i]))
        for i in order.tolist()
    ]
