"""Call sites: which frame of a call stack an engineer wants to read, and how to name it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Frame:
    """A resolved frame: as `store.reader.StackFrame`, with the address's place in its object."""

    function: str
    file: str | None
    line: int | None
    module: str
    address: int
    inlined: bool
    offset: int | None  #: address - load bias; None where the object is not known


#: Functions that only pass a request on to malloc: their caller is the site. By the end of the name, whatever the
#: prefix (xmalloc, git__realloc, sqlite3DbMallocRawNN, _PyMem_RawCalloc, g_strdup ...).
_WRAPPER = re.compile(
    r"(?:malloc|calloc|realloc|zalloc|memalign|alignedalloc|strn?dup|memdupz?)"
    r"(?:_?(?:0|n|z|nn|array|zero|raw|rawnn|rawfinish|finish|or_die|internal|aligned|simple|default|size|real|flags))*$",
    re.IGNORECASE,
)
#: Allocation functions of languages and their libraries: operator new, containers, allocators, CPython's object memory.
_LIBRARY = re.compile(
    r"^(?:operator new|std::|__gnu_cxx::|void\* operator new|__gnu_debug::|alloc::|__rust_|__rdl_|"
    r"_?Py(?:Mem|Object)_(?:Raw|Debug)?(?:Raw)?(?:Malloc|Calloc|Realloc|Alloc|Free|GC)|_PyObject_GC_|_PyMem_Debug|"
    r"operator delete|void operator delete|gc_alloc$)"
)
#: Functions that only pass a pointer on to free. (`list_free` is none of them: that is who frees.)
_FREE = re.compile(r"^(?:_?_?(?:x|c|g_|git__|sqlite3_|sqlite3Db|sqlite3Mem)?_?free(?:NN)?|pcache1Free)$", re.I)


@lru_cache(maxsize=65536)
def is_wrapper(function: str) -> bool:
    """Whether a function merely wraps malloc, or free."""
    name = function.partition("(")[0].partition("@")[0]
    return bool(_LIBRARY.match(function) or _WRAPPER.search(name) or _FREE.match(name))


def site_of(frames: Iterable[Frame]) -> Frame | None:
    """The innermost frame that is not a wrapper; the first where all of them are; None where there is none."""
    first = None
    for frame in frames:
        if first is None:
            first = frame
        if frame.module if not frame.function else not is_wrapper(frame.function):
            return frame
    return first


def site_name(frames: Iterable[Frame]) -> str:
    """The call site in a few words: `function (file.c:12)`, `function (libx.so)`, or `libx.so+0x12`."""
    site = site_of(frames)
    return frame_name(site) if site is not None else "(no call stack)"


def frame_name(frame: Frame) -> str:
    """One frame in a few words."""
    where = place(frame.file, frame.line, frame.module)
    if frame.function:
        return f"{frame.function} ({where})" if where else frame.function
    if frame.offset is None:
        return f"{where or '??'} at {frame.address:#x}"
    return f"{where}+{frame.offset:#x}"


def place(file: str | None, line: int | None, module: str) -> str:
    """Where a frame is: `file.c:12`, `file.py` where no line is known, else the object."""
    if not file:
        return base_name(module)
    return f"{base_name(file)}:{line}" if line else base_name(file)


def base_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def fingerprint(frames: Sequence[Frame]) -> str:
    """16 hex digits that stay the same from run to run: no addresses go in where there are names."""
    digest = hashlib.sha256()
    for frame in frames:
        last = frame.function or f"{frame.offset or 0:x}"
        digest.update(
            f"{base_name(frame.module)}\0{last}\0{frame.file or ''}\0{frame.line or 0}\n".encode(errors="replace")
        )
    return digest.hexdigest()[:16]


def frame_json(frame: Frame) -> dict[str, Any]:
    """A frame as docs/json.md has it."""
    return {
        "function": frame.function,
        "file": frame.file,
        "line": frame.line,
        "module": frame.module,
        "address": frame.address,
        "offset": frame.offset,
        "inlined": frame.inlined,
    }


def stack_json(frames: Sequence[Frame]) -> list[dict[str, Any]]:
    return [frame_json(frame) for frame in frames]


def short_function(function: str) -> str:
    """A C++ name without its parameters and with long template arguments left out: for text only."""
    depth, end = 0, len(function)
    if function.endswith((")", ") const", "]")):
        for index in range(len(function) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(function[index], 0)
            if depth == 0 and function[index] == "(":
                end = index
                break
    name = function[:end] if end else function
    return _without_arguments(name) if len(name) > 40 else name


def _without_arguments(name: str) -> str:
    """`a<b<c>, d>::e` as `a<...>::e`."""
    kept, depth = [], 0
    for index, char in enumerate(name):
        # The arrows of operator<, operator-> and operator>> are not brackets.
        bracket = char in "<>" and "operator" not in name[max(index - 10, 0) : index]
        if bracket and char == "<":
            if depth == 0:
                kept.append("<...>")
            depth += 1
        elif bracket and depth:
            depth -= 1
        elif not depth:
            kept.append(char)
    return "".join(kept)
