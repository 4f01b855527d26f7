"""Trace files made by hand through the store's writer, for tests of the dashboard."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from heapledger.store.events import Events, Kind
from heapledger.store.writer import TraceWriter

SITE = 'leaky<script>alert("x")</script>'


def write_trace(
    path: Path, command: str = "./app --flag", blocks: Sequence[int] = (100, 200), **process: object
) -> Path:
    """A process that allocated `blocks` (bytes each) at a site with a hostile name and freed none; RSS samples."""
    argv = shlex.split(command)
    count = len(blocks)
    with TraceWriter(path, source="run", command=argv, cwd="/tmp", start_unix_ns=1_760_000_000_000_000_000) as writer:
        fields = {"pid": 4242, "image": 1, "exe": "/tmp/app", "argv": argv, "end_ns": 1_000_000_000, "end": "exit"}
        process_id = writer.add_process(**{**fields, "exit_status": 0, **process})
        number = writer.add_modules(process_id, [{"number": 1, "path": "/tmp/app", "low": 0x1000, "high": 0x9000}])[1]
        writer.add_nodes(process_id, [1, 2], [0, 1], [0x1500, 0x2500], [number, number])
        writer.add_frames(
            [
                {"module_id": number, "offset": 0x1500, "function": "main", "file": "/src/app/main.c", "line": 7},
                {"module_id": number, "offset": 0x2500, "function": SITE, "file": "/src/app/leak.c", "line": 12},
            ]
        )
        events = Events.empty(count)
        events.kind[:] = Kind.MALLOC
        events.seq[:] = np.arange(1, 2 * count + 1, 2)
        events.seq_exit[:] = np.arange(2, 2 * count + 2, 2)
        events.time[:] = np.arange(1, count + 1) * 1_000
        events.size[:] = blocks
        chunk = [max(32, (size + 8 + 15) // 16 * 16) for size in blocks]
        events.word[:] = np.array(chunk, np.uint64) | np.uint64(1)
        events.addr[:] = 0x5555_0000_02A0 + np.cumsum([0, *chunk[:-1]])
        events.stack[:] = 2
        writer.append_events(process_id, events)
        for step in range(10):
            writer.add_sample(process_id, time_ns=step * 100_000_000, rss=(step + 1) << 20)
        writer.close(1_000_000_000)
    return path
