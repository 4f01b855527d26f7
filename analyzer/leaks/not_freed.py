"""Blocks not freed at the end, by call stack. No reachability: a block still in use counts like a lost one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.ledger import origins_of
from heapledger.analyzer.replay import LiveTable
from heapledger.analyzer.sampling import weigh

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
    bytes_variance: float = 0.0  #: not 0: `bytes` is an estimate from a sample
    blocks_variance: float = 0.0


def not_freed(live: LiveTable, own_since: Sequence[int] = (0,), sample_bytes: int = 0) -> list[NotFreed]:
    """All of `live` summed by call stack, the process's own first, then by bytes. `own_since`: see ledger.balance.

    `sample_bytes`: not 0: of a sampled trace; the sums are what the recorded blocks stand for.
    """
    if not len(live):
        return []
    origin = origins_of(live.time, own_since)
    keys, index = np.unique(origin << 32 | live.stack.astype(np.int64), return_inverse=True)
    total = np.zeros(len(keys), np.uint64)
    np.add.at(total, index, live.requested)
    blocks = np.bincount(index, minlength=len(keys))
    estimates = _estimates(live, index, len(keys), sample_bytes)
    oldest = np.full(len(keys), np.iinfo(np.uint64).max, np.uint64)
    newest = np.zeros(len(keys), np.uint64)
    np.minimum.at(oldest, index, live.time)
    np.maximum.at(newest, index, live.time)
    found = [
        NotFreed(
            int(keys[i] >> 32),
            int(keys[i] & 0xFFFFFFFF),
            int(total[i]) if estimates is None else round(estimates[0][i]),
            int(blocks[i]) if estimates is None else round(estimates[1][i]),
            int(oldest[i]),
            int(newest[i]),
            *(() if estimates is None else (float(estimates[2][i]), float(estimates[3][i]))),
        )
        for i in range(len(keys))
    ]
    return sorted(found, key=lambda f: (f.origin, -f.bytes, f.stack))


def _estimates(
    live: LiveTable, index: npt.NDArray[np.intp], count: int, sample_bytes: int
) -> list[npt.NDArray[np.float64]] | None:
    """Bytes, blocks and their variances by group; None where everything was recorded."""
    if not sample_bytes:
        return None
    w = weigh(live.requested, sample_bytes)
    columns = (w.amount, w.blocks, w.amount_variance, w.blocks_variance)
    return [np.bincount(index, weights=column, minlength=count).astype(np.float64) for column in columns]
