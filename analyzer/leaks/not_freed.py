"""Blocks not freed at the end, by call stack. No reachability: a block still in use counts like a lost one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heapledger.analyzer.replay import LiveTable

KIND = "not freed at exit"


@dataclass(frozen=True, slots=True)
class NotFreed:
    """Blocks of one call stack. `origin` 0: the process's own, 1: inherited from its parent, 2: from its parent ..."""

    origin: int
    stack: int
    bytes: int
    blocks: int
    oldest_ns: int
    newest_ns: int


def not_freed(live: LiveTable, own_since: Sequence[int] = (0,)) -> list[NotFreed]:
    """All of `live` summed by call stack, the process's own first, then by bytes. `own_since`: see ledger.balance."""
    if not len(live):
        return []
    origin = np.zeros(len(live), np.int64)
    for since in own_since[:-1]:
        origin += live.time < np.uint64(max(since, 0))
    keys, index = np.unique(origin << 32 | live.stack.astype(np.int64), return_inverse=True)
    total = np.zeros(len(keys), np.uint64)
    np.add.at(total, index, live.requested)
    blocks = np.bincount(index, minlength=len(keys))
    oldest = np.full(len(keys), np.iinfo(np.uint64).max, np.uint64)
    newest = np.zeros(len(keys), np.uint64)
    np.minimum.at(oldest, index, live.time)
    np.maximum.at(newest, index, live.time)
    found = [
        NotFreed(
            int(keys[i] >> 32),
            int(keys[i] & 0xFFFFFFFF),
            int(total[i]),
            int(blocks[i]),
            int(oldest[i]),
            int(newest[i]),
        )
        for i in range(len(keys))
    ]
    return sorted(found, key=lambda f: (f.origin, -f.bytes, f.stack))
