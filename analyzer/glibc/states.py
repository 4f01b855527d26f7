"""What a chunk of the heap can be. The numbers are shared with `constants.py`; a test compares the two."""

from __future__ import annotations

from enum import IntEnum


class ChunkState(IntEnum):
    """Who has a chunk at the moment."""

    LIVE = 1  #: the program's
    TCACHE = 2  #: freed, cached by a thread
    FASTBIN = 3  #: freed, in a fastbin
    FREE = 4  #: freed and coalesced, in the unsorted, a small or a large bin
    TOP = 5  #: the wilderness at the end of the heap
    FENCE = 6  #: a fencepost, or a granule too small to be a chunk
    TCACHE_STRUCT = 7  #: a thread's own tcache heads
    FOREIGN = 8  #: not malloc's: somebody else moved the break
