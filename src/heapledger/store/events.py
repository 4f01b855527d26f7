"""What an event is: the kinds, and the columns every part of heapledger passes events around in.

The numbers of `Kind` are the ones in preload/spool.h and in trace files; a test compares the two. Column meanings
per kind (a column that is not named is 0):

| kind        | addr                | size            | arg            | arg2                        | word
|-------------|---------------------|-----------------|----------------|-----------------------------|-----------------------
| MALLOC      | result              | request         |                |                             | word at result-8
| CALLOC      | result              | nmemb × size    | nmemb          |                             | word at result-8
| REALLOC     | result              | request         | old pointer    | word at old-8, before       | word at result-8
| FREE        | pointer             |                 |                |                             | word at pointer-8
| MEMALIGN    | result              | request         | alignment      | 0 memal. 1 aligned 2 posix | word at result-8
| VALLOC      | result              | request         |                |                             | word at result-8
| PVALLOC     | result              | request         |                |                             | word at result-8
| MALLOC_TRIM | result (0 or 1)     | pad             |                |                             |
| MALLOPT     | result (0 or 1)     | value (signed)  | param (signed) |                             |
| MMAP        | result              | length          | hint           | prot + (flags << 16)        | offset
| MUNMAP      | address             | length          | return         |                             |
| MREMAP      | result              | new length      | old address    | flags                       | old length
| MPROTECT    | address             | length          | return         | prot                        |
| MADVISE     | address             | length          | return         | advice                      |
| BRK         | break after         |                 | requested      |                             |
| SBRK        | result              | incr. (signed)  |                |                             |
| THREAD_START| thread pointer (fs) | stack size      | stack low end  | tid                         |
| THREAD_END  |                     |                 |                | tid                         |
| FORK        |                     |                 | child pid      |                             |
| EXEC        |                     |                 |                |                             |
| DLOPEN      | handle              |                 |                |                             |
| DLCLOSE     | handle              |                 | return         |                             |
| EXIT        |                     |                 | status         | 0 exit 1 _exit 2 quick_exit |

A failed MMAP/MREMAP has addr 2**64-1 (MAP_FAILED); a failed allocation has addr 0. Signed values are two's complement
in 64 bits. `word` is the chunk's size with its three flag bits (1 previous chunk in use, 2 mmapped, 4 not the main
arena); it is 0 where the pointer was null.
`seq` is taken from one counter of the process before the real call, `seq_exit` after it; `seq_exit` 0 means that the
call was never seen to return. Two calls may only be swapped where their [seq, seq_exit] intervals overlap.
`time` is in ns of CLOCK_MONOTONIC since the session began; it may be that of one of the seven events of its thread
before, but is never more than about a millisecond old. `stack` is the id of the call stack (0: none taken): of the
caller of every malloc, free and their kin, and of mmap, mremap, brk and sbrk; frees have none in a trace made with
`--no-free-stacks`, nor has what imports record without.
`thread` is the thread's number within the process (0 is the main thread).

In a sampled process (`sample_bytes` B above 0) an allocation of s requested bytes is here with probability
p = 1 - exp(-s/B), independently of all others, and stands for 1/p of its kind; one of no bytes never is. A FREE is
here if its block is; `arg` is 1 if the thread requested nothing since it was given the block (it was temporary), 2 if
it did, 0 where realloc ended it. REALLOC asks for each of its blocks: with only the new one in the sample `arg` and
`arg2` are 0, whatever the old one was; with only the old one it is a FREE, unless it failed. All other kinds are here
always.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Kind(IntEnum):
    """What was called. Values are part of the file format and never change."""

    MALLOC = 1
    CALLOC = 2
    REALLOC = 3
    FREE = 4
    MEMALIGN = 5
    VALLOC = 6
    PVALLOC = 7
    MALLOC_TRIM = 8
    MALLOPT = 9
    MMAP = 16
    MUNMAP = 17
    MREMAP = 18
    MPROTECT = 19
    MADVISE = 20
    BRK = 21
    SBRK = 22
    THREAD_START = 32
    THREAD_END = 33
    FORK = 34
    EXEC = 35
    DLOPEN = 36
    DLCLOSE = 37
    EXIT = 38


#: Kinds whose result or argument is a block of malloc's heap.
ALLOCATOR_KINDS = frozenset(
    {Kind.MALLOC, Kind.CALLOC, Kind.REALLOC, Kind.FREE, Kind.MEMALIGN, Kind.VALLOC, Kind.PVALLOC}
)

#: Column name → dtype, in the order they are stored.
COLUMNS: dict[str, np.dtype[np.generic]] = {
    "kind": np.dtype("u1"),
    "thread": np.dtype("u4"),
    "time": np.dtype("u8"),
    "seq": np.dtype("u8"),
    "seq_exit": np.dtype("u8"),
    "addr": np.dtype("u8"),
    "size": np.dtype("u8"),
    "arg": np.dtype("u8"),
    "arg2": np.dtype("u8"),
    "word": np.dtype("u8"),
    "stack": np.dtype("u4"),
}


@dataclass(slots=True)
class Events:
    """A run of events of one process in `seq` order, one numpy array a column, all of equal length."""

    kind: npt.NDArray[np.uint8]
    thread: npt.NDArray[np.uint32]
    time: npt.NDArray[np.uint64]
    seq: npt.NDArray[np.uint64]
    seq_exit: npt.NDArray[np.uint64]
    addr: npt.NDArray[np.uint64]
    size: npt.NDArray[np.uint64]
    arg: npt.NDArray[np.uint64]
    arg2: npt.NDArray[np.uint64]
    word: npt.NDArray[np.uint64]
    stack: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.kind)

    @classmethod
    def empty(cls, count: int = 0) -> Events:
        """`count` events, all columns zero."""
        return cls(**{name: np.zeros(count, dtype) for name, dtype in COLUMNS.items()})

    @classmethod
    def concat(cls, parts: list[Events]) -> Events:
        """The events of `parts`, one after another."""
        if not parts:
            return cls.empty()
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in COLUMNS})

    def take(self, index: npt.NDArray[np.intp] | npt.NDArray[np.bool_] | slice) -> Events:
        """The events that a numpy index, mask or slice selects."""
        return Events(**{name: getattr(self, name)[index] for name in COLUMNS})
