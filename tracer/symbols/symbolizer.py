"""Addresses to frames: the caches in front, then DWARF, then symbol tables."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType

from heapledger.tracer.symbols import cache
from heapledger.tracer.symbols.engine import load_engine
from heapledger.tracer.symbols.frame import Frame
from heapledger.tracer.symbols.locate import candidates, open_elf
from heapledger.tracer.symbols.module import Module

DEFAULT_DEBUG_DIRS = (Path("/usr/lib/debug"),)
OPEN_MODULES = 8
ADDRESS_LIMIT = 1 << 64
DEBUG_SECTIONS = (".debug_info", ".gnu_debugdata")


class _DefaultCache:
    """Stands for "wherever XDG says", asked when a Symbolizer is made."""


DEFAULT_CACHE = _DefaultCache()


class _Entry:
    """What is known of one binary: the frames so far, and the files open while it is among the last used."""

    def __init__(self, path: Path, build_id: str | None, debug_dirs: Sequence[Path], cache_dir: Path | None) -> None:
        self.path = path
        self.debug_dirs = debug_dirs
        image = open_elf(path)
        found = image.build_id() if image is not None else None
        self.trusted = image is not None and (build_id is None or found == build_id)
        self.build_id = build_id or found
        if image is not None and not self.trusted:
            image.close()
            image = None
        self._image = image
        places = candidates(image, self.build_id, debug_dirs)
        self.sources = cache.fingerprint([path if self.trusted else None, *places])
        # What symbol tables alone say is read again as fast as it is read from the cache.
        debug = any(self.sources[1:]) or (image is not None and any(map(image.section, DEBUG_SECTIONS)))
        self.cache_dir = cache_dir if debug and self.build_id and len(self.build_id) >= 4 else None
        self.known: cache.Known = {}
        if self.cache_dir is not None and self.build_id:
            self.known = cache.load(self.cache_dir, self.build_id, self.sources)
        self.new = 0
        self.module: Module | None = None

    def open(self, engine: ModuleType) -> Module:
        if self.module is None:
            if self._image is None and self.trusted:
                self._image = open_elf(self.path)
            self.module = Module(self._image, self.build_id, self.debug_dirs, engine)
        return self.module

    def close_files(self) -> None:
        if self.module is not None:
            self.module.close()
            self.module = None
        elif self._image is not None:
            self._image.close()
        self._image = None

    def save(self) -> None:
        """Keep what was learnt since the last time; an unwritable folder is not worth a word."""
        if self.new and self.cache_dir is not None and self.build_id:
            cache.save(self.cache_dir, self.build_id, self.sources, self.known)
        self.new = 0


class Symbolizer:
    """Functions, files and lines of addresses in ELF files. One binary's files stay open while it is in use.

    `debug_dirs` are searched for separate debug files; `cache_dir` keeps resolved frames between runs (None: not at
    all); `compiled` forces the compiled (True) or interpreted (False) inner loops. Nothing in a file, however
    damaged, raises: its addresses are unresolved. For one thread at a time.
    """

    def __init__(
        self,
        debug_dirs: Sequence[Path] = DEFAULT_DEBUG_DIRS,
        cache_dir: Path | _DefaultCache | None = DEFAULT_CACHE,
        compiled: bool | None = None,
    ) -> None:
        self._debug_dirs = tuple(Path(folder) for folder in debug_dirs)
        self._cache_dir = cache.default_cache_dir() if isinstance(cache_dir, _DefaultCache) else cache_dir
        self._engine = load_engine(compiled)
        self._entries: dict[tuple[str, str | None], _Entry] = {}
        self._open: OrderedDict[tuple[str, str | None], _Entry] = OrderedDict()

    def resolve(self, path: str | Path, offsets: Sequence[int], build_id: str | None = None) -> list[list[Frame]]:
        """The frames at each ELF virtual address (run-time address minus load bias), innermost inlined one first.

        `[]` for an address of which nothing is known. For a return address pass it minus one, the call itself. With
        `build_id` (hex) a file of another build-id is not read; debug files of that build-id still are.
        """
        key = (os.fspath(path), build_id.lower() if build_id else None)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(Path(path), key[1], self._debug_dirs, self._cache_dir)
        self._touch(key, entry)
        missing = sorted({o for o in offsets if 0 <= o < ADDRESS_LIMIT and o not in entry.known})
        if missing:
            found = entry.open(self._engine).resolve(missing)
            for offset in missing:
                entry.known[offset] = found.get(offset, [])
            entry.new += len(missing)
        return [list(entry.known.get(offset, ())) for offset in offsets]

    def _touch(self, key: tuple[str, str | None], entry: _Entry) -> None:
        """Move to the front of the binaries whose files are open, and close the last ones."""
        self._open[key] = entry
        self._open.move_to_end(key)
        while len(self._open) > OPEN_MODULES:
            self._open.popitem(last=False)[1].close_files()

    def close(self) -> None:
        """Write the disk cache and close every file. The object may be used again."""
        for entry in self._entries.values():
            entry.save()
            entry.close_files()
        self._open.clear()

    def __enter__(self) -> Symbolizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
