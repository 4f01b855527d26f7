"""Where the built shim lies: `path()` gives the file to put in LD_PRELOAD."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from heapledger.errors import HeapledgerError


def path() -> Path:
    """The absolute path of libheapledger.so. Raises HeapledgerError if it was not built."""
    library = Path(str(files(__package__) / "libheapledger.so")).resolve()
    if not library.exists():
        raise HeapledgerError("the tracing library was not built", hint="run: pip install -e . (needs gcc and make)")
    return library
