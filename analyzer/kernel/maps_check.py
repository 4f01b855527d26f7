"""The model's idea of malloc's mappings against the kernel's own list of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from heapledger.analyzer.kernel.residency import Residency
from heapledger.analyzer.kernel.vma import Vma
from heapledger.analyzer.replay import ChunkTable


@dataclass(slots=True)
class MapsCheck:
    """How many mappings were compared, and how many were as predicted. `differences`: the first few, in words."""

    compared: int = 0
    exact: int = 0
    differences: list[str] = field(default_factory=list)

    def add(self, is_exact: bool, difference: str) -> None:
        self.compared += 1
        self.exact += is_exact
        if not is_exact and len(self.differences) < 20:
            self.differences.append(difference)


def compare(
    vmas: Sequence[Vma],
    mapped: ChunkTable,
    *,
    heap_start: int,
    heap_end: int,
    start_break: int = 0,
    page_size: int = 4096,
) -> MapsCheck:
    """The heap's first and last address, and every mapped chunk, against the mappings of one snapshot."""
    check = MapsCheck()
    _compare_heap(check, vmas, heap_start, heap_end, start_break, page_size)
    _compare_mapped(check, vmas, mapped)
    return check


def _compare_heap(
    check: MapsCheck, vmas: Sequence[Vma], heap_start: int, heap_end: int, start_break: int, page_size: int
) -> None:
    """[heap] reaches from the first break to the current one, both rounded to pages."""
    parts = [vma for vma in vmas if vma.path == "[heap]"]
    low = (start_break or heap_start) & -page_size
    high = (heap_end + page_size - 1) & -page_size
    if heap_start == 0 or high <= low:
        if parts and start_break:
            check.add(False, f"[heap] is {parts[0].start:#x}-{parts[-1].end:#x}, no heap was predicted")
        return
    if not parts:
        check.add(False, f"no [heap], predicted {low:#x}-{high:#x}")
        return
    start, end = min(v.start for v in parts), max(v.end for v in parts)
    # Without address randomisation the heap follows the program's bss, and the kernel may have made them one mapping.
    starts_right = start == low or start < low <= end
    check.add(starts_right and end == high, f"[heap] is {start:#x}-{end:#x}, predicted {low:#x}-{high:#x}")


def _compare_mapped(check: MapsCheck, vmas: Sequence[Vma], mapped: ChunkTable) -> None:
    """Each mapped chunk lies wholly in private anonymous writable memory (neighbours may be merged with it)."""
    fitting = [v for v in vmas if v.is_anonymous and v.is_writable and not v.path.startswith("[stack")]
    cover = Residency(
        np.array([v.start for v in fitting], np.int64), np.array([v.end - v.start for v in fitting], np.int64)
    )
    starts, sizes = mapped.start.astype(np.int64), mapped.size.astype(np.int64)
    covered = cover.between(starts, starts + sizes)
    for start, size, present in zip(starts.tolist(), sizes.tolist(), covered.tolist(), strict=True):
        check.add(present == size, f"block {start:#x}-{start + size:#x}: only {present} of {size} bytes are mapped")
