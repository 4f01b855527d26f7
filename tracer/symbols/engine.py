"""Which build of the inner loops runs: the compiled module, or the same source interpreted."""

from __future__ import annotations

import importlib
from types import ModuleType

COMPILED = "heapledger.tracer.symbols._compiled"
INTERPRETED = "heapledger.tracer.symbols.interpreted"


def load_engine(compiled: bool | None = None) -> ModuleType:
    """The compiled inner loops (True: or ImportError), the interpreted ones (False), or the best there are (None)."""
    if compiled is None:
        try:
            return importlib.import_module(COMPILED)
        except ImportError:
            return importlib.import_module(INTERPRETED)
    return importlib.import_module(COMPILED if compiled else INTERPRETED)
