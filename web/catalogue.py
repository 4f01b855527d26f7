"""Which traces there are. A URL names one by an id, never by a path; an id that is not in the catalogue does not exist.

A file given on the command line is served wherever it lies. Of a folder, `*.heapledger` files directly in it are
served; a symbolic link that leads out of the folder is not (whoever may write there could publish any trace).
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

from heapledger.errors import HeapledgerError, UsageError
from heapledger.store.reader import Trace
from heapledger.web.config import Config

SUFFIX = ".heapledger"

#: Identity of a file's content as far as stat knows: (inode, size, mtime in ns).
Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that may be served."""

    id: str
    path: Path

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True, slots=True)
class Summary:
    """A line of the index. `problem` is set, and the rest is empty, where the file cannot be read."""

    command: tuple[str, ...] = ()
    start_unix_ns: int = 0
    duration_ns: int | None = None
    size_bytes: int = 0
    events: int = 0
    lost: int = 0
    processes: int = 0
    #: The highest RSS that any sample or snapshot of any of its processes saw; None where none was taken.
    peak_rss_bytes: int | None = None
    problem: str = ""


def identify(path: Path) -> str:
    """An id that stays the same as long as the file stays where it is: links can be kept."""
    return hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def stamp_of(path: Path) -> Stamp:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def peak_rss(trace: Trace) -> int | None:
    """Bytes: what the kernel's high-water mark, samples and snapshots say of the largest process."""
    seen = [0]
    for process in trace.processes():
        samples = trace.samples(process.id)
        for name in ("rss", "vm_hwm"):
            column = samples.get(name)
            if column is not None and len(column):
                seen.append(int(column.max()))
        seen.extend(snapshot.rss_bytes for snapshot in trace.snapshots(process.id))
    return max(seen) or None


def summarise(path: Path) -> Summary:
    try:
        size = path.stat().st_size
        with Trace(path) as trace:
            session, processes = trace.session, trace.processes()
            return Summary(
                command=tuple(session.command),
                start_unix_ns=session.start_unix_ns,
                duration_ns=session.end_ns,
                size_bytes=size,
                events=sum(process.events for process in processes),
                lost=sum(process.lost for process in processes),
                processes=len(processes),
                peak_rss_bytes=peak_rss(trace),
            )
    except HeapledgerError as error:
        return Summary(problem=error.message)
    except OSError as error:
        return Summary(problem=error.strerror or "cannot be read")


class Catalogue:
    """The traces under the configured paths. Thread-safe."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._summaries: dict[Path, tuple[Stamp, Summary]] = {}
        self._lock = threading.Lock()

    def entries(self) -> list[Entry]:
        """In the order given; those of a folder newest first."""
        found: dict[Path, Entry] = {}
        for path in self._config.paths:
            for file in self._in_folder(path) if path.is_dir() else [path.resolve()]:
                found.setdefault(file, Entry(identify(file), file))
        return list(found.values())

    def entry(self, trace_id: str) -> Entry | None:
        return next((entry for entry in self.entries() if entry.id == trace_id), None)

    def summary(self, entry: Entry) -> Summary:
        """Read once for each content of the file."""
        try:
            stamp = stamp_of(entry.path)
        except OSError as error:
            return Summary(problem=error.strerror or "cannot be read")
        with self._lock:
            known = self._summaries.get(entry.path)
        if known and known[0] == stamp:
            return known[1]
        summary = summarise(entry.path)
        with self._lock:
            self._summaries[entry.path] = (stamp, summary)
        return summary

    def _in_folder(self, folder: Path) -> list[Path]:
        root = folder.resolve()
        dated: list[tuple[int, Path]] = []
        for child in root.glob(f"*{SUFFIX}"):
            try:
                file = child.resolve(strict=True)
                if file.parent == root and file.is_file():
                    dated.append((file.stat().st_mtime_ns, file))
            except (OSError, RuntimeError):
                continue  # gone between listing and looking, or a loop of links
        dated.sort(key=lambda pair: (-pair[0], pair[1]))
        return [file for _, file in dated[: self._config.folder_limit]]


def check_paths(paths: tuple[Path, ...]) -> None:
    """Said at the start, not when a page is opened: a path that does not exist, or a file that is no trace."""
    for path in paths:
        try:
            is_folder, exists = path.is_dir(), path.exists()
            if is_folder:
                next(path.iterdir(), None)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}") from error
        if not exists:
            raise UsageError(f"{path}: there is no such file or folder")
        if not is_folder:
            with Trace(path):
                pass
