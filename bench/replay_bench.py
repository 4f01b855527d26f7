"""How fast the malloc model replays: events a second, compiled and interpreted, on a log made by a real libc.

    python bench/replay_bench.py [EVENTS]        (5,000,000; the interpreted engine gets a twentieth of them)

The log comes from tests/native/randops.c under this system's glibc; every address has to be predicted, or it says so.
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


def measure(log: Log, compiled: bool, count: int) -> None:
    """Prints one line: engine, events, seconds, events a second, exact share."""
    events = log.events.take(slice(0, count))
    replay = Replay(profile_for(log.version), Settings(), log.start_break, compiled=compiled)
    begin = time.perf_counter()
    for first in range(0, len(events), 65536):
        replay.feed(events.take(slice(first, first + 65536)))
    seconds = time.perf_counter() - begin
    agreement = replay.agreement
    name = "compiled" if compiled else "interpreted"
    print(
        f"{name:12} {len(events):>10,} events {seconds:8.3f} s {len(events) / seconds:>12,.0f} events/s"
        f"   exact {agreement.exact:,} of {agreement.predicted:,}"
    )


def main() -> None:
    """Makes the log, replays it with each engine."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000_000
    with tempfile.TemporaryDirectory() as folder:
        log = run_randops(SYSTEM, Path(folder), 1, wanted, 0)
    for compiled in reversed(ENGINES):
        measure(log, compiled, wanted if compiled else wanted // 20)


if __name__ == "__main__":
    main()
