"""Symbols: which function, file and line an address belongs to, inlined calls included.

    with Symbolizer() as symbols:
        for frames in symbols.resolve("/lib/x86_64-linux-gnu/libc.so.6", [0x9f2a0, 0x271c9], build_id="93ac61ec..."):
            ...     # innermost (inlined) frame first; [] where nothing is known

Data flows down this list: `symbolizer` (caches) → `module` (which files) → `locate`, `elf` (containers) → `dwarf`
(which units) → `units`, `functions`, `ranges`, `lines`, `symtab`, `cursor` (the inner loops, interpreted or compiled).
"""

from __future__ import annotations

from heapledger.tracer.symbols.elf import build_id, load_bias
from heapledger.tracer.symbols.frame import Frame
from heapledger.tracer.symbols.symbolizer import Symbolizer

__all__ = ["Frame", "Symbolizer", "build_id", "load_bias"]
