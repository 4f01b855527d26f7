"""Symbolizing against `addr2line -i -f -C`: the same addresses, a cold process each, rounds in turn, medians.

    python bench/symbols_bench.py [--addresses 2000] [--rounds 7] [--source ../shared/bench/bigcc.cpp]
                                  [--binary PATH]...

Binaries: the C++ source built with -O2 -g, the C library with its separate debug file (libc6-dbg), and each `--binary`.
Whole-process times, so ours carry Python's start and imports (shown in a row of their own). `cache` is a run that finds
what an earlier one left on disk. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from elftools.elf.elffile import ELFFile

LIBC = Path("/lib/x86_64-linux-gnu/libc.so.6")
OURS = """
import sys
from pathlib import Path
from heapledger.tracer.symbols import Symbolizer
binary, addresses, cache = sys.argv[1:]
offsets = [int(line, 16) for line in open(addresses)]
with Symbolizer(cache_dir=Path(cache) if cache else None, compiled=True) as symbols:
    for frames in symbols.resolve(binary, offsets):
        for frame in frames:
            print(f"{frame.function}\\n{frame.file}:{frame.line}")
"""


def text_addresses(binary: Path, count: int) -> list[int]:
    """`count` random addresses of .text, the same ones each time."""
    with binary.open("rb") as stream:
        text = ELFFile(stream).get_section_by_name(".text")
        start, size = text["sh_addr"], text["sh_size"]
    chosen = random.Random(binary.name)
    return [start + chosen.randrange(size) for _ in range(count)]


def timed(command: list[str], stdin: Path | None) -> tuple[float, float]:
    """(wall, CPU) seconds of a whole process; its output goes to a file, as a pipe's reader would cost time too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output, (stdin or Path(os.devnull)).open() as source:
        subprocess.run(command, stdin=source, stdout=output, check=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(binary: Path, arguments: argparse.Namespace, folder: Path) -> None:
    addresses = folder / "addresses"
    addresses.write_text("".join(f"{a:#x}\n" for a in text_addresses(binary, arguments.addresses)))
    cache = str(folder / f"cache-{binary.name}")
    ours = [sys.executable, "-c", OURS, str(binary), str(addresses)]
    commands: dict[str, tuple[list[str], Path | None]] = {
        "addr2line -i -f -C": (["addr2line", "-i", "-f", "-C", "-e", str(binary)], addresses),
        "heapledger": ([*ours, ""], None),
        "heapledger, cache": ([*ours, cache], None),
        "(Python and imports alone)": ([sys.executable, "-c", "import heapledger.tracer.symbols._compiled"], None),
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(arguments.rounds + 1):
        for name, (command, stdin) in commands.items():
            result = timed(command, stdin)
            if turn:  # the first round reads the files into the page cache and fills ours
                runs[name].append(result)
    base = statistics.median(wall for wall, _ in runs["addr2line -i -f -C"])
    for name, results in runs.items():
        wall = statistics.median(wall for wall, _ in results)
        cpu = statistics.median(cpu for _, cpu in results)
        size = binary.stat().st_size / 1e6
        print(f"| {binary.name} ({size:.1f} MB) | {name} | {wall * 1e3:.0f} | {cpu * 1e3:.0f} | {wall / base:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--addresses", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--source", type=Path, default=Path("../shared/bench/bigcc.cpp"))
    parser.add_argument("--binary", type=Path, action="append", default=[])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        binaries = []
        if arguments.source.is_file():
            binaries.append(folder / arguments.source.stem)
            subprocess.run(
                ["g++", "-std=c++17", "-O2", "-g", "-o", str(binaries[0]), str(arguments.source)], check=True
            )
        binaries += [path for path in (LIBC, *arguments.binary) if path.is_file()]
        print(f"{arguments.addresses} addresses, median of {arguments.rounds} rounds\n")
        print("| binary | tool | wall ms | CPU ms | wall / addr2line |\n|---|---|---|---|---|")
        for binary in binaries:
            measure(binary, arguments, folder)


if __name__ == "__main__":
    main()
