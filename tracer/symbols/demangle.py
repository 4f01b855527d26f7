"""Readable names: C++ through libstdc++'s own demangler, Rust in `rust.py`; the rest is left as it is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache

from heapledger.tracer.symbols.rust import demangle_rust

# Longer names are left mangled: libstdc++ takes stack in proportion to them.
# Not bounded: what a C++ name made to expand turns into (nested substitutions double at every level, 230 characters
# make 100 MB). libstdc++ has no limit to set. Rust names are bounded in `rust.py`.
LIMIT_CHARACTERS = 16_384


@cache
def _cxx() -> Callable[[str], str] | None:
    """`__cxa_demangle`, loaded when the first C++ name comes; None on a system without libstdc++.

    Called directly: importing the package cxxfilt runs ldconfig to search for the library (10 ms), and fails where
    there is no ldconfig, as in small containers.
    """
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        function = library.__cxa_demangle
        free = ctypes.CDLL(None).free
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
    function.restype = ctypes.c_void_p
    free.argtypes = (ctypes.c_void_p,)
    free.restype = None
    status = ctypes.c_int()

    def demangle_one(name: str) -> str:
        place = function(name.encode(), None, None, ctypes.byref(status))
        if not place:
            return name
        try:
            return ctypes.string_at(place).decode("utf-8", "backslashreplace")
        finally:
            free(place)

    return demangle_one


@lru_cache(maxsize=65_536)
def demangle(name: str) -> str:
    """The name as a programmer wrote it; `name` itself where it is not mangled, or wrongly.

    >>> demangle("malloc")
    'malloc'
    """
    if len(name) > LIMIT_CHARACTERS or not name.startswith(("_Z", "_R")):
        return name
    rust = demangle_rust(name)
    if rust is not None:
        return rust
    cxx = _cxx() if name.startswith("_Z") and "\0" not in name else None
    return cxx(name) if cxx is not None else name
