"""The inner loops as one namespace, interpreted: what `_compiled` is when it is built."""

from __future__ import annotations

from heapledger.tracer.symbols.abbrevs import AbbrevTable, form_ops
from heapledger.tracer.symbols.cursor import Cursor, first_at_least
from heapledger.tracer.symbols.functions import FunctionWalker
from heapledger.tracer.symbols.lines import LineProgram
from heapledger.tracer.symbols.ranges import RangeReader
from heapledger.tracer.symbols.symtab import covering_symbols
from heapledger.tracer.symbols.units import Unit, lookup_aranges, unit_length

__all__ = [
    "AbbrevTable",
    "Cursor",
    "FunctionWalker",
    "LineProgram",
    "RangeReader",
    "Unit",
    "covering_symbols",
    "first_at_least",
    "form_ops",
    "lookup_aranges",
    "unit_length",
]
