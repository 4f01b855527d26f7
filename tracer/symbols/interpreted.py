"""The inner loops as one namespace, interpreted: what `_compiled` is when it is built."""

from __future__ import annotations

from heapledger.tracer.symbols.cursor import Cursor, first_at_least
from heapledger.tracer.symbols.symtab import covering_symbols

__all__ = ["Cursor", "covering_symbols", "first_at_least"]
