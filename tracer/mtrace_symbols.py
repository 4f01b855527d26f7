"""Functions and lines for the callers of an mtrace log, from the objects it names, where these are still there.

A log says which file a caller was in, but not which build of it. So a symbol is taken only if it is not at odds with
what the log says itself: where the log names a function, the file has to have the same one there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from heapledger.store.writer import TraceWriter
from heapledger.tracer.resolve import frame_rows

#: Callers of one object: address as the log has it → function as the log has it ("" if it has none).
Callers = Mapping[int, str]


def resolve(writer: TraceWriter, modules: Mapping[str, int], callers: Mapping[str, Callers]) -> int:
    """Writes frames for callers by object path; `modules` gives the objects' ids. Returns how many callers had some."""
    from heapledger.tracer.symbols import Symbolizer

    resolved = 0
    symbolizer = Symbolizer()
    try:
        for path, wanted in callers.items():
            if not Path(path).is_file():
                continue
            addresses = sorted(wanted)
            base = _base(path)
            # As the object's own addresses; the call is the instruction before the return address.
            own = [address + base - 1 if address < base else address - 1 for address in addresses]
            found = dict(zip(addresses, symbolizer.resolve(path, own), strict=True))
            agreed = {a: frames for a, frames in found.items() if frames and wanted[a] in ("", frames[-1].function)}
            writer.add_frame_rows(frame_rows(agreed, {modules[path]: agreed}))
            resolved += len(agreed)
    finally:
        symbolizer.close()
    return resolved


def _base(path: str) -> int:
    """The object's own address of its first byte: 0 for position-independent ones. Logs count from the first byte."""
    from heapledger.tracer.symbols import load_bias

    return max(-load_bias(path, 0, 0), 0)
