"""ns per call stack of 20 frames: the shim's stack capture and glibc's backtrace(), from the same process.

python bench/stack_bench.py [CAPTURES]   the rows are explained in stack_bench.c
python bench/stack_bench.py -- CMD       a program instead: CPU ns an allocator call, free included, that the capture
                                         adds (stack_preload.c: nothing is recorded); of several runs the least
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PRELOAD = HERE.parent / "preload"
SHIM_FLAGS = ["-std=gnu11", "-O2", "-g", "-fPIC", "-fno-builtin", "-ftls-model=initial-exec", "-fno-omit-frame-pointer"]
ROUNDS = 5
#: Twenty frames that have no frame pointers, and keep their frames.
BENCH_FLAGS = ["-std=gnu11", "-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls"]


def build(folder: Path) -> Path:
    """The benchmark with the unwinder in it, compiled as the shim compiles it."""
    sources = [*PRELOAD.glob("stack*.c"), *PRELOAD.glob("unwind*.c"), HERE.parent / "tests/native/stack_host.c"]
    subprocess.run(["gcc", *SHIM_FLAGS, "-c", *map(str, sources)], cwd=folder, check=True)
    program = folder / "stack_bench"
    objects = [str(path) for path in folder.glob("*.o")]
    subprocess.run(["gcc", *BENCH_FLAGS, str(HERE / "stack_bench.c"), *objects, "-o", str(program), "-ldl"], check=True)
    return program


def build_preload(folder: Path) -> Path:
    """Hooks that capture and do nothing else, around the same objects."""
    library = folder / "stacks.so"
    objects = [str(path) for path in folder.glob("*.o")]
    flags = [*SHIM_FLAGS, "-fno-optimize-sibling-calls", "-shared"]
    subprocess.run(["gcc", *flags, str(HERE / "stack_preload.c"), *objects, "-o", str(library)], check=True)
    return library


def measure(library: Path, command: list[str], stacks: str) -> dict[str, int]:
    """The counters of the run that took the least CPU time."""
    runs = []
    for _ in range(ROUNDS):
        env = {**os.environ, "LD_PRELOAD": str(library), "STACKS": stacks, "PYTHONMALLOC": "malloc"}
        done = subprocess.run(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True
        )
        line = [line for line in done.stderr.splitlines() if line.startswith("STACKS ")][-1]
        runs.append({name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)})
    return min(runs, key=lambda run: run["cpu_ns"])


def program(folder: Path, command: list[str]) -> None:
    """Prints what the capture costs the first process of a command."""
    build(folder)
    library = build_preload(folder)
    off, on = measure(library, command, "0"), measure(library, command, "1")
    captures, missed = on["captures"], on["captures"] - on["hits"]
    print(f"{on['events']:,} calls, {(on['cpu_ns'] - off['cpu_ns']) / on['events']:.1f} ns each")
    print(
        f"hits {on['hits'] / captures:.1%}, rejoined {on['rejoined'] / captures:.1%},",
        f"walked {on['walked'] / captures:.2%}",
        end=", ",
    )
    print(f"{on['frames'] / max(missed, 1):.1f} steps a miss; {on['full']} with all registers, {on['lost']} lost")


def main() -> None:
    if "--" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            program(Path(folder), sys.argv[sys.argv.index("--") + 1 :])
        return
    captures = sys.argv[1] if len(sys.argv) > 1 else "1000000"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([str(build(Path(folder))), captures], capture_output=True, text=True, check=True)
    print(f"{'':12}{'ns/stack':>10}{'memo hits':>12}{'steps':>8}")
    for line in done.stdout.splitlines():
        name, ns, hits, steps = line.split("\t")
        print(f"{name:12}{float(ns):10.1f}{float(hits):12.1%}{float(steps):8.2f}")


if __name__ == "__main__":
    main()
