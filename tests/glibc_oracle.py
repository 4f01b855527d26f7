"""What the tests of the malloc model share: engines, hand-made events, and randops under several real libcs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from heapledger.analyzer.glibc import Settings, compiled_engine_exists, profile_for
from heapledger.analyzer.replay import Replay
from heapledger.store.events import Events, Kind

#: Both engines where the compiled one is built (CI builds it), else the interpreted one alone.
ENGINES = [False, True] if compiled_engine_exists() else [False]
HERE = Path(__file__).resolve().parent
PACKAGES = Path(os.environ.get("HEAPLEDGER_GLIBC_DIR", HERE.parents[1] / "shared" / "glibc"))
SYSTEM = "system"
_LIBRARY_FOLDERS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
_END = 255


class Script:
    """A replay fed by hand, one call a line."""

    def __init__(self, version: str, start_break: int, compiled: bool) -> None:
        self.replay = Replay(profile_for(version), Settings(), start_break, compiled=compiled)
        self._seq = 0

    def _feed(self, kind: Kind, addr: int, size: int, arg: int, thread: int, word: int, stack: int) -> Script:
        self._seq += 1
        events = Events.empty(1)
        events.kind[0], events.addr[0], events.size[0], events.arg[0] = kind, addr, size, arg
        events.thread[0], events.word[0], events.stack[0] = thread, word, stack
        events.seq[0] = events.seq_exit[0] = self._seq
        self.replay.feed(events)
        return self

    def malloc(self, size: int, addr: int, *, thread: int = 0, word: int = 0, stack: int = 0) -> Script:
        return self._feed(Kind.MALLOC, addr, size, 0, thread, word, stack)

    def realloc(self, old: int, size: int, addr: int, *, stack: int = 0) -> Script:
        return self._feed(Kind.REALLOC, addr, size, old, 0, 0, stack)

    def free(self, addr: int, *, thread: int = 0) -> Script:
        return self._feed(Kind.FREE, addr, 0, 0, thread, 0, 0)

    def thread_end(self, *, thread: int) -> Script:
        return self._feed(Kind.THREAD_END, 0, 0, 0, thread, 0, 0)


@dataclass
class Log:
    """What randops did under a real libc."""

    version: str
    start_break: int
    end_break: int
    events: Events


def system_version() -> str:
    """glibc's version here, as the C library itself says."""
    return os.confstr("CS_GNU_LIBC_VERSION").split()[-1]  # type: ignore[union-attr]


@cache
def build_randops(folder: Path) -> Path:
    """Compiles randops; skips where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = folder / "randops"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-fno-builtin", "-fno-stack-protector", "-nostartfiles"]
    subprocess.run([compiler, *flags, "-o", target, HERE / "native" / "randops.c"], check=True)
    return target


@cache
def library_folder(version: str, folder: Path) -> Path | None:
    """Where a version's libc lies, unpacked; None for this system's own. Skips where the package is missing."""
    if version == SYSTEM:
        return None
    packages = sorted(PACKAGES.glob(f"libc6_{version}-*_amd64.deb"))
    if not packages or shutil.which("dpkg-deb") is None:
        pytest.skip(f"no package of glibc {version}: set HEAPLEDGER_GLIBC_DIR")
    root = folder / version
    subprocess.run(["dpkg-deb", "-x", packages[0], root], check=True)
    for name in _LIBRARY_FOLDERS:
        if (root / name / "libc.so.6").exists():
            return root / name
    raise AssertionError(f"{packages[0]} holds no libc.so.6")


def command(version: str, folder: Path, seed: int, count: int, flags: int) -> list[str]:
    """The command that runs randops under a libc."""
    library = library_folder(version, folder)
    loader = [] if library is None else [str(library / "ld-linux-x86-64.so.2"), "--library-path", str(library)]
    return [*loader, str(build_randops(folder)), str(seed), str(count), str(flags)]


def read_log(raw: bytes, version: str) -> Log:
    """The log of randops; its layout is drawn in tests/native/randops.c."""
    rows = np.frombuffer(raw, "<u8").reshape(-1, 6)
    assert rows[0, 0] == 0, "does not begin as a log of randops"
    assert rows[-1, 0] == _END, "is cut off"
    calls = rows[1:-1]
    events = Events.empty(len(calls))
    for i, name in enumerate(("kind", "addr", "size", "arg", "arg2", "word")):
        getattr(events, name)[:] = calls[:, i]
    events.seq[:] = events.seq_exit[:] = np.arange(1, len(calls) + 1)
    return Log(version, int(rows[0, 1]), int(rows[-1, 1]), events)


def run_randops(
    version: str, folder: Path, seed: int, count: int, flags: int, env: dict[str, str] | None = None
) -> Log:
    """Runs randops under a libc and reads its log."""
    done = subprocess.run(
        command(version, folder, seed, count, flags),
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, **(env or {})},
    )
    return read_log(done.stdout, system_version() if version == SYSTEM else version)
