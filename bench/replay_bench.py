"""How fast the malloc model replays: events a second, compiled and interpreted, on logs made by a real libc.

    python bench/replay_bench.py [EVENTS]        (5,000,000; the interpreted engine gets a twentieth of them)

The logs come from tests/native/randops.c under this system's glibc; every address has to be predicted, or it says so.
`plain` has 4,096 slots of all sizes; `many` 131,072 small blocks (the shadow no longer fits the caches); `sparse` a
heap of hundreds of MB in large blocks (most of the shadow is never touched). `first` is the speed over the first
65,536 events, in which the shadow grows and its pages are touched for the first time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from glibc_oracle import ENGINES, SYSTEM, Log, run_randops

from heapledger.analyzer.glibc import Settings, profile_for
from heapledger.analyzer.replay import Replay

BATCH = 65536
#: Name → seed and flags of randops.
WORKLOADS = {"plain": (1, 0), "many": (2, 8 | 2), "sparse": (4, 1 | 16)}


def measure(name: str, log: Log, compiled: bool, count: int) -> None:
    """Prints one line: engine, events, seconds, events a second (all, and the first batch), exact share."""
    events = log.events.take(slice(0, count))
    replay = Replay(profile_for(log.version), Settings(), log.start_break, compiled=compiled)
    batches = [events.take(slice(first, first + BATCH)) for first in range(0, len(events), BATCH)]
    spent, highest = [], 0
    for batch in batches:
        begin = time.perf_counter()
        series = replay.feed(batch)
        spent.append(time.perf_counter() - begin)
        highest = max(highest, int(series.heap_bytes.max()))
    agreement = replay.agreement
    engine = "compiled" if compiled else "interpreted"
    print(
        f"{name:7} {engine:12} {len(events):>10,} events {sum(spent):7.3f} s"
        f" {len(events) / sum(spent):>11,.0f} events/s (first {len(batches[0]) / spent[0]:>10,.0f})"
        f"   heap {highest >> 20} MiB   exact {agreement.exact:,} of {agreement.predicted:,}"
    )


def main() -> None:
    """Makes the logs, replays each with each engine."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000_000
    with tempfile.TemporaryDirectory() as folder:
        for name, (seed, flags) in WORKLOADS.items():
            log = run_randops(SYSTEM, Path(folder), seed, wanted, flags)
            for compiled in reversed(ENGINES):
                measure(name, log, compiled, wanted if compiled else wanted // 20)


if __name__ == "__main__":
    main()
