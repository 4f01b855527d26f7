"""Resolved frames on disk, one file a build-id, so that the next report need not read the debug information again.

`$XDG_CACHE_HOME/heapledger/symbols/93/ac61ec...json`:

    {"version": 2, "sources": [[size, mtime_ns], null, ...], "strings": ["", "malloc", "./malloc/malloc.c", ...],
     "frames": {"9f2a0": [1, 2, 3294, 0], ...}}

Four numbers a frame, innermost first: function, file (0: none), line (0: none), inlined; [] where nothing is known.

`sources` says what the frames were made from (the binary, and every place where a debug file would be): an installed
or removed -dbg package makes the entry void. A file that is damaged, or a folder that cannot be written, is as good as
none.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from heapledger.tracer.symbols.frame import Frame

VERSION = 2  # raised whenever a change in the readers may give other frames for the same files
LIMIT_BYTES = 64 << 20
LIMIT_OFFSETS = 200_000

Sources = list[list[int] | None]
Known = dict[int, list[Frame]]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/heapledger/symbols`, under `~/.cache` where the variable is not set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    top = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return top / "heapledger" / "symbols"


def fingerprint(paths: Sequence[Path | None]) -> Sources:
    """Size and modification time (ns) of each file, None for one that is not there."""
    marks: Sources = []
    for path in paths:
        try:
            found = path.stat() if path is not None else None
        except OSError:
            found = None
        marks.append([found.st_size, found.st_mtime_ns] if found is not None else None)
    return marks


def cache_path(folder: Path, build_id: str) -> Path:
    return folder / build_id[:2] / f"{build_id[2:]}.json"


def load(folder: Path, build_id: str, sources: Sources) -> Known:
    """The frames kept for a build-id, none if they were made from other files."""
    path = cache_path(folder, build_id)
    try:
        if path.stat().st_size > LIMIT_BYTES:
            return {}
        held = json.loads(path.read_bytes())
        if held["version"] != VERSION or held["sources"] != sources:
            return {}
        return _unpack(held["strings"], held["frames"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _unpack(strings: list[str], packed: dict[str, list[int]]) -> Known:
    if not all(type(text) is str for text in strings):
        raise TypeError("strings")
    known: Known = {}
    seen: dict[tuple[int, int, int, int], Frame] = {}
    for offset, numbers in packed.items():
        frames = []
        for at in range(0, len(numbers), 4):
            function, file, line, inlined = key = (numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3])
            frame = seen.get(key)
            if frame is None:
                frame = Frame(strings[function], strings[file] if file else None, int(line) or None, bool(inlined))
                seen[key] = frame
            frames.append(frame)
        known[int(offset, 16)] = frames
    return known


def save(folder: Path, build_id: str, sources: Sources, known: Known) -> bool:
    """Write the frames in place of what was there, all or nothing. False where the folder does not allow it."""
    if len(known) > LIMIT_OFFSETS:
        return False
    strings: dict[str, int] = {"": 0}
    packed: dict[str, list[int]] = {}
    for offset, frames in known.items():
        numbers: list[int] = []
        for frame in frames:
            function = strings.setdefault(frame.function, len(strings))
            file = strings.setdefault(frame.file, len(strings)) if frame.file else 0
            numbers += (function, file, frame.line or 0, int(frame.inlined))
        packed[f"{offset:x}"] = numbers
    held = {"version": VERSION, "sources": sources, "strings": list(strings), "frames": packed}
    return _write_atomically(cache_path(folder, build_id), json.dumps(held, separators=(",", ":")).encode())


def _write_atomically(path: Path, content: bytes) -> bool:
    """A complete file or none: written beside its place, then renamed over it."""
    import tempfile  # slow to import, and seldom needed

    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except OSError:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return False
    return True
