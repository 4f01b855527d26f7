"""A spool that was left behind becomes a trace file, or finishes the one that was being written.

What can be left: the program was killed together with the collector, or the collector alone (the shim then stops by
itself), or the machine's disk was full. The trace file holds the blocks of events that were committed; the rings of the
spool, and files beside the trace (tracer/spill.py), hold every event that is not in such a block; call stacks and
modules are in the spool as well. What lies nowhere is counted as lost.
"""

from __future__ import annotations

import os
import shutil
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heapledger.errors import HeapledgerError, SchemaError, SpoolError, TraceError, UsageError
from heapledger.store.reader import Trace
from heapledger.store.writer import TraceWriter
from heapledger.tracer import host, spool
from heapledger.tracer.collect import Collector, Exit, Totals
from heapledger.tracer.image import Written
from heapledger.tracer.launch import Session, check_output
from heapledger.tracer.resolve import Addresses, Progress, resolve
from heapledger.tracer.spill import Spill, folder_of
from heapledger.tracer.watch import WatchOptions

#: A spool whose collector showed itself within this time (ns) is still being collected.
_FRESH_NS = 2_000_000_000


@dataclass(slots=True)
class Recovered:
    trace: Path
    continued: bool
    totals: Totals


def recover(
    folder: Path,
    output: Path | None = None,
    *,
    symbols: bool = True,
    keep: bool = False,
    progress: Progress | None = None,
) -> Recovered:
    """Makes a trace of `folder`. SpoolError when it is not a spool, UsageError when it is still in use."""
    images = _images(folder)
    session = _session(folder, images)
    _refuse_if_collected(folder, images, session)
    target = output or Path(session.output or f"{folder.name}.heapledger")
    check_output(target)
    before = _unfinished(Path(session.output), session) if session.output else None
    if before is not None and not _same(Path(session.output), target):
        _copy(Path(session.output), target)
    if before is None and output is None and _holds_another(target):
        raise UsageError(f"{str(target)!r} exists and is not this run's unfinished trace", hint="name another with -o")
    writer = TraceWriter.reopen(target) if before is not None else _new(target, session)
    with writer:
        totals = _collect(folder, writer, session, before or {}, symbols=symbols and session.symbols, progress=progress)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
        if session.output:
            shutil.rmtree(folder_of(Path(session.output), folder), ignore_errors=True)
    return Recovered(target, before is not None, totals)


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise SpoolError(f"there is no spool folder {str(folder)!r}", hint="`heapledger run` names it when it fails")
    images = [path.parent for path in folder.glob("*.*/control")]
    if not images and not (folder / "session.json").exists():
        raise SpoolError(f"{str(folder)!r} is not a spool", hint="a spool is a folder like /dev/shm/heapledger-...")
    return images


def _session(folder: Path, images: list[Path]) -> Session:
    """What the collector left about the run, or the best guess from the images."""
    try:
        return Session.load(folder)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    starts = []
    for image in images:
        try:
            starts.append(spool.Control(image).get("start_ns"))
        except (SpoolError, OSError, ValueError):
            continue
    if not starts:
        raise SpoolError(f"nothing in {str(folder)!r} can be read")
    unix_ns = time.time_ns() - time.monotonic_ns() + min(starts)
    return Session([], "", min(starts), unix_ns, host.facts())


def _refuse_if_collected(folder: Path, images: list[Path], session: Session) -> None:
    """Two collectors of one spool would take each other's events."""
    if session.collector_pid in (0, os.getpid()) or session.host.get("boot_id") != host.boot_id():
        return
    try:
        command = Path(f"/proc/{session.collector_pid}/cmdline").read_bytes()
    except OSError:
        return
    beats = [session.start_ns]  # it may not have come to its first beat
    for image in images:
        try:
            beats.append(spool.Control(image).get("heartbeat_ns"))
        except (SpoolError, OSError, ValueError):
            continue
    if b"heapledger" in command and time.monotonic_ns() - max(beats) < _FRESH_NS:
        raise UsageError(
            f"{str(folder)!r} is being collected by process {session.collector_pid}",
            hint="wait until that run has ended",
        )


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _copy(source: Path, target: Path) -> None:
    """The unfinished trace with its write-ahead log."""
    for suffix in ("-wal", ""):
        if Path(f"{source}{suffix}").exists():
            shutil.copyfile(f"{source}{suffix}", f"{target}{suffix}")


def _unfinished(path: Path, session: Session) -> dict[str, Written] | None:
    """What the run's own trace file holds of each image; None if it is not there, not this run's, or finished."""
    if not path.exists():
        return None
    try:
        with Trace(path) as trace:
            if trace.session.start_ns != session.start_ns or trace.session.end_ns is not None:
                return None
            return {f"{p.pid}.{p.image}": _written(trace, p) for p in trace.processes()}
    except HeapledgerError:
        return None


def _holds_another(path: Path) -> bool:
    """Whether a whole trace lies there (one that was cut off before its first row is worth nothing)."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    try:
        with Trace(path) as trace:
            return trace.session.id > 0
    except SchemaError:
        return True  # an older one
    except TraceError:
        return False


def _written(trace: Trace, process: Any) -> Written:
    events = returned = last_seq = last_ns = 0
    for part in trace.events(process.id, columns=["seq", "seq_exit", "time"]):
        events += len(part)
        returned += int(np.count_nonzero(part.seq_exit))
        last_seq = int(part.seq[-1])
        last_ns = max(last_ns, int(part.time.max()))
    return Written(process.id, last_seq, last_ns, events, returned, list(process.notes))


def _note_addresses(path: Path, addresses: Addresses) -> None:
    """Call stacks that are in the trace file already: their symbols were to be resolved at the end."""
    with Trace(path) as trace:
        for process in trace.processes():
            for module in trace.modules(process.id):
                row = {name: getattr(module, name) for name in ("path", "build_id", "bias")}
                addresses.add_module(module.id, row)
            known = np.array([(m, a) for m, _, a in trace.addresses(process.id)], np.uint64).reshape(-1, 2)
            addresses.add(*(array("q", column.tobytes()) for column in known.T))


def _new(target: Path, session: Session) -> TraceWriter:
    return TraceWriter(
        target,
        source="recover",
        command=session.command,
        cwd=session.cwd,
        start_ns=session.start_ns,
        start_unix_ns=session.start_unix_ns,
        host=session.host,
    )


def _collect(
    folder: Path,
    writer: TraceWriter,
    session: Session,
    before: dict[str, Written],
    *,
    symbols: bool,
    progress: Progress | None,
) -> Totals:
    collector = Collector(
        folder,
        writer,
        session_ns=session.start_ns,
        options=WatchOptions(residency=False),
        main=Exit(session.main_pid),
        live=False,
        keep_spool=True,
        written=before,
        spill=Spill(folder_of(Path(session.output), folder)) if session.output else None,
    )
    collector.addresses.wanted = symbols
    if before and symbols:
        _note_addresses(writer.path, collector.addresses)
    collector.round()
    collector.finish()
    if symbols:
        resolve(collector.addresses, writer, progress)
    writer.set_collector({**collector.cost(), "recovered": True})
    return collector.totals
