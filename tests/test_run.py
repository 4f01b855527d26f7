"""`heapledger run` on real programs: they behave as if untraced, and the trace holds what they did."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from heapledger.store.events import Events, Kind
from heapledger.store.reader import Trace
from heapledger.store.schema import Process

Native = Callable[..., Path]
HEAPLEDGER = [sys.executable, "-m", "heapledger"]


@pytest.fixture
def known(native: Native) -> str:
    return str(native("run_known.c", "-pthread"))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace.heapledger"


def run(trace: Path, *argv: str, options: tuple[str, ...] = (), **settings: object) -> subprocess.CompletedProcess[str]:
    """Runs a command under heapledger; symbols are left out unless asked for."""
    kept: dict[str, object] = {"capture_output": True, "text": True, "timeout": 60, **settings}
    command = [*HEAPLEDGER, "run", "-o", str(trace), "--no-symbols", *options, "--", *argv]
    return subprocess.run(command, check=False, **kept)  # type: ignore[call-overload, no-any-return]


def start(trace: Path, *argv: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*HEAPLEDGER, "run", "-o", str(trace), "--no-symbols", *options, "--", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def all_events(trace: Trace, process: Process) -> Events:
    return Events.concat(list(trace.events(process.id)))


def check_complete(trace: Trace) -> None:
    """What holds for every undisturbed run: nothing lost, in order, all pages of the last look accounted for."""
    for process in trace.processes():
        assert process.lost == 0, process.notes
        assert process.notes == [], process.exe
        events = all_events(trace, process)
        assert len(events) == process.events
        assert np.all(events.seq[1:] > events.seq[:-1])
        assert np.all((events.seq_exit > events.seq) | (events.seq_exit == 0))
        for snapshot in trace.snapshots(process.id):
            if snapshot.reason != "start":
                assert snapshot.rss_bytes == snapshot.pagemap_bytes
                assert snapshot.rss_bytes == sum(vma.rss_bytes for vma in trace.vmas(snapshot.id))


def test_output_and_status_are_the_programs(trace: Path) -> None:
    argv = ["sh", "-c", "echo out; echo err >&2; cat; exit 42"]
    plain = subprocess.run(argv, input="in\n", capture_output=True, text=True, check=False)
    traced = run(trace, *argv, options=("-q",), input="in\n")
    assert (traced.returncode, traced.stdout, traced.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_every_call_is_there_to_the_byte(trace: Path, known: str) -> None:
    result = run(trace, known, "blocks", "300")
    printed = [(int(size), int(address, 16)) for size, address in (line.split() for line in result.stdout.splitlines())]
    with Trace(trace) as opened:
        check_complete(opened)
        process = opened.process()
        events = all_events(opened, process)
        mallocs = [
            (int(size), int(address))
            for kind, size, address in zip(events.kind, events.size, events.addr, strict=True)
            if kind == Kind.MALLOC and 1000 <= size < 1300
        ]
        assert mallocs == printed
        freed = set(events.addr[events.kind == Kind.FREE].tolist())
        assert {address for _, address in printed[1::2]} <= freed
        words = events.word[(events.kind == Kind.MALLOC) & (events.size >= 1000) & (events.size < 1300)]
        assert [int(w) & ~7 for w in words] == [max(32, (size + 23) & ~15) for size, _ in printed]
        assert events.kind[-1] == Kind.EXIT
        assert events.kind[0] == Kind.THREAD_START
        assert (process.start, process.end, process.exit_status) == ("start", "exit", 0)
        assert process.exe == known
        assert process.argv == [known, "blocks", "300"]


def test_times_rise_and_span_the_run(trace: Path, known: str) -> None:
    begun = time.monotonic()
    run(trace, known, "peak", "8")
    with Trace(trace) as opened:
        events = all_events(opened, opened.process())
        assert np.all(np.diff(events.time.astype(np.int64)) >= 0)
        span = int(events.time[-1]) - int(events.time[0])
        assert 0.55e9 <= span <= (time.monotonic() - begun) * 1e9
        assert opened.session.end_ns is not None
        assert int(events.time[-1]) < opened.session.end_ns


def test_threads_are_merged_in_the_order_of_their_calls(trace: Path, known: str) -> None:
    """Replayed in the order of the trace, no address is handed out twice: reuse never comes before release."""
    run(trace, known, "threads", "6")
    with Trace(trace) as opened:
        check_complete(opened)
        process = opened.process()
        events = all_events(opened, process)
        live: dict[int, int] = {}
        for kind, address, thread in zip(
            events.kind.tolist(), events.addr.tolist(), events.thread.tolist(), strict=True
        ):
            if kind == Kind.FREE and address:
                del live[address]
            elif kind in (Kind.MALLOC, Kind.CALLOC):
                assert address not in live
                live[address] = thread
        threads = opened.threads(process.id)
        assert [t.number for t in threads] == list(range(13))
        counts = np.bincount(events.thread[(events.kind == Kind.MALLOC) & (events.size < 216)], minlength=13)
        assert all(count >= 20_000 for count in counts[1:])
        assert threads[0].tid == process.pid
        assert len({t.tid for t in threads}) == 13
        assert all(t.end_ns is not None and t.end_ns >= (t.start_ns or 0) for t in threads[1:])
        assert all(t.thread_pointer for t in threads)


def test_the_peak_is_caught_in_the_middle(trace: Path, known: str) -> None:
    run(trace, known, "peak", "64")
    with Trace(trace) as opened:
        check_complete(opened)
        process = opened.process()
        peak, end = opened.snapshot(process.id, "peak"), opened.snapshot(process.id, "exit")
        assert peak is not None
        assert end is not None
        assert peak.rss_bytes > 64 << 20 > end.rss_bytes
        assert peak.consistent
        assert end.consistent
        assert [s.reason for s in opened.snapshots(process.id)].count("peak") == 1
        events = all_events(opened, process)
        big = np.flatnonzero((events.kind == Kind.MALLOC) & (events.size == 64 << 20))[0]
        freed = np.flatnonzero((events.kind == Kind.FREE) & (events.addr == events.addr[big]))[0]
        assert events.seq[big] < peak.seq <= events.seq[freed]
        samples = opened.samples(process.id)
        assert samples["rss"].max() > 64 << 20
        assert len(samples["rss"]) >= 5


def test_an_end_that_is_the_highest_point_is_also_the_peak(trace: Path, known: str) -> None:
    run(trace, known, "blocks", "2000")
    with Trace(trace) as opened:
        process = opened.process()
        peak, end = opened.snapshot(process.id, "peak"), opened.snapshot(process.id, "exit")
        assert peak is not None
        assert end is not None
        assert (peak.rss_bytes, peak.seq) == (end.rss_bytes, end.seq)


def test_snapshots_in_mid_run_do_not_disturb(trace: Path, known: str) -> None:
    result = run(trace, known, "waits", "600", options=("--snapshot-every", "0.02"))
    assert (result.returncode, result.stdout) == (0, "interrupted 0\n")
    with Trace(trace) as opened:
        requested = [s for s in opened.snapshots(opened.process().id) if s.reason == "request"]
        assert len(requested) > 10
        assert sum(s.consistent for s in requested) > len(requested) // 2


def test_a_tree_of_processes_is_followed_through_fork_and_exec(trace: Path, tmp_path: Path) -> None:
    script = "ls / > /dev/null; (exit 3); exec sh -c 'exit 5'"
    result = run(trace, "sh", "-c", script)
    assert result.returncode == 5
    with Trace(trace) as opened:
        check_complete(opened)
        rows = opened.processes()
        shell = next(p for p in rows if p.start == "start")
        assert (shell.parent_id, shell.end) == (None, "exec")
        name = os.path.basename(os.path.realpath("/bin/sh"))
        found = {(os.path.basename(p.exe), p.start, p.exit_status): p for p in rows if p is not shell}
        assert found[name, "fork", 3].fork_seq is not None
        last = found[name, "exec", 5]
        assert (last.pid, last.parent_id) == (shell.pid, shell.id)
        listed = next(p for key, p in found.items() if key[0] == "ls")
        ancestors = {p.id: p.parent_id for p in rows}
        parent = ancestors[listed.id]
        while parent not in (None, shell.id):
            parent = ancestors[parent]
        assert parent == shell.id


def test_an_exec_that_bypasses_libc_is_noticed(trace: Path) -> None:
    code = (
        "import ctypes, os; c = ctypes.CDLL(None)\n"
        "def block(items): return (ctypes.c_char_p * (len(items) + 1))(*items, None)\n"
        "env = block([f'{k}={v}'.encode() for k, v in os.environ.items()])\n"
        "c.syscall(59, b'/bin/sh', block([b'sh', b'-c', b'exit 6']), env)"
    )
    assert run(trace, sys.executable, "-c", code).returncode == 6
    with Trace(trace) as opened:
        first, second = sorted(opened.processes(), key=lambda p: p.image)
        assert (first.start, first.end, second.start, second.parent_id) == ("start", "exec", "exec", first.id)
        assert second.exit_status == 6


def test_gcc_and_its_children_are_followed(trace: Path, tmp_path: Path) -> None:
    source = tmp_path / "x.c"
    source.write_text("int main(void) { return 0; }\n")
    assert run(trace, "gcc", "-o", str(tmp_path / "x"), str(source)).returncode == 0
    assert subprocess.run([tmp_path / "x"], check=False).returncode == 0
    with Trace(trace) as opened:
        check_complete(opened)
        names = {os.path.basename(p.exe) for p in opened.processes()}
        assert {"cc1", "as"} <= {re.sub(r"^x86_64-linux-gnu-", "", name) for name in names}
        assert all(opened.snapshot(p.id, "exit") for p in opened.processes() if p.end == "exit")


@pytest.mark.parametrize(
    "argv",
    [
        ["git", "-C", str(Path(__file__).parent), "log", "--stat", "-n", "20"],
        [sys.executable, "-c", "import json; print(len(json.dumps(list(range(50000)))))"],
        ["perl", "-e", "my %h = map { $_ => 'x' x $_ } 1..500; print scalar(keys %h), qq(\\n)"],
    ],
    ids=["git", "python", "perl"],
)
def test_real_programs_give_the_same_output_and_a_complete_trace(trace: Path, argv: list[str]) -> None:
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    environment = {**os.environ, "PYTHONMALLOC": "malloc"}
    plain = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    traced = run(trace, *argv, env=environment)
    assert (traced.returncode, traced.stdout) == (plain.returncode, plain.stdout)
    with Trace(trace) as opened:
        check_complete(opened)
        assert opened.process().events > 1000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_killed_by_a_signal_it_dies_by_the_same(trace: Path, number: signal.Signals) -> None:
    result = run(trace, "sh", "-c", f"kill -{int(number)} $$")
    assert result.returncode == -number
    with Trace(trace) as opened:
        process = opened.processes()[0]
        assert (process.end, process.exit_status) == ("signal", -number)
        assert process.lost == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_signals_sent_to_us_reach_the_program(trace: Path, known: str, number: signal.Signals) -> None:
    with start(trace, known, "handles", "20000") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (40, "caught\n")
    with Trace(trace) as opened:
        assert (opened.process().end, opened.process().exit_status) == ("_exit", 40)


def test_a_signal_that_was_ignored_stays_ignored(trace: Path) -> None:
    script = "kill -HUP $$; echo alive"
    argv = ["sh", "-c", f"trap '' HUP; exec {sys.executable} -m heapledger run -q -o {trace} -- sh -c '{script}'"]
    result = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "alive\n")


def test_sigusr1_takes_a_snapshot(trace: Path, known: str) -> None:
    with start(trace, known, "handles", "20000") as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    with Trace(trace) as opened:
        assert opened.snapshot(opened.process().id, "request") is not None


def test_a_child_that_outlives_the_program_is_left_running(trace: Path) -> None:
    begun = time.monotonic()
    script = "sleep 30 > /dev/null 2>&1 & echo $!"
    result = run(trace, "sh", "-c", script, options=("--wait-children", "0.5"))
    assert time.monotonic() - begun < 10
    child = int(result.stdout)
    assert Path(f"/proc/{child}/comm").read_text() == "sleep\n"
    os.kill(child, signal.SIGKILL)
    with Trace(trace) as opened:
        images = sorted((p.image, p.end) for p in opened.processes() if p.pid == child)
        assert images[-1][1] == "running"


def test_a_trace_is_overwritten_and_any_other_file_is_not(trace: Path) -> None:
    assert run(trace, "true").returncode == 0
    assert run(trace, "sh", "-c", "exit 4").returncode == 4
    with Trace(trace) as opened:
        assert opened.process().exit_status == 4
    trace.write_text("precious")
    result = run(trace, "touch", str(trace.parent / "started"))
    assert result.returncode == 2
    assert "not a trace" in result.stderr
    assert trace.read_text() == "precious"
    assert not (trace.parent / "started").exists(), "refused before the program starts"


def test_without_a_name_the_trace_gets_one_from_program_and_pid(tmp_path: Path) -> None:
    command = [*HEAPLEDGER, "run", "--no-symbols", "sh", "-c", "echo $$"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    name = f"heapledger.sh.{int(result.stdout)}.heapledger"
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert name in result.stderr


def test_a_folder_that_is_not_there_is_refused_before_the_start(tmp_path: Path) -> None:
    result = run(tmp_path / "no" / "trace", "touch", str(tmp_path / "started"))
    assert result.returncode == 2
    assert "no folder" in result.stderr
    assert not (tmp_path / "started").exists()


def test_options_of_the_program_are_not_taken_for_ours(trace: Path) -> None:
    command = [*HEAPLEDGER, "run", "-o", str(trace), "--no-symbols", "echo", "-q", "--help"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "-q --help\n"


def test_no_residency_takes_no_snapshots(trace: Path) -> None:
    run(trace, "true", options=("--no-residency",))
    with Trace(trace) as opened:
        assert {s.reason for s in opened.snapshots(opened.process().id)} <= {"start"}


def test_call_stacks_have_names_files_and_lines(trace: Path, known: str) -> None:
    command = [*HEAPLEDGER, "run", "-o", str(trace), "--", known, "blocks", "10"]
    subprocess.run(command, capture_output=True, check=True)
    with Trace(trace) as opened:
        process = opened.process()
        events = all_events(opened, process)
        at = np.flatnonzero((events.kind == Kind.MALLOC) & (events.size == 1005))[0]
        stack = opened.stack(process.id, int(events.stack[at]))
        assert [frame.function for frame in stack[:2]] == ["blocks", "main"]
        source = (Path(__file__).parent / "native" / "run_known.c").read_text().splitlines()
        assert (stack[0].file or "").endswith("run_known.c")
        assert "malloc(1000 + i)" in source[(stack[0].line or 0) - 1]


def test_nothing_is_left_in_shared_memory(trace: Path) -> None:
    before = set(Path("/dev/shm").glob("heapledger-*"))
    result = run(trace, "sh", "-c", "env | grep ^HEAPLEDGER_SPOOL")
    spool = Path(result.stdout.strip().partition("=")[2])
    assert spool.name.startswith("heapledger-")
    assert not spool.exists()
    assert spool not in before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_does_not_touch_the_program(small_disk: Path, known: str, tmp_path: Path) -> None:
    trace = small_disk / "trace.heapledger"
    result = run(trace, known, "threads", "20", timeout=120)
    assert result.returncode == 0
    assert "the disk is full" in result.stderr
    spools = re.findall(r"recover (\S+)\)", result.stderr)
    for spool in spools:
        shutil.rmtree(spool, ignore_errors=True)
    for part in filter(Path.is_file, small_disk.iterdir()):
        shutil.copy(part, tmp_path / part.name)
    with Trace(tmp_path / trace.name) as opened:
        assert opened.session.command[0] == known
        written = sum(len(part) for process in opened.processes() for part in opened.events(process.id))
        assert written == sum(process.events for process in opened.processes())
        assert not opened.damaged


def test_starting_costs_little(trace: Path) -> None:
    """`heapledger run true` takes well below half a second of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(trace, "true", options=("-q",))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6


@pytest.mark.parametrize("at_once", [1, 8])
def test_thousands_of_short_threads_share_rings_and_lose_nothing(native: Native, trace: Path, at_once: int) -> None:
    program, threads, ring_bytes = native("run_short_threads.c", "-pthread"), 10_000, 68 << 10
    result = run(trace, str(program), str(threads), str(at_once))
    assert result.returncode == 0, result.stderr
    with Trace(trace) as opened:
        check_complete(opened)
        process = opened.process()
        events = all_events(opened, process)
        rows = opened.threads(process.id)
        # Each would have made a ring of its own, of 68 KiB from the 129th on.
        assert opened.session.collector["spool_bytes"] < threads * ring_bytes / 2
    assert len(rows) == threads + 1
    assert all(row.end_ns is not None and row.end_ns >= row.start_ns for row in rows if row.number > 0)
    own = (events.kind == Kind.MALLOC) & (events.size >= 100) & (events.size < 120)
    for chosen, each in ((own, 20), (events.kind == Kind.THREAD_START, 1), (events.kind == Kind.THREAD_END, 1)):
        counts = np.bincount(events.thread[chosen], minlength=threads + 1)[1:]
        assert np.array_equal(counts, np.full(threads, each))
