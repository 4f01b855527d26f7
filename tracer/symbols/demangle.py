"""Readable names: C++ through libstdc++'s own demangler, Rust in `rust.py`; the rest is left as it is."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from functools import cache, lru_cache

from heapledger.tracer.symbols import rust
from heapledger.tracer.symbols.apart import Apart

# Longer names are left mangled: libstdc++ takes stack in proportion to them; and so are names that turn out longer.
LIMIT_CHARACTERS = 16_384
LIMIT_OUTPUT = rust.LIMIT_OUTPUT
# Names that may become longer than this are demangled in a process apart, which costs 30 ms once. Of 190,000 symbols of
# node, LLVM, cc1plus and libstdc++ these are 64.
LIMIT_GROWTH = 16 << 20
# What stands for an earlier part of the name: substitutions, template parameters, packs, constructors.
REFERENCE = re.compile(r"[ST][0-9A-Z]*_|[CD][0-9]|D[pP]|s[pZP]")
REFERENCE_LETTERS = "_CDs"
# What one character without reference can become: `Ss` is std::basic_string<char, std::char_traits<char>, ...>.
LONGEST = 40


def growth(name: str) -> float:
    """An upper bound of the characters that a mangled C++ name may turn into.

    `n` references multiply at most by 3 ** (n / 3): in `k` generations, each of which stands `n / k` times in the next,
    by `(n / k) ** k`, and that is largest for 3 in each.
    """
    references = sum(map(name.count, REFERENCE_LETTERS))  # at most so many, and this is a tenth of the time
    if (most := LONGEST * len(name) * math.pow(3, min(references / 3, 100))) <= LIMIT_GROWTH:
        return most
    return LONGEST * len(name) * math.pow(3, min(len(REFERENCE.findall(name)) / 3, 100))


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


@cache
def _apart() -> Apart:
    return Apart(LIMIT_OUTPUT)


@lru_cache(maxsize=65_536)
def demangle(name: str) -> str:
    """The name as a programmer wrote it; `name` itself where it is not mangled, or wrongly.

    >>> demangle("malloc")
    'malloc'
    """
    if len(name) > LIMIT_CHARACTERS or not name.startswith(("_Z", "_R")):
        return name
    if name[1] == "R" or "17h" in name:
        readable = rust.demangle_rust(name)
        if readable is not None:
            return readable
    cxx = _cxx() if name.startswith("_Z") and "\0" not in name else None
    if cxx is None:
        return name
    readable = cxx(name) if growth(name) <= LIMIT_GROWTH else _apart().demangle(name)
    return readable if readable is not None and len(readable) <= LIMIT_OUTPUT else name
