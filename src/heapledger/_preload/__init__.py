"""Where the built shim lies: `path()` gives the file to put in LD_PRELOAD."""

from __future__ import annotations

from pathlib import Path

from heapledger.errors import HeapledgerError


def path() -> Path:
    """The absolute path of libheapledger.so. Raises HeapledgerError if it was not built."""
    library = Path(__file__).with_name("libheapledger.so").resolve()
    if not library.exists():
        raise HeapledgerError("the tracing library was not built", hint="run: pip install -e . (needs gcc and make)")
    return library
