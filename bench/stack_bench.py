"""ns per call stack of 20 frames: the shim's stack capture and glibc's backtrace(), from the same process.

python bench/stack_bench.py [CAPTURES]; the rows are explained in stack_bench.c.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PRELOAD = HERE.parent / "preload"
SHIM_FLAGS = ["-std=gnu11", "-O2", "-g", "-fPIC", "-fno-builtin", "-ftls-model=initial-exec", "-fno-omit-frame-pointer"]
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


def main() -> None:
    captures = sys.argv[1] if len(sys.argv) > 1 else "1000000"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([str(build(Path(folder))), captures], capture_output=True, text=True, check=True)
    print(f"{'':12}{'ns/stack':>10}{'memo hits':>12}{'steps':>8}")
    for line in done.stdout.splitlines():
        name, ns, hits, steps = line.split("\t")
        print(f"{name:12}{float(ns):10.1f}{float(hits):12.1%}{float(steps):8.2f}")


if __name__ == "__main__":
    main()
