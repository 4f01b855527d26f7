"""The engine as it is written: what `_compiled` offers, from the mechanism files themselves."""

from __future__ import annotations

from heapledger.analyzer.glibc.check import check
from heapledger.analyzer.glibc.chunk import State
from heapledger.analyzer.glibc.drive import run
from heapledger.analyzer.glibc.export import (
    blocks,
    chunk_count,
    copy,
    counters,
    create,
    examples,
    forget_agreement,
    keep_log,
    reasons,
    taken_log,
    write_chunks,
)

COMPILED = False

__all__ = [
    "COMPILED",
    "State",
    "blocks",
    "check",
    "chunk_count",
    "copy",
    "counters",
    "create",
    "examples",
    "forget_agreement",
    "keep_log",
    "reasons",
    "run",
    "taken_log",
    "write_chunks",
]
