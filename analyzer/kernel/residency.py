"""Resident bytes as a function of the address.

    R(x) = resident bytes at addresses below x

grows linearly through resident runs and is flat elsewhere, so an owner of [start, end) has exactly R(end) - R(start)
resident bytes, and owners that tile a mapping sum to its residency, whatever their borders. A page that two owners
share is split between them byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.kernel.vma import Vma
from heapledger.store.residency import Category

Addresses = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

#: The bits of a run's category that say what the page is; the others are flags (huge).
_CATEGORY_MASK = 0x0F
RESIDENT = (int(Category.ANON), int(Category.FILE))


class Residency:
    """R(x) over disjoint runs by ascending address. Memory O(runs); each query O(log runs)."""

    def __init__(self, starts: Int64s, lengths: Int64s, resident: Int64s | None = None) -> None:
        """`resident` bytes lie in each run; left out, all of it (anything else spreads them evenly: an estimate)."""
        order = np.argsort(starts, kind="stable")
        self._starts = starts[order]
        self._lengths = lengths[order]
        full = resident is None
        amounts = self._lengths if resident is None else resident[order]
        self._total_before = np.concatenate(([0], np.cumsum(amounts)))
        self._slopes = None if full else amounts / np.maximum(self._lengths, 1)

    @property
    def total_bytes(self) -> int:
        return int(self._total_before[-1])

    def below(self, addresses: npt.ArrayLike) -> Int64s:
        """R(x) for each address (any shape)."""
        # Addresses are below 2**47, or in the vsyscall page, which is never resident: clipping loses nothing.
        x = np.minimum(np.asarray(addresses, dtype=np.uint64), np.uint64(2**63 - 1)).astype(np.int64)
        if len(self._starts) == 0:
            return np.zeros(x.shape, np.int64)
        run = np.searchsorted(self._starts, x, side="right") - 1
        inside = np.clip(x - self._starts[run], 0, self._lengths[run])
        if self._slopes is not None:
            inside = np.floor(inside * self._slopes[run]).astype(np.int64)
        return np.where(run >= 0, self._total_before[run] + inside, 0)

    def between(self, starts: npt.ArrayLike, ends: npt.ArrayLike) -> Int64s:
        """Resident bytes of each [start, end)."""
        return self.below(ends) - self.below(starts)


def from_vmas(
    vmas: Iterable[Vma], *, page_size: int = 4096, categories: tuple[int, ...] = RESIDENT
) -> tuple[Residency, bool]:
    """The residency of pages of `categories`, and whether any of it had to be estimated from counts alone."""
    starts: list[Int64s] = []
    lengths: list[Int64s] = []
    resident: list[Int64s] = []
    estimated = False
    for vma in vmas:
        if len(vma.run_pages):
            sizes = vma.run_pages.astype(np.int64) * page_size
            begins = vma.start + np.concatenate(([0], np.cumsum(sizes)[:-1]))
            sizes = np.clip(vma.end - begins, 0, sizes)  # a damaged file may claim more pages than the mapping has
            wanted = np.isin(vma.run_category & _CATEGORY_MASK, categories)
            starts.append(begins[wanted])
            lengths.append(sizes[wanted])
            resident.append(sizes[wanted])
        elif vma.rss_bytes:
            estimated = True
            starts.append(np.array([vma.start], np.int64))
            lengths.append(np.array([vma.end - vma.start], np.int64))
            resident.append(np.array([_counted(vma, categories)], np.int64))
    if not starts:
        nothing = np.zeros(0, np.int64)
        return Residency(nothing, nothing), False
    amounts = np.concatenate(resident) if estimated else None
    return Residency(np.concatenate(starts), np.concatenate(lengths), amounts), estimated


def _counted(vma: Vma, categories: tuple[int, ...]) -> int:
    """Resident bytes of a mapping whose pages were not looked at, of the wanted categories."""
    # smaps' Anonymous counts swapped-in anonymous pages of the mapping; never more than Rss.
    anonymous = min(vma.anonymous_bytes, vma.rss_bytes)
    return (anonymous if Category.ANON in categories else 0) + (
        vma.rss_bytes - anonymous if Category.FILE in categories else 0
    )
