"""How fast events go into a trace file and come out again, and what they take.

    python bench/store_bench.py TRACE [TRACE ...]     events of real traces (heapledger run -o TRACE -- ...)
    python bench/store_bench.py --mtrace LOG          lines a second of an import

One process, one thread; the file is written to the folder of TRACE. "encode" is the codec with what it takes to hand it
numpy columns (the collector's drain hands it events as they are), "pack" is zstd. Figures: bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from heapledger.store import blocks
from heapledger.store.events import Events
from heapledger.store.reader import Trace
from heapledger.store.writer import TraceWriter
from heapledger.tracer.mtrace import import_log

#: Events looked at: enough for steady figures, and they fit in memory.
MOST = 8_000_000


def timed(work: Callable[[], object]) -> float:
    """The shortest of three runs, in seconds of CPU: everything here is one thread, and machines are shared."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def load(path: Path) -> list[Events]:
    """The first events of the main process, in blocks."""
    found, total = [], 0
    with Trace(path) as trace:
        for events in trace.events(trace.process().id):
            found.append(events)
            total += len(events)
            if total >= MOST:
                break
    return found


def count(trace: Trace, columns: list[str] | None) -> int:
    return sum(map(len, trace.events(1, columns)))


def measure(path: Path) -> None:
    portions = load(path)
    total = sum(map(len, portions))
    millions = total / 1e6
    encoded = [blocks.encode_events(events) for events in portions]
    blobs = [pack(block) for block in encoded]
    size = sum(len(blob) for _, _, blob in blobs)
    # One at a time, as the writer and the reader do: what is kept would be paid for in page faults.
    encode = timed(lambda: sum(blocks.encode_events(events).count for events in portions))
    packing = timed(lambda: sum(len(pack(block)[2]) for block in encoded))
    decode = timed(lambda: sum(len(blocks.decode_events(*blob)) for blob in blobs))
    print(f"{path.name}: {total:,} events, {size / total:.2f} bytes an event")
    print(f"  encode {1e3 * encode / millions:5.1f} ns    pack {1e3 * packing / millions:5.1f} ns    (in memory)")
    print(f"  decode {millions / decode:5.1f} M/s   (all columns)")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder) / "bench.heapledger"

        def write() -> None:
            with TraceWriter(target, source="run", command=["bench"]) as writer:
                process = writer.add_process(pid=1)
                for events in portions:
                    writer.append_events(process, events)

        written = timed(write)
        print(f"  write  {millions / written:6.1f} M/s    {os.path.getsize(target) / total:.2f} bytes an event (file)")
        for columns in (None, ["kind"], ["kind", "addr", "size"]):
            with Trace(target) as trace:
                read = timed(partial(count, trace, columns))
            print(f"  read   {millions / read:6.1f} M/s    {'all columns' if columns is None else ' '.join(columns)}")
    stored: Counter[str] = Counter()
    for _, _, blob in blobs:
        for entry in blocks.directory(blob):
            stored[entry.name] += entry.high - entry.low
    for name, part in stored.most_common():
        print(f"  {name:8} {part / total:6.3f} bytes")


PACKER = blocks.Packer()


def pack(block: blocks.Block) -> tuple[int, int, bytes]:
    """(count, crc, blob), as the writer makes it."""
    blob = PACKER.pack(block.streams)
    return block.count, blocks.checksum("events", block.count, blob), blob


def import_speed(log: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        result = import_log(log, Path(folder) / "t")
        seconds = time.process_time() - began
    print(f"{log.name}: {result.lines:,} lines, {result.lines / seconds / 1e6:.2f} M lines/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtrace", action="store_true")
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    work = import_speed if options.mtrace else measure
    for file in options.files:
        work(file)


if __name__ == "__main__":
    main()
