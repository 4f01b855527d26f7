"""How fast the collector is: events per second of its CPU, and what a traced run costs.

    .venv/bin/python bench/collect_bench.py [--mallocs 2500000] [--rounds 3]

1. `drain`: allocbench (../shared/bench/allocbench.cpp, one thread) records into one large ring (4 M slots, the most the
   shim makes) with no collector at all; then the spool is turned into a trace file in one go. Wall and CPU of exactly
   the collector's work: decode, merge, encode, zstd, SQLite.
2. `run`: the same program under `heapledger run`, both sharing the machine; wall against the untraced program.
3. `true`: the start-up cost of `heapledger run`.

Prints a markdown table; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from heapledger import _preload
from heapledger.tracer.recover import recover

SOURCE = Path(__file__).resolve().parents[2] / "shared" / "bench" / "allocbench.cpp"
RING_SLOTS = 1 << 22
#: Mallocs whose events fit that ring.
RING_MALLOCS = 1_900_000
RUN = [sys.executable, "-m", "heapledger", "run", "-q", "--no-symbols"]


def build(folder: Path) -> Path:
    target = folder / "allocbench"
    command = ["g++", "-O2", "-g", "-fomit-frame-pointer", "-pthread", str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def cpu_s(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def program_wall(stderr: str) -> float:
    line = next(line for line in stderr.splitlines() if line.startswith("ALLOCBENCH"))
    return float(json.loads(line.partition(" ")[2])["wall"])


def drain_once(program: Path, mallocs: int, folder: Path) -> tuple[int, float, float, int]:
    """(events, wall s, CPU s, bytes of the trace) of turning one recorded spool into a trace."""
    spool = Path(tempfile.mkdtemp(prefix="heapledger-bench-", dir="/dev/shm"))
    settings = {"HEAPLEDGER_SPOOL": str(spool), "HEAPLEDGER_OPTIONS": f"hold_ms=0,ring_slots={RING_SLOTS},quiet=1"}
    environment = {**os.environ, **settings, "LD_PRELOAD": str(_preload.path())}
    subprocess.run([program, str(mallocs), "1"], env=environment, check=True, stderr=subprocess.DEVNULL)
    trace = folder / "drain.heapledger"
    trace.unlink(missing_ok=True)
    wall, cpu = time.perf_counter(), cpu_s(resource.RUSAGE_SELF)
    result = recover(spool, trace, symbols=False)
    wall, cpu = time.perf_counter() - wall, cpu_s(resource.RUSAGE_SELF) - cpu
    connection = sqlite3.connect(trace)
    assert connection.execute("SELECT lost, notes FROM process").fetchall() == [(0, "[]")], result.totals
    connection.close()
    shutil.rmtree(spool, ignore_errors=True)
    return result.totals.events, wall, cpu, trace.stat().st_size


def run_once(program: Path, mallocs: int, folder: Path) -> tuple[int, int, float, float, int]:
    """(events, lost, the program's wall s, the collector's CPU s, its peak memory) of a traced run."""
    trace = folder / "run.heapledger"
    command = [*RUN, "-o", str(trace), "--", str(program), str(mallocs), "1"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    connection = sqlite3.connect(trace)
    events, lost = connection.execute("SELECT sum(events), sum(lost) FROM process").fetchone()
    collector = json.loads(connection.execute("SELECT collector FROM session").fetchone()[0])
    connection.close()
    return events, lost, program_wall(result.stderr), collector["cpu_s"], collector["peak_rss_bytes"]


def plain_once(program: Path, mallocs: int) -> float:
    result = subprocess.run([program, str(mallocs), "1"], check=True, capture_output=True, text=True)
    return program_wall(result.stderr)


def true_once(folder: Path) -> tuple[float, float]:
    cpu, wall = cpu_s(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*RUN, "-o", str(folder / "true.heapledger"), "true"], check=True)
    return time.perf_counter() - wall, cpu_s(resource.RUSAGE_CHILDREN) - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mallocs", type=int, default=2_500_000, help="about 2.06 events each")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="collect-bench-"))
    try:
        program = build(folder)
        drains = [drain_once(program, min(arguments.mallocs, RING_MALLOCS), folder) for _ in range(arguments.rounds)]
        plain, runs = [], []
        for _ in range(arguments.rounds):
            plain.append(plain_once(program, arguments.mallocs))
            runs.append(run_once(program, arguments.mallocs, folder))
        trues = [true_once(folder) for _ in range(arguments.rounds)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(drains, plain, runs, trues)


def report(
    drains: list[tuple[int, float, float, int]],
    plain: list[float],
    runs: list[tuple[int, int, float, float, int]],
    trues: list[tuple[float, float]],
) -> None:
    events = drains[0][0]
    wall, cpu = (statistics.median(d[i] for d in drains) for i in (1, 2))
    print("| measured | events | wall s | collector CPU s | M events/s of CPU | other |")
    print("|---|---|---|---|---|---|")
    print(
        f"| drain a spool | {events:,} | {wall:.2f} | {cpu:.2f} | {events / cpu / 1e6:.2f} "
        f"| {drains[0][3] / events:.2f} bytes an event |"
    )
    run_wall, run_cpu = (statistics.median(r[i] for r in runs) for i in (2, 3))
    print(
        f"| heapledger run | {runs[0][0]:,} | {run_wall:.2f} | {run_cpu:.2f} | {runs[0][0] / run_cpu / 1e6:.2f} "
        f"| {sum(r[1] for r in runs)} lost; untraced {statistics.median(plain):.2f} s; "
        f"collector at most {max(r[4] for r in runs) / 1e6:.0f} MB |"
    )
    true_wall, true_cpu = (statistics.median(t[i] for t in trues) for i in (0, 1))
    print(f"| heapledger run true | | {true_wall:.2f} | {true_cpu:.2f} | | |")


if __name__ == "__main__":
    main()
