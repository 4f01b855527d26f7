"""Real suites alone and traced: do they come out the same, is the trace whole, and what does it cost?

    python bench/suites.py [--rounds 1] [--only nginx ...] [--quick]

The suites are those of tests/real_suites.py, in full: CPython's own tests, SQLite's shell, redis-server, nginx, a JVM,
npm. Each runs alone and then traced, `--rounds` times in turn; ratios are of medians. CPU is that of the command's
tree (program and collector; what a server's client takes is not in it). The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

import real_suites  # noqa: E402
from real_suites import Ended, Suite  # noqa: E402

HEAPLEDGER = [str(Path(sys.executable).with_name("heapledger"))]


def measure(suite: Suite, rounds: int) -> tuple[str, bool]:
    """A row of the table, and whether all is as it should be."""
    alone: list[Ended] = []
    traced: list[Ended] = []
    faults: list[str] = []
    info: dict[str, Any] = {}
    for number in range(rounds):
        print(f"{suite.name}: round {number + 1}", file=sys.stderr, flush=True)
        expected, ended = real_suites.run(suite, [], timeout=1800)
        alone.append(ended)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "suite.heapledger"
            prefix = [*HEAPLEDGER, "run", "-q", "--no-symbols", "-o", str(trace), "--"]
            outcome, ended = real_suites.run(suite, prefix, timeout=1800)
            traced.append(ended)
            info = read(trace)
        faults += different(expected, outcome)
        faults += [f"{info['lost']} lost"] if info["lost"] else []
        faults += [f"{len(info['damaged'])} blocks damaged"] if info["damaged"] else []
    cells = [
        suite.name,
        "; ".join(faults) or "same",
        f"{info['events']:,}",
        str(len(info["processes"])),
        f"{info['file_bytes'] / max(info['events'], 1):.1f}",
        *(f"{median(alone, what):.2f} → {median(traced, what):.2f} s" for what in ("wall", "cpu")),
        *(f"{median(traced, what) / median(alone, what):.2f}" for what in ("wall", "cpu")),
    ]
    return "| " + " | ".join(cells) + " |", not faults


def read(trace: Path) -> dict[str, Any]:
    argv = [*HEAPLEDGER, "info", "--check", "--format", "json", str(trace)]
    return dict(json.loads(subprocess.run(argv, check=True, capture_output=True).stdout))


def different(expected: real_suites.Outcome, outcome: real_suites.Outcome) -> list[str]:
    """The parts of an outcome that are not as alone; of tests, which ones."""
    found = []
    for key in sorted(expected.keys() | outcome.keys()):
        before, after = expected.get(key), outcome.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            found += [f"{name}: {before.get(name)} → {after.get(name)}" for name in names]
        elif before != after:
            found.append(f"{key} differs")
            print(f"{key}:\nalone: {before!r}\ntraced: {after!r}", file=sys.stderr)
    return found


def median(runs: list[Ended], what: str) -> float:
    return float(statistics.median(getattr(run, what) for run in runs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", action="append", help="suites whose name holds this; may be given several times")
    parser.add_argument("--quick", action="store_true", help="what CI runs")
    options = parser.parse_args()
    print("| suite | outcome | events | processes | bytes an event | wall | CPU | wall × | CPU × |")
    print("|---|---|---|---|---|---|---|---|---|")
    good = True
    for suite in real_suites.quick() if options.quick else real_suites.full():
        if options.only and not any(part in suite.name for part in options.only):
            continue
        if reason := suite.missing():
            print(f"| {suite.name} | {reason} | | | | | | | |", flush=True)
            continue
        row, same = measure(suite, options.rounds)
        good = good and same
        print(row, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
