"""Symbols for the call stacks of a run: every distinct return address, once per file, when the program has ended."""

from __future__ import annotations

import gc
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from heapledger.store.ddl import JIT
from heapledger.store.writer import FrameRow, TraceWriter
from heapledger.tracer._nodes import AddressSet

if TYPE_CHECKING:
    from heapledger.tracer.symbols import Frame

#: Offsets are resolved in portions, so that the progress moves and memory stays small. Each goes through a whole symbol
#: table, so they are not too small either.
_PORTION = 20_000
#: Module id and address are packed into one number, to sort them; user addresses have 47 bits.
_ADDRESS_BITS = 47
_ADDRESS_MASK = (1 << 47) - 1

Progress = Callable[[int, int], None]


class Addresses:
    """The distinct (module, return address) pairs seen in call stacks, and what the modules are.

    Cost: 10 ns an address; memory 16 to 32 bytes a distinct pair.
    """

    def __init__(self) -> None:
        self._seen = AddressSet()
        self._modules: dict[int, dict[str, Any]] = {}
        self.wanted = True  # names will be asked for at the end
        self.origins: dict[str, tuple[str, int]] = {}  # image → the image it was forked from or "", when it began

    def add_module(self, module_id: int, module: dict[str, Any]) -> None:
        self._modules[module_id] = module

    def add(self, module_ids: array[int], addresses: array[int]) -> None:
        """Notes addresses, 64-bit integers as their modules' ids; those without a module (id 0) have no symbols. Module
        ids above 131,071 are left out."""
        self._seen.add(module_ids, addresses)

    def of_module(self, module_id: int) -> list[int]:
        """The distinct addresses in one module, ascending."""
        return _of_module(self._seen.ascending(), module_id)

    def by_file(self) -> Iterator[tuple[str, str, list[int], dict[int, list[int]]]]:
        """(path, build-id, distinct offsets, module id → its offsets) for every file. Offset: address - bias."""
        seen = self._seen.ascending()
        files: dict[tuple[str, str], dict[int, list[int]]] = {}
        for module_id, module in sorted(self._modules.items()):
            if module["path"] == JIT:
                continue  # named when the process ended
            if addresses := _of_module(seen, module_id):
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
    collects = gc.isenabled()
    gc.disable()  # nothing here is in a circle, and what is kept would be searched again and again: a third of the time
    try:
        for path, build_id, offsets, modules in files:
            for low in range(0, len(offsets), _PORTION):
                part = offsets[low : low + _PORTION]
                found = dict(zip(part, symbolizer.resolve(path, [o - 1 for o in part], build_id or None), strict=True))
                resolved += sum(1 for frames in found.values() if frames)
                writer.add_frame_rows(frame_rows(found, _between(modules, part[0], part[-1])))
                done += len(part)
                if progress:
                    progress(done, total)
    finally:
        if collects:
            gc.enable()
        symbolizer.close()
    return resolved


def _of_module(seen: array[int], module_id: int) -> list[int]:
    """Those of the packed pairs, without the module."""
    low = bisect_left(seen, module_id << _ADDRESS_BITS)
    high = bisect_left(seen, (module_id + 1) << _ADDRESS_BITS, low)
    return [pair & _ADDRESS_MASK for pair in seen[low:high]]


def _between(modules: Mapping[int, list[int]], low: int, high: int) -> dict[int, list[int]]:
    """Module id → those of its (ascending) offsets that lie in [low, high]."""
    return {i: offsets[bisect_left(offsets, low) : bisect_right(offsets, high)] for i, offsets in modules.items()}


def frame_rows(found: Mapping[int, list[Frame]], modules: Mapping[int, Iterable[int]]) -> Iterator[FrameRow]:
    """Rows of the table `frame` for the offsets of each module (by id); `found`: offset → frames, innermost first."""
    for module_id, offsets in modules.items():
        for offset in offsets:
            for depth, frame in enumerate(found.get(offset, ())):
                yield module_id, offset, depth, frame.function, frame.file, frame.line
