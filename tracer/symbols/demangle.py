"""Readable names: C++ through libstdc++'s own demangler (cxxfilt), Rust in `rust.py`; the rest is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

# Longer names are left mangled: libstdc++ takes stack in proportion to them.
LIMIT_CHARACTERS = 16_384


@cache
def _cxx() -> Callable[[str], str] | None:
    """cxxfilt's demangler, loaded when the first C++ name comes; None on a system without libstdc++."""
    try:
        import cxxfilt

        cxxfilt.demangle("_Z1fv")
    except (ImportError, OSError, AttributeError, cxxfilt.Error):
        return None

    def demangle_one(name: str) -> str:
        try:
            return str(cxxfilt.demangle(name))
        except (cxxfilt.Error, UnicodeError, ValueError):
            return name

    return demangle_one


@lru_cache(maxsize=65_536)
def demangle(name: str) -> str:
    """The name as a programmer wrote it; `name` itself where it is not mangled, or wrongly.

    >>> demangle("malloc")
    'malloc'
    """
    if len(name) > LIMIT_CHARACTERS or not name.startswith("_Z"):
        return name
    cxx = _cxx()
    return cxx(name) if cxx is not None else name
