"""A small collector for tests of the shim: runs a program under it and keeps all that its images recorded."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import ring_reader as rings

from heapledger.errors import SpoolError
from heapledger.store.events import COLUMNS, Events, Kind
from heapledger.tracer import spool

PRELOAD = Path(__file__).parents[1] / "preload"
_libc = ctypes.CDLL(None)


def build_shim(folder: Path, *flags: str) -> Path:
    """The shim, built from this checkout."""
    target = folder / "libheapledger.so"
    extra = f"CFLAGS=-O2 -g {' '.join(flags)}"
    subprocess.run(["make", "-s", "-C", str(PRELOAD), f"OUT={target}", extra], check=True)
    return target


@dataclass
class Recorded:
    """One process image: everything that lay in its folder."""

    folder: Path
    control: spool.Control
    rings: dict[int, rings.Ring] = field(default_factory=dict)
    parts: list[Events] = field(default_factory=list)
    held: int = 0
    maps: str = ""  # of the process while it was held

    def get(self, name: str) -> int:
        return self.control.get(name)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> list[list[str]]:
        return spool.Log(self.folder / "log").read()

    @property
    def events(self) -> Events:
        events = Events.concat(self.parts)
        return events.take(np.argsort(events.seq, kind="stable"))

    def of(self, *kinds: Kind) -> Events:
        events = self.events
        return events.take(np.isin(events.kind, kinds))

    def rows(self) -> list[tuple[int, ...]]:
        """(kind, addr, size, arg, arg2, word) of each event in order of seq."""
        e = self.events
        columns = (e.kind, e.addr, e.size, e.arg, e.arg2, e.word)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def check(self) -> None:
        """Identity: each number that was handed out is the entry or the exit of exactly one event."""
        events = self.events
        numbers = np.concatenate((events.seq, events.seq_exit[events.seq_exit != 0]))
        assert np.array_equal(np.sort(numbers), np.arange(1, self.get("seq"), dtype=np.uint64))
        assert self.get("lost") == 0


def _events_of(ring: rings.Ring, decoded: rings.Decoded) -> Events:
    columns = {name: getattr(decoded, name) for name in COLUMNS if name not in ("thread", "time")}
    thread = np.full(len(decoded), ring.get("thread"), np.uint32)
    return Events(**columns, thread=thread, time=decoded.tick)


class Collector:
    """Drains the images of a spool folder until told to stop, and lets held processes go."""

    def __init__(self, folder: Path, delay_s: float = 0.0) -> None:
        self.folder = folder
        self.images: dict[str, Recorded] = {}
        self.delay_s = delay_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for image in self.images.values():
            self._drain(image, final=True)

    def _loop(self) -> None:
        time.sleep(self.delay_s)
        while not self._stop.is_set():
            self.round()
            time.sleep(0.001)
        self.round()

    def round(self) -> None:
        for entry in sorted(self.folder.iterdir()):
            if entry.name not in self.images and (entry / "control").exists():
                self.images[entry.name] = Recorded(entry, spool.Control(entry))
        for image in self.images.values():
            image.control.set("heartbeat_ns", time.monotonic_ns())
            self._drain(image)
            if image.get("state") == spool.HOLDING and not image.get("release"):
                self._drain(image)
                self._let_go(image)

    def _drain(self, image: Recorded, *, final: bool = False) -> None:
        for index in range(image.get("rings")):
            if index not in image.rings:
                image.rings[index] = rings.Ring(image.folder / f"ring.{index}")
            ring = image.rings[index]
            while (decoded := ring.read(time.monotonic_ns(), final=final)) is not None and len(decoded):
                image.parts.append(_events_of(ring, decoded))
                ring.release()
            self._reuse(image, ring)

    def _reuse(self, image: Recorded, ring: rings.Ring) -> None:
        """A ring whose owner is dead goes back to the shim."""
        alive = Path(f"/proc/{image.get('pid')}/task/{ring.get('tid')}").exists()
        if ring.get("state") != spool.RING_FREE and not alive and not ring.backlog():
            ring.set("state", spool.RING_FREE)

    def _let_go(self, image: Recorded) -> None:
        image.held += 1
        image.maps = Path(f"/proc/{image.get('pid')}/maps").read_text()
        image.control.set("release", 1)
        word = ctypes.c_uint32.from_buffer(image.control.map, 256)
        _libc.syscall(202, ctypes.byref(word), 1, 1 << 30, None, None, 0)
        del word


@dataclass
class Run:
    """What a traced program did, and what was recorded of it."""

    code: int
    stdout: bytes
    stderr: bytes
    seconds: float
    spool: Path
    images: list[Recorded]

    @property
    def first(self) -> Recorded:
        """The image that has no parent and began first."""
        return min(self.images, key=lambda image: image.get("start_ns"))

    @property
    def children(self) -> list[Recorded]:
        first = self.first
        return sorted((i for i in self.images if i is not first), key=lambda image: image.get("start_ns"))


class Shim:
    """Runs programs under the shim at `library`."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.library = library
        self.folder = folder
        self._runs = 0

    def environment(self, spool_folder: Path, options: str = "") -> dict[str, str]:
        return {
            **os.environ,
            "LD_PRELOAD": str(self.library),
            "HEAPLEDGER_SPOOL": str(spool_folder),
            "HEAPLEDGER_OPTIONS": options,
        }

    def new_spool(self) -> Path:
        self._runs += 1
        folder = self.folder / f"spool-{self._runs}"
        folder.mkdir()
        return folder

    def run(
        self,
        *argv: str | Path,
        collect: bool = True,
        options: str = "",
        delay_s: float = 0.0,
        env: dict[str, str] | None = None,
        spool_folder: Path | None = None,
        stdin: bytes = b"",
        timeout: float = 60,
    ) -> Run:
        folder = spool_folder or self.new_spool()
        environment = {**self.environment(folder, options), **(env or {})}
        collector = Collector(folder, delay_s)
        began = time.monotonic()
        if collect:
            with collector:
                done = _call(argv, environment, stdin, timeout)
        else:
            done = _call(argv, environment, stdin, timeout)
            collector.round()
        seconds = time.monotonic() - began
        images = list(collector.images.values())
        return Run(done.returncode, done.stdout, done.stderr, seconds, folder, images)


def _call(
    argv: tuple[str | Path, ...], environment: dict[str, str], stdin: bytes, timeout: float
) -> subprocess.CompletedProcess[bytes]:
    command = [str(part) for part in argv]
    return subprocess.run(command, env=environment, input=stdin, capture_output=True, timeout=timeout, check=False)


def plain(*argv: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The same program without the shim."""
    return _call(argv, dict(os.environ), stdin, 60)


def rows_said(text: bytes) -> list[tuple[int, ...]]:
    """What tests/native/shim_calls.c printed: (kind, addr, size, arg, arg2, word) of each call."""
    rows: list[tuple[int, ...]] = []
    for line in text.decode().splitlines():
        kind, *rest = line.split()
        rows.append((int(kind), *(int(value, 16) for value in rest)))
    return rows


_built: list[Path] = []


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, though each module that imports this fixture has one of its own."""
    if not _built:
        _built.append(build_shim(tmp_path_factory.mktemp("shim")))
    return _built[0]


@pytest.fixture
def shim(shim_library: Path, tmp_path: Path) -> Shim:
    return Shim(shim_library, tmp_path)


#: A collector may be a little late to see that a thread is dead: so many rings at most for threads one after another.
NO_FREE_RING = 6

__all__ = [
    "NO_FREE_RING",
    "Collector",
    "Recorded",
    "Run",
    "Shim",
    "SpoolError",
    "build_shim",
    "plain",
    "rows_said",
    "shim",
    "shim_library",
]
