"""Drives the malloc model with recorded events and compares each prediction with what was observed.

The model predicts an address for every allocation. Where the observation differs, the observed chunk is adopted (carved
out of whatever the model had there), the predicted one is given back, and the event counts as forced: the figures of a
trace never rest on a prediction that was seen to be wrong. `Agreement` says how often that happened, and why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.glibc import Profile, Settings
from heapledger.analyzer.glibc.states import ChunkState
from heapledger.store.events import Events

__all__ = ["Agreement", "ChunkState", "ChunkTable", "Forced", "ForcedClass", "LiveTable", "Replay", "Series"]

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


class Replay:
    """One process's malloc, fed with its events in order."""

    def __init__(
        self,
        profile: Profile,
        settings: Settings,
        start_break: int,
        *,
        page_size: int = 4096,
        compiled: bool | None = None,
    ) -> None:
        raise NotImplementedError

    agreement: Agreement
    break_address: int
    heap_start: int

    def feed(self, events: Events) -> Series:
        """Consumes `events`, which continue those of earlier calls; returns the figures after each of them."""
        raise NotImplementedError

    def reset_agreement(self) -> None:
        """Starts counting anew, as a fork's child does."""
        raise NotImplementedError

    def copy(self) -> Replay:
        """An independent replay in the same state."""
        raise NotImplementedError

    def chunks(self) -> ChunkTable:
        """Every chunk of the main heap; they tile [heap_start, end of top) exactly."""
        raise NotImplementedError

    def mmapped(self) -> ChunkTable:
        """Live mapped chunks: `start` is the mapping's base, `size` its length."""
        raise NotImplementedError

    def live(self) -> LiveTable:
        """Every block not freed: in the heap, mapped, or adopted."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises AssertionError unless the model's invariants hold. For tests."""
        raise NotImplementedError
