"""Samples of real traces: what `heapledger run --sample` would have recorded of the same run.

An honest Poisson-by-bytes sampler, written without a look at the analyzer: points fall on the line of all requested
bytes with exponential distances, and an allocation is recorded if a point falls on it. Of other calls, those stay that
release a recorded block.
"""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import numpy as np

from heapledger.store.events import Events, Kind
from heapledger.store.reader import Trace
from heapledger.store.writer import TraceWriter

_ALLOCATIONS = (Kind.MALLOC, Kind.CALLOC, Kind.REALLOC, Kind.MEMALIGN, Kind.VALLOC, Kind.PVALLOC)


def sampled_events(events: Events, sample_bytes: int, seed: int, *, told: bool = True) -> Events:
    """A sample of a process's whole events. `told`: frees say whether the block was temporary."""
    rng = random.Random(seed)
    countdown: dict[int, float] = {}
    recorded: set[int] = set()
    last: dict[int, int] = {}
    keep, kinds, args = [], events.kind.copy(), events.arg.copy()
    columns = (events.kind, events.thread, events.addr, events.size, events.arg)
    for i, (kind, thread, addr, size, arg) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        if kind in _ALLOCATIONS:
            released = kind == Kind.REALLOC and arg in recorded and (addr != 0 or size == 0)
            if released:
                recorded.discard(arg)
            chosen = False
            if addr:
                left = countdown.get(thread, rng.expovariate(1 / sample_bytes)) - size
                chosen = left < 0
                countdown[thread] = rng.expovariate(1 / sample_bytes) if chosen else left
                last[thread] = addr
            if chosen:
                recorded.add(addr)
                if kind == Kind.REALLOC and not released:
                    args[i] = 0  # the old block is none of ours
                keep.append(i)
            elif released:
                kinds[i] = Kind.FREE
                keep.append(i)
                events.addr[i], args[i] = arg, 2 if told else 0
        elif kind == Kind.FREE:
            if addr in recorded:
                recorded.discard(addr)
                args[i] = (1 if last.get(thread) == addr else 2) if told else 0
                keep.append(i)
        else:
            keep.append(i)
    thinned = Events(**{name: getattr(events, name).copy() for name in events.__slots__})
    thinned.kind, thinned.arg = kinds, args
    return thinned.take(np.array(keep, np.intp))


def sampled_copy(path: Path, target: Path, sample_bytes: int, seed: int = 1, *, told: bool = True) -> Path:
    """A copy of a trace in which each process is a sample; everything else is as it was."""
    with Trace(path) as trace:
        parts = {row.id: Events.concat(list(trace.events(row.id))) for row in trace.processes()}
    with sqlite3.connect(path) as source, sqlite3.connect(target) as copy:
        source.backup(copy)
        tables = [row[0] for row in copy.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        for table in tables:
            if table.startswith("event_") or table in ("fact", "pyramid"):
                copy.execute(f"DELETE FROM {table}")
        copy.execute("UPDATE process SET sample_bytes = ?", (sample_bytes,))
    copy.close()
    source.close()
    with TraceWriter.reopen(target) as writer:
        for process_id, events in parts.items():
            thinned = sampled_events(events, sample_bytes, seed, told=told)
            writer.append_events(process_id, thinned)
            writer.update_process(process_id, events=len(thinned))
        with Trace(path) as trace:
            writer.close(trace.session.end_ns)
    return target
