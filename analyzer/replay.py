"""Drives the malloc model with recorded events and compares each prediction with what was observed.

The model predicts an address for every allocation. Where the observation differs, the observed chunk is adopted (carved
out of whatever the model had there), the predicted one is given back, and the event counts as forced: the figures of a
trace never rest on a prediction that was seen to be wrong. `Agreement` says how often that happened, and why.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.glibc import Profile, Settings, engine
from heapledger.analyzer.glibc.states import ChunkState
from heapledger.store.events import Events

__all__ = ["Agreement", "ChunkState", "ChunkTable", "Forced", "ForcedClass", "LiveTable", "Replay", "Series", "Syscall"]

Int64s = npt.NDArray[np.int64]


class ForcedClass(IntEnum):
    """Why a prediction had to give way to the observation."""

    ADDRESS = 1  #: another address inside the heap the model knows
    SIZE = 2  #: the right address, but a chunk of another size (word at p-8)
    OTHER_ARENA = 3  #: the chunk belongs to an arena that is not modelled
    FOREIGN_BREAK = 4  #: the break had been moved by somebody the trace does not show
    OUTSIDE = 5  #: an address outside the heap and not at the offset of a mapped chunk
    OVERLAP = 6  #: on top of a block believed live: its release was never seen
    FAILED = 7  #: the call failed where the model had memory to give
    RESULT = 8  #: malloc_trim or mallopt returned something else
    UNBACKED = 9  #: the model reached a limit of its own and made no prediction
    UNKNOWN_OLD = 10  #: realloc of a block whose allocation was never seen


class Syscall(IntEnum):
    """The system calls that malloc makes."""

    BRK_QUERY = 0  #: libc asks for the break the first time it moves it
    BRK = 1
    MMAP = 2
    MUNMAP = 3
    MREMAP = 4
    MADVISE = 5


@dataclass(slots=True, frozen=True)
class Forced:
    """One event whose prediction was wrong. Addresses are user pointers."""

    seq: int
    kind: int
    expected: int
    observed: int
    reason: ForcedClass


@dataclass(slots=True)
class Agreement:
    """How prediction and observation compare. predicted = exact + reordered + forced, always."""

    predicted: int = 0  #: allocator results that were compared
    exact: int = 0
    reordered: int = 0  #: exact once overlapping calls were put in another order
    forced: int = 0
    reasons: dict[ForcedClass, int] = field(default_factory=dict)  #: those that occurred; they sum to `forced`
    adopted_bases: int = 0  #: mapping and first-break bases taken over, only their offset checked; they count as exact
    word_mismatches: int = 0  #: the word at p-8 was not the predicted one
    unknown_frees: int = 0  #: releases of blocks never seen allocated
    syscalls_predicted: int = 0  #: brk, mmap, munmap, mremap, madvise calls that malloc makes by the model
    forced_examples: list[Forced] = field(default_factory=list)  #: the first 100


@dataclass(slots=True)
class Series:
    """The state after each event, one int64 array a figure, all in bytes except `live_blocks`."""

    live_bytes: Int64s  #: requested by the program and not freed
    live_blocks: Int64s
    heap_bytes: Int64s  #: between start of the heap and its end, without gaps that belong to others
    mmapped_bytes: Int64s  #: lengths of mapped chunks' mappings
    hole_bytes: Int64s  #: free chunks in the unsorted, small and large bins
    cached_bytes: Int64s  #: chunks in fastbins and tcaches
    top_bytes: Int64s


@dataclass(slots=True)
class ChunkTable:
    """Chunks by ascending address. `start` is the chunk's own address (user pointer - 16), `size` in bytes."""

    start: npt.NDArray[np.uint64]
    size: npt.NDArray[np.uint64]
    state: npt.NDArray[np.uint8]  #: ChunkState
    requested: npt.NDArray[np.uint64]  #: bytes, live chunks only
    stack: npt.NDArray[np.uint32]  #: stack id of the allocation, live chunks only
    seq: npt.NDArray[np.uint64]  #: seq of the allocation, live chunks only
    time: npt.NDArray[np.uint64]  #: ns, of the allocation, live chunks only
    arena: npt.NDArray[np.uint32]  #: 0 main, 1 an arena that is not modelled

    def __len__(self) -> int:
        return len(self.start)


@dataclass(slots=True)
class LiveTable:
    """Blocks the program has not freed, by ascending user address."""

    address: npt.NDArray[np.uint64]
    requested: npt.NDArray[np.uint64]
    stack: npt.NDArray[np.uint32]
    seq: npt.NDArray[np.uint64]
    time: npt.NDArray[np.uint64]
    chunk_size: npt.NDArray[np.uint64]  #: bytes; a mapped block's is its mapping's length
    mmapped: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.address)

    def take(self, index: npt.NDArray[np.bool_]) -> LiveTable:
        """The blocks that a mask selects."""
        return LiveTable(*(getattr(self, name)[index] for name in self.__slots__))


#: The most of a heap that is modelled; what lies beyond is adopted as observed. Memory taken is about 1.3 times
#: the heap.
HEAP_LIMIT_BYTES = 16 << 30


class Replay:
    """One process's malloc, fed with its events in order.

    `start_break` is the page-aligned program break at the start; 0 where it is not known: the first chunk seen in
    the heap then tells. `compiled` chooses the engine (None: the compiled one if it is built).
    """

    def __init__(
        self,
        profile: Profile,
        settings: Settings,
        start_break: int,
        *,
        page_size: int = 4096,
        compiled: bool | None = None,
        heap_limit: int = HEAP_LIMIT_BYTES,
    ) -> None:
        self.profile = profile
        self.settings = settings
        self._engine: Any = engine(compiled)
        # What cannot be a break is as good as none.
        plausible = 0 < start_break < 1 << 47
        self._state = self._engine.create(profile, settings, start_break if plausible else 0, page_size, heap_limit)

    def feed(self, events: Events) -> Series:
        """Consumes `events`, which continue those of earlier calls; returns the figures after each of them."""
        count = len(events)
        out = np.zeros(7 * count, np.int64)
        columns = [getattr(events, name) for name in _FED]
        if self._engine.COMPILED:
            self._engine.run(self._state, *(_native(column) for column in columns), out)
        else:
            figures = array("q", bytes(out.nbytes))
            self._engine.run(self._state, *(_native(column).tolist() for column in columns), figures)
            out = np.frombuffer(figures, np.int64) if count else out
        return Series(*(out[i * count : (i + 1) * count] for i in range(7)))

    @property
    def agreement(self) -> Agreement:
        """How well the model did since the start, or since `reset_agreement`."""
        counters = self._engine.counters(self._state)
        return Agreement(
            predicted=counters["predicted"],
            exact=counters["exact"],
            forced=counters["forced"],
            reasons={ForcedClass(why): count for why, count in enumerate(self._engine.reasons(self._state)) if count},
            adopted_bases=counters["adopted_bases"],
            word_mismatches=counters["word_mismatches"],
            unknown_frees=counters["unknown_frees"],
            syscalls_predicted=counters["syscalls_predicted"],
            forced_examples=[
                Forced(seq & _WORD, kind, expected & _WORD, observed & _WORD, ForcedClass(why))
                for seq, kind, expected, observed, why in self._engine.examples(self._state)
            ],
        )

    def reset_agreement(self) -> None:
        """Starts counting anew, as a fork's child does."""
        self._engine.forget_agreement(self._state)

    @property
    def break_address(self) -> int:
        """The program break as predicted; 0 while it is not known."""
        return int(self._engine.counters(self._state)["break_address"])

    @property
    def heap_start(self) -> int:
        """Where the heap begins (or will); 0 while it is not known."""
        return int(self._engine.counters(self._state)["heap_start"])

    @property
    def mmap_threshold(self) -> int:
        """Bytes from which a request gets a mapping of its own, as it stands now."""
        return int(self._engine.counters(self._state)["mmap_threshold"])

    def copy(self) -> Replay:
        """An independent replay in the same state."""
        twin = object.__new__(Replay)
        twin.profile = self.profile
        twin.settings = self.settings
        twin._engine = self._engine
        twin._state = self._engine.copy(self._state)
        return twin

    def keep_syscalls(self) -> None:
        """From now on remembers each system call malloc makes, for `syscalls`. Memory grows with their number."""
        self._engine.keep_log(self._state)

    def syscalls(self) -> list[tuple[Syscall, int]]:
        """(call, length in bytes) since `keep_syscalls`; a brk's length is the signed distance, mremap's the new
        length."""
        return [(Syscall(call), length) for call, length in self._engine.taken_log(self._state)]

    def chunks(self) -> ChunkTable:
        """Every chunk of the main heap; they tile [heap_start, end of top) exactly."""
        count = self._engine.chunk_count(self._state)
        columns = [np.zeros(count, np.int64) for _ in range(7)]
        self._engine.write_chunks(self._state, *columns)
        start, size, state, requested, stack, seq, time = columns
        return ChunkTable(
            start.astype(np.uint64),
            size.astype(np.uint64),
            state.astype(np.uint8),
            requested.astype(np.uint64),
            stack.astype(np.uint32),
            seq.astype(np.uint64),
            time.astype(np.uint64),
            np.zeros(count, np.uint32),
        )

    def _blocks(self) -> npt.NDArray[np.int64]:
        """Rows of blocks outside the heap: user address, base, length, requested, stack, seq, time, kind."""
        return np.array(self._engine.blocks(self._state), np.int64).reshape(-1, 8)

    def mmapped(self) -> ChunkTable:
        """Live mapped chunks: `start` is the mapping's base, `size` its length."""
        rows = self._blocks()
        rows = rows[rows[:, 7] == _MAPPED]
        return _table_of_blocks(rows, arena=0)

    def adopted(self) -> ChunkTable:
        """Live blocks of arenas that are not modelled: as far as the events told."""
        rows = self._blocks()
        rows = rows[rows[:, 7] != _MAPPED]
        return _table_of_blocks(rows, arena=1)

    def live(self) -> LiveTable:
        """Every block not freed: in the heap, mapped, or adopted."""
        chunks = self.chunks()
        heap = chunks.state == ChunkState.LIVE
        rows = self._blocks()
        address = np.concatenate([chunks.start[heap] + np.uint64(16), rows[:, 0].astype(np.uint64)])
        order = np.argsort(address, kind="stable")
        return LiveTable(
            address[order],
            np.concatenate([chunks.requested[heap], rows[:, 3].astype(np.uint64)])[order],
            np.concatenate([chunks.stack[heap], rows[:, 4].astype(np.uint32)])[order],
            np.concatenate([chunks.seq[heap], rows[:, 5].astype(np.uint64)])[order],
            np.concatenate([chunks.time[heap], rows[:, 6].astype(np.uint64)])[order],
            np.concatenate([chunks.size[heap], rows[:, 2].astype(np.uint64)])[order],
            np.concatenate([np.zeros(int(heap.sum()), np.bool_), rows[:, 7] == _MAPPED])[order],
        )

    def check(self) -> None:
        """Raises AssertionError unless the model's invariants hold. For tests."""
        self._engine.check(self._state)


_WORD = (1 << 64) - 1
_MAPPED = 1
_FED = ("kind", "thread", "time", "seq", "seq_exit", "addr", "size", "arg", "arg2", "word", "stack")


def _native(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The column as the engine takes it: contiguous, writable (a memoryview's demand), 64-bit numbers signed."""
    wanted = np.require(column, requirements=["C", "W"])
    return wanted.view(np.int64) if wanted.dtype == np.uint64 else wanted


def _table_of_blocks(rows: npt.NDArray[np.int64], arena: int) -> ChunkTable:
    count = len(rows)
    return ChunkTable(
        rows[:, 1].astype(np.uint64),
        rows[:, 2].astype(np.uint64),
        np.full(count, ChunkState.LIVE, np.uint8),
        rows[:, 3].astype(np.uint64),
        rows[:, 4].astype(np.uint32),
        rows[:, 5].astype(np.uint64),
        rows[:, 6].astype(np.uint64),
        np.full(count, arena, np.uint32),
    )
