"""Blocks from allocation to release: who allocated, who released, what was temporary, what lives.

    allocation ──▶ live ──▶ release      a flow for each (allocating call site, releasing call site)

A block is *temporary* if the thread that allocated it released it before it allocated anything else: memory that a
variable on the stack, or a buffer that is kept, would have served as well. (heaptrack's notion; it looks at all threads
together.) realloc releases the old block and allocates the new one.

Identity: allocated = live + the sum of the flows, in blocks and in bytes.

In a sampled trace (`sampling`) the same is done with what each recorded block stands for. Whether another allocation
came between cannot be seen there, so the shim says it: `arg` of FREE is 1 (temporary) or 2 (not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.replay import LiveTable, Series
from heapledger.analyzer.sampling import weigh
from heapledger.store.events import Events, Kind

try:
    from heapledger.analyzer import _lifetimes
except ImportError:  # not built: an interpreter without a compiler
    _lifetimes = None  # type: ignore[assignment]

_FED = ("kind", "thread", "time", "seq_exit", "addr", "size", "arg", "word", "stack")
_ALLOCATIONS = frozenset(
    {Kind.MALLOC, Kind.CALLOC, Kind.REALLOC, Kind.MEMALIGN, Kind.VALLOC, Kind.PVALLOC}
)  # fmt: skip
#: No request is larger than the address space, whatever a file says.
_SIZE_LIMIT = 1 << 47
_BYTES_LIMIT = 1 << 62
_MMAPPED = 2  # the bit of the word at p-8

#: Columns of amounts, for each flow or site: exact ones have no variance.
BLOCKS, BYTES, BLOCKS_VARIANCE, BYTES_VARIANCE = range(4)
Amounts = npt.NDArray[np.float64]


@dataclass(slots=True)
class Flows:
    """What was released, by (allocating site, releasing site). `amounts`, `temporary`: a row of 4 columns a flow."""

    allocated_by: npt.NDArray[np.uint32]
    released_by: npt.NDArray[np.uint32]
    amounts: Amounts
    temporary: Amounts

    def __len__(self) -> int:
        return len(self.allocated_by)


@dataclass(slots=True)
class Released:
    """Where blocks were that are no more: user address, chunk size in bytes, the release's number, and who released."""

    address: npt.NDArray[np.uint64]
    chunk_size: npt.NDArray[np.uint64]
    number: npt.NDArray[np.uint64]
    released_by: npt.NDArray[np.uint32]

    def take(self, index: npt.NDArray[np.bool_]) -> Released:
        return Released(*(getattr(self, name)[index] for name in self.__slots__))

    def newest(self) -> Released:
        """Those of which no part has been another block since: they do not overlap."""
        columns = (self.address, self.address + self.chunk_size, self.number)
        kept = plain_newest(*columns) if _lifetimes is None else _lifetimes.newest(*columns)
        return self.take(kept.astype(np.bool_))


def plain_newest(
    start: npt.NDArray[np.uint64], end: npt.NDArray[np.uint64], number: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint8]:
    """1 for each interval, by ascending start, that no interval of a higher number overlaps."""
    keep = np.ones(len(start), np.uint8)
    low, high, age = start.tolist(), end.tolist(), number.tolist()
    # Of those that began before: the ones that are not both older and shorter than another, the newest (and first to
    # end) last.
    reaching: list[int] = []
    for i in range(len(low)):
        while reaching and high[reaching[-1]] <= low[i]:
            reaching.pop()
        if reaching and age[reaching[-1]] > age[i]:
            keep[i] = 0
        newer = [j for j in reaching if age[j] > age[i]]
        if all(high[j] < high[i] for j in newer):
            reaching = [j for j in reaching if age[j] < age[i] and high[j] > high[i]] + [i, *newer]
    # Of those that begin later the next newer one tells: it begins first.
    waiting: list[int] = []
    for i in range(len(low)):
        while waiting and age[waiting[-1]] < age[i]:
            j = waiting.pop()
            if low[i] < high[j]:
                keep[j] = 0
        waiting.append(i)
    return keep


class Lifetimes:
    """One process's blocks, fed with its events in order. Cost O(1) an event; memory 80 bytes a live block, and at
    most 84 MB more.

    Call sites are numbers that come with the events (`site_table.SiteTable.of`).

    `compiled`: which table (None: the compiled one if it is built).
    """

    def __init__(self, sample_bytes: int = 0, *, compiled: bool | None = None) -> None:
        if compiled is None:
            compiled = _lifetimes is not None
        self._table: Any = _lifetimes.Table(sample_bytes) if compiled else PlainTable(sample_bytes)
        self.sample_bytes = sample_bytes
        self.peak_variance = 0.0  #: of the highest estimate of live bytes
        self._peak = -1

    def copy(self) -> Lifetimes:
        """An independent copy (a fork's child): see `begin`."""
        twin = object.__new__(Lifetimes)
        twin._table = self._table.copy()
        twin.sample_bytes = self.sample_bytes
        twin.peak_variance, twin._peak = 0.0, -1
        return twin

    def begin(self, since_ns: int) -> None:
        """Counts anew. Blocks from before `since_ns` are inherited: their releases are no flows. What was released
        before is forgotten: the numbers of call sites are another process's."""
        self._table.begin(max(since_ns, 0))
        self.peak_variance, self._peak = 0.0, -1

    def feed(self, events: Events, sites: npt.NDArray[np.uint32]) -> None:
        """Consumes `events`, which continue those of earlier calls. `sites`: the call site of each."""
        nothing = np.zeros(0, np.int64)
        self._table.feed(*self._columns(events), sites, nothing, nothing, np.zeros(0))

    def feed_estimating(self, events: Events, sites: npt.NDArray[np.uint32]) -> Series:
        """As `feed`; returns live bytes and blocks after each event, as estimates (all else is not known: 0)."""
        count = len(events)
        live_bytes, live_blocks, unknown = (np.zeros(count, np.int64) for _ in range(3))
        variance = np.zeros(count)
        self._table.feed(*self._columns(events), sites, live_bytes, live_blocks, variance)
        if count:
            at = int(live_bytes.argmax())
            if live_bytes[at] > self._peak:
                self._peak, self.peak_variance = int(live_bytes[at]), float(variance[at])
        return Series(live_bytes, live_blocks, unknown, unknown, unknown, unknown, unknown)

    @staticmethod
    def _columns(events: Events) -> list[npt.NDArray[Any]]:
        return [np.ascontiguousarray(getattr(events, name)) for name in _FED]

    @property
    def knows_temporary(self) -> bool:
        """Whether anything is known of temporary allocations."""
        return not self.sample_bytes or self._table.hints > 0

    def allocated(self) -> Amounts:
        """All that was allocated since the beginning: one row of amounts."""
        (blocks, size), weights = self._table.allocated()
        return np.array(weights if self.sample_bytes else [blocks, size, 0, 0], np.float64)

    def flows(self) -> Flows:
        """All releases since the beginning."""
        allocated_by, released_by, exact, weights = self._table.flow_columns()
        if self.sample_bytes:
            return Flows(allocated_by, released_by, weights[:, :4], weights[:, 4:])
        columns = np.zeros((len(exact), 8))
        columns[:, [0, 1, 4, 5]] = exact
        return Flows(allocated_by, released_by, columns[:, :4], columns[:, 4:])

    def live(self) -> LiveTable:
        """The blocks not released, by ascending address; of a sampled trace, the recorded ones. `seq` is not kept."""
        address, size, time, chunk, stack = self._table.live()
        order = np.argsort(address, kind="stable")
        return LiveTable(
            address[order],
            size[order],
            stack[order],
            np.zeros(len(order), np.uint64),
            time[order],
            (chunk & ~np.uint64(7))[order],
            ((chunk & np.uint64(_MMAPPED)) != 0)[order],
        )

    def released(self) -> Released:
        """The last block of each address where there is none now, if this process released it; in a very long run,
        those of its later part."""
        address, size, number, chunk, released_by = self._table.released()
        order = np.argsort(address, kind="stable")
        chunk &= ~np.uint64(7)
        length = np.minimum(np.where(chunk > 0, chunk, size + np.uint64(8)), np.uint64(_SIZE_LIMIT))
        return Released(address[order], length[order], number[order], released_by[order])


class PlainTable:
    """What `_lifetimes.Table` does, in plain Python: the specification, and the way it goes where nothing is built."""

    def __init__(self, sample_bytes: int = 0) -> None:
        self.sample_bytes = sample_bytes
        self.hints = 0
        self._since = 0
        self._releases = self._inherited_releases = 0
        #: Address → [size, time, word, stack, site]; and, of those released: [size, number, word, releasing site].
        self._live: dict[int, list[int]] = {}
        self._gone: dict[int, list[int]] = {}
        self._last: dict[int, int] = {}  # by thread: the block it allocated last, if it is not released yet
        self._flows: dict[tuple[int, int], tuple[list[int], list[int]]] = {}  # sizes: of all, of the temporary ones
        self._sizes: list[int] = []  # of all allocations
        self._total = 0

    def copy(self) -> PlainTable:
        twin = PlainTable(self.sample_bytes)
        twin._live = {address: list(block) for address, block in self._live.items()}
        twin._gone = {address: list(block) for address, block in self._gone.items()}
        twin._releases = self._releases
        twin.begin(self._since)
        return twin

    def begin(self, since: int) -> None:
        self._since, self.hints, self._inherited_releases = since, 0, self._releases
        self._flows, self._sizes = {}, []
        self._total = sum(block[0] for block in self._live.values())

    def feed(self, *columns: npt.NDArray[Any]) -> None:
        *fed, live_bytes, live_blocks, variance = columns
        for i, event in enumerate(zip(*(column.tolist() for column in fed), strict=True)):
            self._event(*event)
            if len(live_bytes):
                amounts = self._amounts([block[0] for block in self._live.values()])
                live_blocks[i], live_bytes[i], variance[i] = round(amounts[0]), round(amounts[1]), amounts[3]

    def _event(
        self, kind: int, thread: int, time: int, seq_exit: int, addr: int, size: int, arg: int, word: int, stack: int,
        site: int,
    ) -> None:  # fmt: skip
        if kind == Kind.FREE:
            self.hints += arg != 0
            temporary = arg == 1 if self.sample_bytes else self._last.get(thread) == addr
            self._release(addr, site, thread, temporary)
        elif kind in _ALLOCATIONS and (addr or seq_exit):
            if kind == Kind.REALLOC and arg and (addr or not size):
                self._release(arg, site, thread, not self.sample_bytes and self._last.get(thread) == arg)
            if addr:
                self._end(addr, 0, False)  # where it is live, its release is not in the trace
                self._allocate(addr, size, time, word, stack, site, thread)

    def _allocate(self, addr: int, size: int, time: int, word: int, stack: int, site: int, thread: int) -> None:
        if size > _SIZE_LIMIT or self._total + size > _BYTES_LIMIT:
            size = 0
        self._gone.pop(addr, None)
        self._live[addr] = [size, time, word & ~(1 << 63), stack, site]
        self._last[thread] = addr
        self._sizes.append(size)
        self._total += size

    def _release(self, addr: int, site: int, thread: int, temporary: bool) -> None:
        if addr in self._live:
            if self._last.get(thread) == addr:
                del self._last[thread]
            self._end(addr, site, temporary)

    def _end(self, addr: int, site: int, temporary: bool) -> None:
        if addr not in self._live:
            return
        size, time, word, _, allocated_by = self._live.pop(addr)
        if time >= self._since:
            everything, passing = self._flows.setdefault((allocated_by, site), ([], []))
            everything.append(size)
            if temporary:
                passing.append(size)
        self._releases += 1
        self._gone[addr] = [size, self._releases, word, site]

    def _amounts(self, sizes: Sequence[int]) -> list[float]:
        w = weigh(sizes, self.sample_bytes)
        return [float(c.sum()) for c in (w.blocks, w.amount, w.blocks_variance, w.amount_variance)]

    def allocated(self) -> tuple[tuple[int, int], list[float]]:
        weights = self._amounts(self._sizes) if self.sample_bytes else [0.0] * 4
        return (len(self._sizes), sum(self._sizes)), weights

    def live(self) -> tuple[npt.NDArray[Any], ...]:
        return _block_columns(self._live)

    def released(self) -> tuple[npt.NDArray[Any], ...]:
        return _block_columns({at: block for at, block in self._gone.items() if block[1] > self._inherited_releases})

    def flow_columns(self) -> tuple[npt.NDArray[Any], ...]:
        keys = np.array(list(self._flows), np.uint32).reshape(-1, 2)
        both = list(self._flows.values())
        exact = [[len(e), sum(e), len(t), sum(t)] for e, t in both]
        weights = [self._amounts(e) + self._amounts(t) for e, t in both] if self.sample_bytes else []
        return (
            keys[:, 0].copy(),
            keys[:, 1].copy(),
            np.array(exact, np.uint64).reshape(-1, 4),
            np.array(weights, np.float64).reshape(-1, 8),
        )


def _block_columns(blocks: dict[int, list[int]]) -> tuple[npt.NDArray[Any], ...]:
    """Address, size, time or number, word: 64 bits; stack or site: 32."""
    rows = np.array([[address, *block[:4]] for address, block in blocks.items()], np.uint64).reshape(-1, 5)
    return (*(rows[:, i].copy() for i in range(4)), rows[:, 4].astype(np.uint32))
