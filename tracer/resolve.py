"""Symbols for the call stacks of a run: every distinct return address, once per file, when the program has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from heapledger.store.ddl import JIT
from heapledger.store.writer import TraceWriter

#: Offsets are resolved in portions, so that the progress moves and memory stays small.
_PORTION = 2_000
#: Module id and address are packed into one number for `np.unique`; user addresses have 47 bits.
_ADDRESS_BITS = np.uint64(47)
_ADDRESS_MASK = np.uint64((1 << 47) - 1)

Progress = Callable[[int, int], None]


class Addresses:
    """The distinct (module, return address) pairs seen in call stacks, and what the modules are.

    Cost: one sort of each new portion; memory 8 bytes a distinct pair.
    """

    def __init__(self) -> None:
        self._seen = np.empty(0, np.uint64)
        self._fresh: list[npt.NDArray[np.uint64]] = []
        self._fresh_count = 0
        self._modules: dict[int, dict[str, Any]] = {}
        self.wanted = True  # names will be asked for at the end
        self.origins: dict[str, tuple[str, int]] = {}  # image → the image it was forked from or "", when it began

    def add_module(self, module_id: int, module: dict[str, Any]) -> None:
        self._modules[module_id] = module

    def add(self, module_ids: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> None:
        """Notes addresses; those without a module (id 0) have no symbols. Module ids above 131,071 are left out."""
        known = (module_ids > 0) & (module_ids < 1 << 17)
        packed = module_ids[known].astype(np.uint64) << _ADDRESS_BITS | addresses[known] & _ADDRESS_MASK
        self._fresh.append(packed)
        self._fresh_count += len(packed)
        if self._fresh_count > len(self._seen) + 100_000:
            self._fold()

    def _fold(self) -> None:
        self._seen = np.unique(np.concatenate([self._seen, *self._fresh]))
        self._fresh, self._fresh_count = [], 0

    def of_module(self, module_id: int) -> list[int]:
        """The distinct addresses in one module, ascending."""
        self._fold()
        ends = np.array((module_id, module_id + 1), np.uint64) << _ADDRESS_BITS
        low, high = np.searchsorted(self._seen, ends)
        return [int(address) for address in (self._seen[low:high] & _ADDRESS_MASK).tolist()]

    def by_file(self) -> Iterator[tuple[str, str, list[int], dict[int, list[int]]]]:
        """(path, build-id, distinct offsets, module id → its offsets) for every file. Offset: address - bias."""
        self._fold()
        files: dict[tuple[str, str], dict[int, list[int]]] = {}
        ids = (self._seen >> _ADDRESS_BITS).astype(np.int64)
        for module_id in np.unique(ids).tolist():
            module = self._modules[module_id]
            if module["path"] == JIT:
                continue  # named when the process ended
            low, high = np.searchsorted(ids, (module_id, module_id + 1))
            addresses = (self._seen[low:high] & _ADDRESS_MASK).tolist()
            offsets = [address - module["bias"] for address in addresses if address >= module["bias"]]
            files.setdefault((module["path"], module["build_id"]), {})[module_id] = offsets
        for (path, build_id), modules in files.items():
            yield path, build_id, sorted({o for offsets in modules.values() for o in offsets}), modules


def resolve(addresses: Addresses, writer: TraceWriter, progress: Progress | None = None) -> int:
    """Writes the frames of all addresses (the call's symbol is at offset - 1). Returns how many addresses had one."""
    from heapledger.tracer.symbols import Symbolizer

    files = list(addresses.by_file())
    total = sum(len(offsets) for _, _, offsets, _ in files)
    done = resolved = 0
    symbolizer = Symbolizer()
    try:
        for path, build_id, offsets, modules in files:
            for low in range(0, len(offsets), _PORTION):
                part = offsets[low : low + _PORTION]
                found = dict(zip(part, symbolizer.resolve(path, [o - 1 for o in part], build_id or None), strict=True))
                resolved += sum(1 for frames in found.values() if frames)
                writer.add_frames(frame_rows(found, modules))
                done += len(part)
                if progress:
                    progress(done, total)
    finally:
        symbolizer.close()
    return resolved


def frame_rows(found: Mapping[int, list[Any]], modules: Mapping[int, Iterable[int]]) -> Iterator[dict[str, Any]]:
    """Rows of the table `frame` for the offsets of each module (by id); `found`: offset → frames, innermost first."""
    for module_id, offsets in modules.items():
        for offset in offsets:
            for depth, frame in enumerate(found.get(offset, ())):
                yield {
                    "module_id": module_id,
                    "offset": offset,
                    "depth": depth,
                    "function": frame.function,
                    "file": frame.file,
                    "line": frame.line,
                }
