"""Who owns each resident page: malloc's chunks laid over the pieces of every mapping.

A chunk at c of s bytes owns [c + 8, c + s + 8): its first word belongs to the chunk before while that one is in use,
and it uses the first word of the next (specs/glibc-malloc.md §1). So chunks that tile the heap tile it shifted by 8:

    live      | c+8 size word | c+16 requested bytes ... | rounding |
              |   overhead    |          live            | overhead |
    free      | c+8 ...       | whole pages from page_up(c+48) | rest    |   48: struct malloc_chunk, which
              |   pinned      |          reclaimable           | pinned  |   malloc_trim keeps

Identity (`Ledger.check`): owners sum to the resident bytes of the page map, byte for byte, whatever the chunks claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.glibc.states import ChunkState
from heapledger.analyzer.kernel.residency import Residency, from_vmas
from heapledger.analyzer.kernel.vma import Vma, sane
from heapledger.analyzer.owners import Claims, OwnerKind, Piece, tile
from heapledger.analyzer.replay import ChunkTable, LiveTable
from heapledger.store.residency import Category

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]

#: sizeof(struct malloc_chunk): malloc_trim never gives back the page these first bytes of a free chunk lie on.
CHUNK_STRUCT = 48
#: Chunk start to user pointer.
USER_OFFSET = 16
#: Chunks are booked in slices of this many, so that a heap of 50 M chunks needs no gigabytes of temporaries.
_SLICE = 1 << 20

KINDS = tuple(OwnerKind)
_CODE = {kind: code for code, kind in enumerate(KINDS)}
_LIVE = _CODE[OwnerKind.LIVE]
#: ChunkState → kind of the whole chunk. LIVE and FREE are split in three, see above.
_STATE_KIND = {
    ChunkState.TCACHE: OwnerKind.TCACHE,
    ChunkState.FASTBIN: OwnerKind.FASTBIN,
    ChunkState.TOP: OwnerKind.TOP,
    ChunkState.FENCE: OwnerKind.ARENA,
    ChunkState.TCACHE_STRUCT: OwnerKind.ARENA,
    ChunkState.FOREIGN: OwnerKind.FOREIGN_SBRK,
}


@dataclass(slots=True)
class HeapState:
    """What the model holds at one moment: the tables of `Replay`, and where the main heap begins and ends."""

    chunks: ChunkTable
    mapped: ChunkTable
    live: LiveTable
    heap_start: int = 0
    heap_end: int = 0


@dataclass(slots=True)
class Spans:
    """Memory of malloc in three parts each: [start, first), [first, second), [second, end), disjoint and ascending.

    `kinds[i]` are the codes of the three parts (index into KINDS). `stack` and `time` are the allocation's.
    """

    start: Int64s
    first: Int64s
    second: Int64s
    end: Int64s
    kinds: npt.NDArray[np.uint8]
    requested: Int64s
    stack: npt.NDArray[np.uint32]
    time: Uint64s

    def __len__(self) -> int:
        return len(self.start)

    def take(self, index: npt.NDArray[np.intp] | npt.NDArray[np.bool_] | slice) -> Spans:
        return Spans(*(getattr(self, name)[index] for name in self.__slots__))

    @classmethod
    def concat(cls, parts: Sequence[Spans]) -> Spans:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__slots__))


@dataclass(slots=True)
class LiveSites:
    """Live blocks by call stack, as columns. `origin` 0: the process's own stacks, 1: its parent's, 2: and so on."""

    origin: int
    stack: npt.NDArray[np.uint32]
    rss_bytes: Int64s
    requested_bytes: Int64s
    blocks: Int64s
    variances: npt.NDArray[np.float64] | None = None  #: of the three, a row each; None: they are exact


@dataclass(frozen=True, slots=True)
class Owner:
    """One line of the ledger, all but live blocks. `bytes`, `blocks`, `stack`, `origin`: of `mmap` only."""

    kind: OwnerKind
    name: str
    rss_bytes: int
    bytes: int | None = None
    blocks: int | None = None
    stack: int = 0
    origin: int = 0  #: whose call stack it is, as in LiveSites


@dataclass(slots=True)
class Ledger:
    """The books at one moment. `resident_bytes` is the page map's count."""

    resident_bytes: int
    owners: list[Owner]
    sites: list[LiveSites]
    estimated: bool
    notes: list[str] = field(default_factory=list)
    sample_bytes: int = 0  #: not 0: `sites` are estimates from a sample (sampled_ledger.py)

    @property
    def unexplained_bytes(self) -> int:
        return sum(o.rss_bytes for o in self.owners if o.kind is OwnerKind.UNEXPLAINED)

    @property
    def live_rss_bytes(self) -> int:
        return sum(int(s.rss_bytes.sum()) for s in self.sites)

    def check(self) -> None:
        """Raises AssertionError unless owners sum to the page map and none is negative."""
        total = sum(o.rss_bytes for o in self.owners) + self.live_rss_bytes
        assert total == self.resident_bytes, f"owners sum to {total}, the page map to {self.resident_bytes}"
        assert all(o.rss_bytes >= 0 for o in self.owners)
        for sites in self.sites:
            assert (sites.rss_bytes >= 0).all()


def adopted_addresses(state: HeapState) -> Uint64s:
    """User pointers of live blocks that lie neither in the main heap nor in a mapping of their own, ascending."""
    outside = (state.live.address < state.heap_start) | (state.live.address >= state.heap_end)
    return np.sort(state.live.address[outside & ~state.live.mmapped])


def spans_of(state: HeapState, page_size: int = 4096) -> Spans:
    """Everything malloc holds, as disjoint spans by ascending address."""
    parts = [p for p in (_heap_spans(state, page_size), _mapped_spans(state), _adopted_spans(state)) if len(p)]
    if not parts:
        return no_spans()
    # A large heap is most of a process's memory, and its tables are of that order: nothing is copied without need.
    spans = parts[0] if len(parts) == 1 else Spans.concat(parts)
    if (spans.start[1:] < spans.start[:-1]).any():
        spans = spans.take(np.argsort(spans.start, kind="stable"))
    return _disjoint(spans)


def _heap_spans(state: HeapState, page_size: int) -> Spans:
    """The main heap's chunks, shifted by 8, with the 8 bytes before the first one."""
    table = state.chunks
    if not len(table):
        return no_spans()
    chunk, size = _signed(table.start), _signed(table.size)
    start, end = chunk + 8, np.minimum(chunk + size + 8, max(state.heap_end, int(chunk[-1] + size[-1])))
    kinds = np.full((len(table), 3), _CODE[OwnerKind.UNEXPLAINED], np.uint8)
    for code, kind in _STATE_KIND.items():
        kinds[table.state == code] = _CODE[kind]
    live, free = table.state == ChunkState.LIVE, table.state == ChunkState.FREE
    kinds[live] = (_CODE[OwnerKind.CHUNK_OVERHEAD], _LIVE, _CODE[OwnerKind.CHUNK_OVERHEAD])
    kinds[free] = (_CODE[OwnerKind.HOLE_PINNED], _CODE[OwnerKind.HOLE_RECLAIMABLE], _CODE[OwnerKind.HOLE_PINNED])
    user = np.minimum(chunk + USER_OFFSET, end)
    requested = np.where(live, _clip_requests(table.requested, end - user), 0)
    low, high = whole_pages(chunk, size, page_size)
    first = np.where(free, low, np.where(live, user, end))
    second = np.where(free, high, np.where(live, user + requested, end))
    first, second = np.minimum(first, end), np.minimum(second, end)
    # The 8 bytes before the first size word are nobody's: they go to the arena with what the first chunk begins with.
    return Spans.concat(
        [
            _whole(chunk[:1], start[:1], OwnerKind.ARENA),
            Spans(start, first, second, end, kinds, _asked(table.requested), table.stack, table.time),
        ]
    )


def whole_pages(chunk: Int64s, size: Int64s, page_size: int) -> tuple[Int64s, Int64s]:
    """The pages [low, high) of free chunks that malloc_trim gives back; low == high where there is none.

    Source: glibc-malloc.md §8: from page_up(chunk + 48), whole pages up to the chunk's end.
    """
    low = (chunk + CHUNK_STRUCT + page_size - 1) & -page_size
    high = (chunk + size) & -page_size
    none = high <= low
    middle = chunk + 8
    return np.where(none, middle, low), np.where(none, middle, high)


def _mapped_spans(state: HeapState) -> Spans:
    """Blocks with a mapping of their own: overhead from the base to the user pointer, and behind the request."""
    live = state.live
    which = np.flatnonzero(live.mmapped)
    user = live.address[which].astype(np.int64)
    base = state.mapped.start.astype(np.int64)
    at = np.searchsorted(base, user, side="right") - 1
    known = at >= 0
    which, user, at = which[known], user[known], at[known]
    if not len(which):
        return no_spans()
    start = base[at]
    end = start + state.mapped.size[at].astype(np.int64)
    user = np.minimum(user, end)
    requested = _clip_requests(live.requested[which], end - user)
    return _live_spans(live, which, start, user, requested, end)


def _adopted_spans(state: HeapState) -> Spans:
    """Blocks of arenas that are not modelled: known by their events alone, with the chunk around them."""
    live = state.live
    user = live.address.astype(np.int64)
    outside = (user < state.heap_start) | (user >= max(state.heap_end, state.heap_start))
    which = np.flatnonzero(outside & ~live.mmapped)
    if not len(which):
        return no_spans()
    user = user[which]
    size = np.maximum(live.chunk_size[which].astype(np.int64), 0)
    end = np.maximum(user - USER_OFFSET + size + 8, user)
    # A chunk whose size word was not recorded is at least as large as what was asked for.
    requested = np.where(size > 0, _clip_requests(live.requested[which], end - user), 0)
    return _live_spans(live, which, user - 8, user, requested, end)


def _live_spans(
    live: LiveTable, which: npt.NDArray[np.intp], start: Int64s, user: Int64s, requested: Int64s, end: Int64s
) -> Spans:
    kinds = np.empty((len(which), 3), np.uint8)
    kinds[:] = (_CODE[OwnerKind.CHUNK_OVERHEAD], _LIVE, _CODE[OwnerKind.CHUNK_OVERHEAD])
    asked = _asked(live.requested[which])
    return Spans(start, user, user + requested, end, kinds, asked, live.stack[which], live.time[which])


def _signed(values: Uint64s) -> Int64s:
    """Addresses or sizes as signed numbers, without a copy: the tables hold none from 2**63 up."""
    return values.view(np.int64)


def _asked(requested: Uint64s) -> Int64s:
    """Requests as they were made; no block is larger than the address space, whatever a file says."""
    return np.minimum(requested, np.uint64(1 << 47)).astype(np.int64)


def _clip_requests(requested: Uint64s, room: Int64s) -> Int64s:
    """Requests as signed numbers, none longer than the room its chunk has (hostile traces claim anything)."""
    return np.minimum(requested, np.maximum(room, 0).astype(np.uint64)).astype(np.int64)


def _whole(start: Int64s, end: Int64s, kind: OwnerKind) -> Spans:
    count = len(start)
    kinds = np.full((count, 3), _CODE[kind], np.uint8)
    zero = np.zeros(count, np.int64)
    return Spans(start, end, end, end, kinds, zero, zero.astype(np.uint32), zero.astype(np.uint64))


def no_spans() -> Spans:
    nothing = np.zeros(0, np.int64)
    return _whole(nothing, nothing, OwnerKind.ARENA)


def _disjoint(spans: Spans) -> Spans:
    """Cuts each span where the ones before reach into it, so that no byte is booked twice (hostile files).

    Afterwards 0 <= start <= first <= second <= end, and end <= the next start.
    """
    edges = (spans.start, spans.first, spans.second, spans.end)
    ordered = all((low <= high).all() for low, high in pairwise(edges))
    if ordered and spans.start[0] >= 0 and not (spans.start[1:] < spans.end[:-1]).any():
        return spans
    reached = np.concatenate(([0], np.maximum(np.maximum.accumulate(spans.end)[:-1], 0)))
    for name in ("start", "first", "second", "end"):
        reached = np.maximum(getattr(spans, name), reached)
        setattr(spans, name, reached)
    return spans


class _Overlay:
    """What malloc has of the resident bytes: M(x), as R(x) is for all."""

    def __init__(self, spans: Spans, residency: Residency) -> None:
        self._start, self._end, self._residency = spans.start, spans.end, residency
        self._at_start = residency.below(spans.start)
        self._before = np.concatenate(([0], np.cumsum(residency.below(spans.end) - self._at_start)))

    def below(self, addresses: Int64s) -> Int64s:
        if not len(self._start):
            return np.zeros(addresses.shape, np.int64)
        at = np.searchsorted(self._start, addresses, side="right") - 1
        inside = self._residency.below(np.minimum(addresses, self._end[at])) - self._at_start[at]
        return np.where(at >= 0, self._before[at] + inside, 0)


def balance(
    vmas: Sequence[Vma], state: HeapState, claims: Claims, *, own_since: Sequence[int] = (0,), page_size: int = 4096
) -> Ledger:
    """The books for one snapshot. Cost O((chunks + runs) log), memory O(chunks).

    `own_since`: start times (ns) of the process and, for a fork's child, of its parent and so on: a block allocated
    before own_since[0] has a stack of the parent's.
    """
    ordered = sane(vmas)
    residency, estimated = from_vmas(ordered, page_size=page_size)
    copies, _ = from_vmas(ordered, page_size=page_size, categories=(int(Category.ANON),))
    spans = spans_of(state, page_size)
    owners, sites = _book_spans(spans, residency, own_since)
    owners += book_pieces(tile(ordered, claims), spans, residency, copies, own_since)
    merged = merge(owners)
    notes = ["The kernel gave no page map: pages are spread evenly over their mapping."] if estimated else []
    return Ledger(residency.total_bytes, merged, sites, estimated, notes + claims.notes)


def _book_spans(spans: Spans, residency: Residency, own_since: Sequence[int]) -> tuple[list[Owner], list[LiveSites]]:
    """Bytes of malloc's kinds, and of live blocks by call stack."""
    totals = np.zeros(len(KINDS), np.int64)
    live_rss = np.zeros(len(spans), np.int64)
    for begin in range(0, len(spans), _SLICE):
        part = spans.take(slice(begin, begin + _SLICE))
        edges = residency.below(np.stack((part.start, part.first, part.second, part.end), axis=1))
        amounts = np.diff(edges, axis=1)
        totals += np.bincount(part.kinds.ravel(), weights=amounts.ravel(), minlength=len(KINDS)).astype(np.int64)
        live_rss[begin : begin + _SLICE] = np.where(part.kinds[:, 1] == _LIVE, amounts[:, 1], 0)
    owners = [Owner(kind, "", int(totals[code])) for code, kind in enumerate(KINDS) if totals[code] and code != _LIVE]
    live = spans.kinds[:, 1] == _LIVE if len(spans) else np.zeros(0, bool)
    return owners, live_sites(spans.stack[live], spans.time[live], spans.requested[live], live_rss[live], own_since)


def live_sites(
    stack: npt.NDArray[np.uint32],
    time: Uint64s,
    requested: Int64s,
    rss: Int64s,
    own_since: Sequence[int] = (0,),
) -> list[LiveSites]:
    """Blocks summed by call stack, apart for each process of the fork chain whose stacks they are."""
    if not len(stack):
        return []
    origin = origins_of(time, own_since)
    result = []
    for which in np.unique(origin).tolist():
        mine = origin == which
        stacks, index = np.unique(stack[mine], return_inverse=True)
        sums = [_sum_by(index, values[mine], len(stacks)) for values in (rss, requested)]
        blocks = np.bincount(index, minlength=len(stacks)).astype(np.int64)
        result.append(LiveSites(int(which), stacks, sums[0], sums[1], blocks))
    return result


def origins_of(time: Uint64s, own_since: Sequence[int]) -> Int64s:
    """As `origin_of`, of many."""
    origin = np.zeros(len(time), np.int64)
    for since in own_since[:-1]:
        origin += time < np.uint64(max(since, 0))
    return origin


def origin_of(time: int, own_since: Sequence[int]) -> int:
    """Whose call stacks something of `time` ns has: 0 the process's own, 1 its parent's ..."""
    return sum(time < since for since in own_since[:-1])


def _sum_by(index: npt.NDArray[np.intp], values: Int64s, count: int) -> Int64s:
    """Exact integer sums (bincount's weights are doubles, exact up to 2**53 bytes only)."""
    sums = np.zeros(count, np.int64)
    np.add.at(sums, index, values)
    return sums


def book_pieces(
    pieces: Sequence[Piece], spans: Spans, residency: Residency, copies: Residency, own_since: Sequence[int]
) -> list[Owner]:
    """What malloc (its `spans`) left of each piece."""
    if not pieces:
        return []
    starts = np.array([p.start for p in pieces], np.int64)
    ends = np.array([p.end for p in pieces], np.int64)
    overlay = _Overlay(spans, residency)
    rest = residency.between(starts, ends) - (overlay.below(ends) - overlay.below(starts))
    copied = np.minimum(copies.between(starts, ends), rest)
    owners = []
    for piece, amount, copy in zip(pieces, rest.tolist(), copied.tolist(), strict=True):
        if piece.copies and copy:
            owners.append(Owner(OwnerKind.PRIVATE_COPY, piece.name, copy))
            amount -= copy
        if amount or piece.kind is OwnerKind.MMAP:
            extent = piece.end - piece.start if piece.kind is OwnerKind.MMAP else None
            owners.append(
                Owner(
                    piece.kind,
                    piece.name,
                    amount,
                    extent,
                    None if extent is None else 1,
                    piece.stack,
                    origin_of(piece.time, own_since) if piece.stack else 0,
                )
            )
    return owners


def merge(owners: Sequence[Owner]) -> list[Owner]:
    """One line for each kind, name and stack, the largest first."""
    sums: dict[tuple[OwnerKind, str, int, int], Owner] = {}
    for owner in owners:
        key = (owner.kind, owner.name, owner.stack, owner.origin)
        before = sums.get(key)
        sums[key] = owner if before is None else _add(before, owner)
    return sorted(sums.values(), key=lambda o: (-o.rss_bytes, o.kind, o.name))


def _add(a: Owner, b: Owner) -> Owner:
    extent = None if a.bytes is None and b.bytes is None else (a.bytes or 0) + (b.bytes or 0)
    blocks = None if a.blocks is None and b.blocks is None else (a.blocks or 0) + (b.blocks or 0)
    return Owner(a.kind, a.name, a.rss_bytes + b.rss_bytes, extent, blocks, a.stack, a.origin)
