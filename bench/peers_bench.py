"""heapledger, heaptrack and no tracer at all, side by side: wall time, CPU time of the whole tree, bytes an event.

    python bench/peers_bench.py [--rounds 3] [--allocs 2500000]

Each workload runs under each tracer in turn (A B C A B C ...), so that a drift of the machine hits all alike; the
medians are printed as a Markdown table. CPU time is what wait4 reports for the tracer and everything it waited for: the
program, its collector and its helpers. heaptrack runs with --raw: Debian's 1.4 runs out of memory on some of these
otherwise. Programs: ../shared/bench (allocbench.cpp, pyjson.py).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = Path(__file__).resolve().parents[2] / "shared" / "bench"


@dataclass
class Figures:
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    bytes_on_disk: int = 0


def measure(argv: list[str], env: dict[str, str]) -> tuple[float, float, str]:
    """Runs argv to its end: wall seconds, CPU seconds of the tree, stderr."""
    with tempfile.TemporaryFile() as errors:
        start = time.monotonic()
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=errors, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        text = errors.read().decode(errors="replace")
    if process.returncode != 0:
        raise SystemExit(f"{argv} ended with {process.returncode}:\n{text[-2000:]}")
    return wall, usage.ru_utime + usage.ru_stime, text


def tracers(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Name → (what stands before the command, glob of the files it leaves)."""
    heapledger = str(Path(sys.executable).with_name("heapledger"))
    found = {
        "none": ([], ""),
        "heapledger": (
            [heapledger, "run", "-q", "--no-symbols", "-o", str(folder / "t.heapledger"), "--"],
            "t.heapledger*",
        ),
    }
    if shutil.which("heaptrack"):
        found["heaptrack --raw"] = (["heaptrack", "--raw", "-o", str(folder / "ht")], "ht*")
    return found


def workloads(folder: Path, allocs: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    binary = folder / "allocbench"
    source = str(PROGRAMS / "allocbench.cpp")
    subprocess.run(["g++", "-O2", "-g", "-fomit-frame-pointer", "-pthread", source, "-o", str(binary)], check=True)
    return {
        "allocbench, 1 thread": ([str(binary), str(allocs), "1"], {}),
        "allocbench, 4 threads": ([str(binary), str(allocs), "4"], {}),
        "python json": (["/usr/bin/python3", str(PROGRAMS / "pyjson.py")], {"PYTHONMALLOC": "malloc"}),
    }


def events_of(trace: Path) -> int:
    text = subprocess.run(
        [str(Path(sys.executable).with_name("heapledger")), "info", "--format", "json", str(trace)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = re.search(r'"events":\s*(\d+)', text)
    return int(found[1]) if found else 0


def run(rounds: int, allocs: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        known = tracers(folder)
        print("| workload | tracer | wall s | × | CPU s | × | added ns of CPU an event | bytes an event |")
        print("|---|---|---|---|---|---|---|---|")
        for name, (argv, extra) in workloads(folder, allocs).items():
            figures = {tracer: Figures() for tracer in known}
            events = 0
            for _ in range(rounds):
                for tracer, (prefix, left) in known.items():
                    wall, cpu, _ = measure([*prefix, *argv], {**os.environ, **extra})
                    figures[tracer].wall.append(wall)
                    figures[tracer].cpu.append(cpu)
                    files = list(folder.glob(left)) if left else []
                    figures[tracer].bytes_on_disk = sum(f.stat().st_size for f in files)
                    if tracer == "heapledger":
                        events = events_of(folder / "t.heapledger")
                    for file in files:
                        file.unlink()
            report(name, figures, events)


def report(name: str, figures: dict[str, Figures], events: int) -> None:
    base_wall = statistics.median(figures["none"].wall)
    base_cpu = statistics.median(figures["none"].cpu)
    for tracer, found in figures.items():
        wall, cpu = statistics.median(found.wall), statistics.median(found.cpu)
        added = f"{(cpu - base_cpu) / events * 1e9:.0f}" if events and tracer != "none" else ""
        size = f"{found.bytes_on_disk / events:.2f}" if events and found.bytes_on_disk else ""
        print(
            f"| {name} | {tracer} | {wall:.2f} | {wall / base_wall:.2f} | {cpu:.2f} | {cpu / base_cpu:.2f} "
            f"| {added} | {size} |",
            flush=True,
        )
    print(f"| {name} | ({events:,} events) | | | | | | |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--allocs", type=int, default=2_500_000)
    arguments = parser.parse_args()
    run(arguments.rounds, arguments.allocs)
