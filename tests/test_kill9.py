"""`kill -9` of the program, of the collector, of both, at random moments: no call that has returned is missing.

The oracle is the program itself (tests/native/count_calls.c): it counts its calls, after each has returned, in a shared
file.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from heapledger.store.events import Kind
from heapledger.store.reader import Trace
from heapledger.tracer.recover import recover
from heapledger.tracer.spill import folder_of

VICTIMS = ("program", "collector", "both", "collector first")


def kill_and_count(folder: Path, program: Path, victim: str, rng: random.Random) -> tuple[list[int], list[int], Path]:
    """(calls that returned, calls in the trace) by thread, and the trace."""
    folder.mkdir()
    threads, bursts = rng.choice([1, 1, 2]), rng.choice([0, 1])
    counts, trace = folder / "counts", folder / "trace.heapledger"
    argv = ["-m", "heapledger", "run", "-q", "--no-symbols", "--no-residency", "-o", str(trace), "--", str(program)]
    argv += [str(counts), str(threads), str(bursts)]
    collector = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert collector.stdout is not None
    spool, pid = collector.stdout.readline().split()
    try:
        time.sleep(rng.uniform(0.01, 0.3))
        if victim == "collector first":
            collector.kill()
            time.sleep(rng.uniform(0, 0.05))
        if victim == "collector":
            collector.kill()
            time.sleep(rng.uniform(0.1, 0.3))
        os.kill(int(pid), signal.SIGKILL)
        if victim == "both":
            collector.kill()
        collector.wait(60)
        collector.stdout.read()  # until the program is gone
    finally:
        collector.kill()
        collector.stdout.close()
    if Path(spool).exists():
        recover(Path(spool), None if trace.exists() else trace, symbols=False)
    else:
        assert collector.returncode == -signal.SIGKILL
    assert not folder_of(trace, Path(spool)).exists()
    shutil.rmtree(spool, ignore_errors=True)
    data = counts.read_bytes()
    done = [struct.unpack_from("<Q", data, 64 * t)[0] for t in range(threads)]
    return done, calls_in(trace, threads), trace


def calls_in(path: Path, threads: int) -> list[int]:
    calls, events, before = [0] * threads, 0, 0
    with Trace(path) as trace:
        process = trace.process()
        for block in trace.events(process.id):
            assert block.seq[0] > before
            assert np.all(block.seq[1:] > block.seq[:-1])
            before = block.seq[-1]
            events += len(block)
            sizes = block.size[block.kind == Kind.MALLOC]
            for thread in range(threads):
                calls[thread] += int(np.count_nonzero(sizes == 700 + thread))
        assert events == process.events
        assert process.lost == 0
    return calls


def check(folder: Path, program: Path, victim: str, seed: int) -> None:
    done, seen, trace = kill_and_count(folder, program, victim, random.Random(seed))
    for calls, found in zip(done, seen, strict=True):
        assert calls <= found <= calls + 1, f"{victim}, seed {seed}"
    if victim == "program":
        with Trace(trace) as opened:
            assert (opened.process().end, opened.process().exit_status) == ("signal", -signal.SIGKILL)
            assert opened.session.end_ns is not None
    shutil.rmtree(folder)


@pytest.mark.parametrize("victim", VICTIMS)
def test_no_call_that_has_returned_is_missing(tmp_path: Path, native: Callable[..., Path], victim: str) -> None:
    program = native("count_calls.c", "-pthread")
    for seed in range(2):
        check(tmp_path / "run", program, victim, seed)


@pytest.mark.slow
def test_no_call_is_missing_after_a_hundred_kills(tmp_path: Path, native: Callable[..., Path]) -> None:
    program = native("count_calls.c", "-pthread")
    for seed in range(100):
        check(tmp_path / "run", program, VICTIMS[seed % len(VICTIMS)], 1000 + seed)
