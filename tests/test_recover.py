"""Crashes of the program, of the collector, of both: what is left becomes a trace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from heapledger.errors import SpoolError, UsageError
from heapledger.store.events import Events, Kind
from heapledger.store.reader import Trace
from heapledger.tracer.recover import recover

#: Prints where the spool is and its own pid, allocates up to 2,000 blocks of 500 bytes a second, 2,500 in all.
PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(void) {
    setvbuf(stdout, NULL, _IONBF, 0);
    printf("%s %d\n", getenv("HEAPLEDGER_SPOOL"), (int)getpid());
    for (int i = 0; i < 2500; i++) { if (!malloc(500)) return 1; usleep(500); }
    puts("done");
    return 7;
}
"""


class Crash:
    """A traced program in mid-run."""

    def __init__(self, folder: Path) -> None:
        (folder / "slow.c").write_text(PROGRAM)
        subprocess.run(["gcc", "-g", "-o", folder / "slow", folder / "slow.c"], check=True)
        self.trace = folder / "trace.heapledger"
        argv = [sys.executable, "-m", "heapledger", "run", "-o", str(self.trace), "--", str(folder / "slow")]
        self.collector = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.collector.stdout is not None
        spool, pid = self.collector.stdout.readline().split()
        self.spool, self.pid = Path(spool), int(pid)

    def kill_collector(self) -> None:
        self.collector.send_signal(signal.SIGKILL)
        self.collector.wait()

    def rest(self) -> str:
        """What the program still prints."""
        assert self.collector.stdout is not None
        return self.collector.stdout.read()

    def close(self) -> None:
        self.collector.kill()
        self.collector.wait()
        assert self.collector.stdout is not None
        self.collector.stdout.close()


@pytest.fixture
def crash(tmp_path: Path) -> Iterator[Crash]:
    crash = Crash(tmp_path)
    yield crash
    crash.close()
    shutil.rmtree(crash.spool, ignore_errors=True)


def blocks(trace: Trace) -> Events:
    process = trace.process()
    events = Events.concat(list(trace.events(process.id)))
    assert np.all(events.seq[1:] > events.seq[:-1])
    return events.take((events.kind == Kind.MALLOC) & (events.size == 500))


def test_the_program_runs_on_when_the_collector_is_killed(crash: Crash) -> None:
    time.sleep(0.5)
    crash.kill_collector()
    assert crash.rest() == "done\n"
    result = recover(crash.spool)
    assert result.continued
    assert result.trace == crash.trace
    assert not crash.spool.exists()
    with Trace(crash.trace) as trace:
        process = trace.process()
        assert (process.end, process.exit_status) == ("exit", 7)
        events = blocks(trace)
        assert len(events) == 2500, "2,500 blocks fit the ring: what the collector had taken is still there"
        assert process.lost == 0
        assert process.events == sum(len(part) for part in trace.events(process.id))
        assert trace.session.end_ns is not None or trace.session.collector["recovered"]
        assert np.all(np.diff(events.time.astype(np.int64)) >= 0)
        assert 1.2e9 < int(events.time[-1]) - int(events.time[0]) < 20e9
        frame = trace.stack(process.id, int(events.stack[-1]))[0]
        assert (frame.function, os.path.basename(frame.file or "")) == ("main", "slow.c")


def test_both_killed_leave_what_had_happened(crash: Crash) -> None:
    time.sleep(0.5)
    crash.kill_collector()
    os.kill(crash.pid, signal.SIGKILL)
    assert crash.rest() == ""
    recover(crash.spool, symbols=False)
    with Trace(crash.trace) as trace:
        process = trace.process()
        assert process.end == "vanished"
        assert 100 < len(blocks(trace)) < 2500
        assert process.lost <= 1, "at most the call that was in progress"


def test_a_new_name_leaves_the_unfinished_trace_alone(crash: Crash, tmp_path: Path) -> None:
    time.sleep(0.5)
    crash.kill_collector()
    crash.rest()
    before = crash.trace.read_bytes()
    result = recover(crash.spool, tmp_path / "other.heapledger", symbols=False, keep=True)
    assert crash.trace.read_bytes() == before
    assert crash.spool.exists()
    with Trace(result.trace) as trace:
        assert len(blocks(trace)) == 2500
    crash.trace.unlink()
    for extra in tmp_path.glob(f"{crash.trace.name}-*"):
        extra.unlink()
    again = recover(crash.spool, tmp_path / "third.heapledger", symbols=False)
    assert not again.continued
    with Trace(again.trace) as trace:
        assert len(blocks(trace)) == 2500
        assert trace.session.source == "recover"
        assert trace.session.command[0].endswith("/slow")


def test_a_spool_in_use_is_refused(crash: Crash) -> None:
    time.sleep(0.5)
    with pytest.raises(UsageError, match="is being collected by process"):
        recover(crash.spool)
    assert crash.rest() == "done\n"
    crash.collector.wait()
    with Trace(crash.trace) as trace:
        assert (len(blocks(trace)), trace.process().lost) == (2500, 0)


def test_damaged_pieces_are_skipped_and_named(crash: Crash, tmp_path: Path) -> None:
    time.sleep(0.5)
    crash.kill_collector()
    crash.rest()
    (folder,) = crash.spool.glob(f"{crash.pid}.*")
    os.truncate(folder / "ring.0", 100)
    (crash.spool / "77.0").mkdir()
    (crash.spool / "77.0" / "control").write_bytes(b"junk" * 2000)
    with (folder / "log").open("ab") as file:
        file.write(b"M\tx\ty\n\xff\xfe\tz\n")
    result = recover(crash.spool, symbols=False)
    assert any("77.0" in note for note in result.totals.notes)
    with Trace(crash.trace) as trace:
        notes = " ".join(trace.process().notes)
        assert "ring 0 cannot be read" in notes
        assert "not understood" in notes
        assert trace.process().lost > 0


def test_a_trace_that_never_got_its_first_row_is_made_anew(crash: Crash) -> None:
    crash.kill_collector()
    crash.rest()
    crash.trace.write_bytes(b"")
    for extra in crash.trace.parent.glob(f"{crash.trace.name}-*"):
        extra.unlink()
    assert not recover(crash.spool, symbols=False).continued
    with Trace(crash.trace) as trace:
        assert len(blocks(trace)) == 2500


@pytest.mark.parametrize("make", [True, False])
def test_what_is_not_a_spool_is_refused(
    tmp_path: Path, make: bool, heapledger: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    folder = tmp_path / "folder"
    if make:
        folder.mkdir()
    with pytest.raises(SpoolError):
        recover(folder)
    result = heapledger("recover", folder)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 2
    assert re.search(r"spool", result.stderr)
