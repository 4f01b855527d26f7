"""Writing a trace file: what is flushed survives, what cannot be written is told, one file is left."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from heapledger.errors import HeapledgerError, UsageError
from heapledger.store import blocks, ddl
from heapledger.store.background import Background
from heapledger.store.events import COLUMNS, Events
from heapledger.store.reader import Trace
from heapledger.store.writer import TraceWriter


def numbered(first: int, count: int) -> Events:
    """`count` events with seq from `first` on, and values that follow from it."""
    events = Events.empty(count)
    events.seq = np.arange(first, first + count, dtype=np.uint64)
    events.kind[:] = 1
    events.addr = events.seq * np.uint64(16)
    events.time = events.seq * np.uint64(100)
    return events


def all_events(trace: Trace, process: int) -> Events:
    return Events.concat(list(trace.events(process)))


def new(path: Path, *, background: bool = False) -> TraceWriter:
    about = {"source": "run", "command": ["./app", "--x"], "cwd": "/somewhere", "host": {"kernel": "6.1"}}
    return TraceWriter(path, **about, background=background)  # type: ignore[arg-type]


#: The writer in its caller's thread, and with a thread of its own.
both = pytest.mark.parametrize("background", [False, True])


def test_the_sql_text_of_the_tables_is_that_of_the_models() -> None:
    assert ddl.render() == ddl.TABLES, "run `python -m heapledger.store.ddl`"


def test_writing_does_not_load_sqlalchemy() -> None:
    code = "import sys, heapledger.store.writer; sys.exit('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "t.heapledger"
    with new(path) as writer:
        process = writer.add_process(
            pid=7, argv=["./app"], start_break=2**63 + 4096, environment={"MALLOC_ARENA_MAX": "1"}
        )
        modules = writer.add_modules(process, [{"number": 3, "path": "/lib/x.so", "bias": 2**64 - 4096}])
        writer.set_module_unload(process, 3, 99)
        writer.add_threads(process, [{"number": 0, "tid": 7, "name": "main", "start_ns": 5}])
        writer.add_threads(process, [{"number": 0, "end_ns": 9}])
        writer.add_sample(process, time_ns=1, rss=4096)
        writer.add_sample(process, time_ns=2, rss=8192, pss=5000)
        forgotten = writer.add_snapshot(process, [{"start": 0, "end": 4096}], reason="peak")
        vmas = [
            {"start": 0xFFFFFFFFFF600000, "end": 0xFFFFFFFFFF601000, "path": "[vsyscall]"},
            {"start": 4096, "end": 16384, "runs": ([1, 2], [1, 0])},
        ]
        snapshot = writer.add_snapshot(process, vmas, reason="exit", time_ns=3, consistent=True, rss_bytes=4096)
        writer.delete_snapshot(forgotten)
        writer.update_process(process, end="exit", exit_status=0, end_ns=50)
        writer.add_note(process, "first")
        writer.add_note(process, "second")
        writer.set_collector({"cpu_s": 0.5})
        writer.close(60)
    with Trace(path) as trace:
        assert (trace.session.command, trace.session.end_ns, trace.session.host) == (
            ["./app", "--x"],
            60,
            {"kernel": "6.1"},
        )
        assert trace.session.collector == {"cpu_s": 0.5}
        row = trace.process()
        assert (row.pid, row.start_break, row.end, row.notes) == (7, 2**63 + 4096, "exit", ["first", "second"])
        (module,) = trace.modules(process)
        assert (module.id, module.bias, module.unload_seq) == (modules[3], 2**64 - 4096, 99)
        (thread,) = trace.threads(process)
        assert (thread.name, thread.start_ns, thread.end_ns) == ("main", 5, 9)
        samples = trace.samples(process)
        assert (samples["rss"].tolist(), samples["pss"].tolist()) == ([4096, 8192], [-1, 5000])
        assert [s.id for s in trace.snapshots(process)] == [snapshot]
        low, high = trace.vmas(snapshot)
        assert (high.start, high.path) == (0xFFFFFFFFFF600000, "[vsyscall]")
        assert [part.tolist() for part in low.runs] == [[1, 2], [1, 0]]
        assert trace.snapshot(process, "peak") is None


@both
@pytest.mark.parametrize("portion", [1_000, 65_536, 70_000, 200_000])
def test_events_in_any_portions_come_back_as_one(tmp_path: Path, portion: int, background: bool) -> None:
    total = 200_000
    with new(tmp_path / "t", background=background) as writer:
        process = writer.add_process(pid=1)
        for first in range(1, total + 1, portion):
            writer.append_events(process, numbered(first, min(portion, total + 1 - first)))
            if portion < 65_536 and first % 7 == 1:
                writer.flush()
    with Trace(tmp_path / "t") as trace:
        events = all_events(trace, process)
        expected = numbered(1, total)
        assert all(np.array_equal(getattr(events, name), getattr(expected, name)) for name in COLUMNS)
        assert trace.process().events == trace.event_count == total
        assert [block.count for block in trace.event_blocks(process)] == [65_536, 65_536, 65_536, 3_392]


@both
def test_many_flushes_do_not_fragment_a_block(tmp_path: Path, background: bool) -> None:
    with new(tmp_path / "t", background=background) as writer:
        process = writer.add_process(pid=1)
        for first in range(1, 1001, 10):
            writer.append_events(process, numbered(first, 10))
            writer.flush()
    with Trace(tmp_path / "t") as trace:
        assert [block.count for block in trace.event_blocks(process)] == [1000]
        assert trace.process().events == 1000


@both
def test_events_out_of_order_are_refused(tmp_path: Path, background: bool) -> None:
    with new(tmp_path / "t", background=background) as writer:
        process = writer.add_process(pid=1)
        writer.append_events(process, numbered(10, 5))
        with pytest.raises(HeapledgerError, match="out of order"):
            writer.append_events(process, numbered(14, 5))
        with pytest.raises(HeapledgerError, match="out of order"):
            writer.append_events(process, numbered(20, 5).take(slice(None, None, -1)))
        writer.append_events(process, numbered(15, 5))
    with Trace(tmp_path / "t") as trace:
        assert len(all_events(trace, process)) == 10


def test_a_column_that_does_not_exist_is_a_programming_error(tmp_path: Path) -> None:
    with new(tmp_path / "t") as writer, pytest.raises(TypeError, match="colour"):
        writer.add_process(pid=1, colour="red")


def test_closing_leaves_one_file(tmp_path: Path) -> None:
    with new(tmp_path / "t") as writer:
        writer.append_events(writer.add_process(pid=1), numbered(1, 100_000))
    assert os.listdir(tmp_path) == ["t"]
    # Rollback-journal mode: a copy of this one file, on a read-only medium, is the whole trace.
    assert (tmp_path / "t").read_bytes()[18:20] == b"\1\1"


@both
def test_a_reader_sees_what_was_flushed_while_the_writer_goes_on(tmp_path: Path, background: bool) -> None:
    writer = new(tmp_path / "t", background=background)
    process = writer.add_process(pid=1)
    for round_number in range(5):
        writer.append_events(process, numbered(1 + 30_000 * round_number, 30_000))
        writer.flush()
        with Trace(tmp_path / "t") as trace:
            events = all_events(trace, process)
            assert (len(events), trace.damaged) == (30_000 * (round_number + 1), [])
    with Trace(tmp_path / "t") as trace:
        writer.close(1)  # with a reader still there, the file cannot leave WAL mode, but it is complete
        assert len(all_events(trace, process)) == 150_000
        copy = tmp_path / "copy"
        copy.write_bytes((tmp_path / "t").read_bytes())
    with Trace(copy) as trace:
        assert (len(all_events(trace, process)), trace.session.end_ns) == (150_000, 1)


WRITE_FOREVER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_store_writer import new, numbered
    writer = new(Path({path!r}), background={background})
    process = writer.add_process(pid=1)
    first = 1
    while True:
        writer.append_events(process, numbered(first, 20_000))
        writer.flush()
        first += 20_000
        print(first - 1, flush=True)
"""


@both
def test_what_was_flushed_survives_kill_9_and_the_file_can_be_continued(tmp_path: Path, background: bool) -> None:
    path = tmp_path / "t"
    code = textwrap.dedent(
        WRITE_FOREVER.format(tests=str(Path(__file__).parent), path=str(path), background=background)
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        told = [int(child.stdout.readline()) for _ in range(15)][-1]
        child.send_signal(signal.SIGKILL)
    with Trace(path) as trace:
        events = all_events(trace, 1)
        assert len(events) >= told
        assert np.array_equal(events.addr, numbered(1, len(events)).addr)
        assert (trace.session.end_ns, trace.damaged) == (None, [])
    last = len(events)
    with TraceWriter.reopen(path) as writer:
        with pytest.raises(HeapledgerError, match="out of order"):
            writer.append_events(1, numbered(last, 10))
        writer.append_events(1, numbered(last + 1, 10))
        writer.close(77)
    assert os.listdir(tmp_path) == ["t"]
    with Trace(path) as trace:
        assert (len(all_events(trace, 1)), trace.process().events, trace.session.end_ns) == (last + 10, last + 10, 77)


FILL = """
    import resource, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_store_writer import new, numbered
    from heapledger.errors import HeapledgerError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = new(Path({path!r}), background={background})
    process = writer.add_process(pid=1)
    writer.append_events(process, numbered(1, 1000))
    writer.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    import numpy as np
    first = 1001
    try:
        while True:
            events = numbered(first, 65_536)
            events.size = np.random.default_rng(first).integers(0, 2**63, 65_536).astype(np.uint64)
            writer.append_events(process, events)
            writer.flush()
            first += 65_536
    except HeapledgerError as error:
        print(error.message, "|", error.hint)
    try:
        writer.append_events(process, numbered(first, 1))
    except HeapledgerError as error:
        print("still", error.message)
    writer.close()
"""


@both
def test_a_disk_that_fills_up_is_told_and_what_was_flushed_stays(tmp_path: Path, background: bool) -> None:
    path = tmp_path / "t"
    values = {"tests": str(Path(__file__).parent), "path": str(path), "limit": 3 << 20, "background": background}
    code = textwrap.dedent(FILL.format(**values))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "cannot write" in first
    assert "free some space" in first
    assert second.startswith("still cannot write")
    with Trace(path) as trace:
        assert len(all_events(trace, 1)) >= 1000
        assert trace.check() == []


@both
def test_a_full_filesystem_is_told_as_well(tmp_path: Path, background: bool) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        writer = new(mount / "t", background=background)
        process = writer.add_process(pid=1)
        writer.append_events(process, numbered(1, 1000))
        writer.flush()
        random = np.random.default_rng(1)

        def fill() -> None:
            for first in range(1001, 10**8, 65_536):
                events = numbered(first, 65_536)
                events.size = random.integers(0, 2**63, 65_536).astype(np.uint64)
                writer.append_events(process, events)

        with pytest.raises(HeapledgerError, match="the disk is full") as told:
            fill()
        assert told.value.hint
        writer.close()
        with Trace(mount / "t") as trace:
            assert len(all_events(trace, process)) >= 1000
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_file_that_is_not_a_trace_is_not_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    database = tmp_path / "other.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE t(a)")
    connection.close()
    for path in (precious, database, tmp_path):
        with pytest.raises(UsageError):
            new(path)
    assert precious.read_text() == "years of work"
    with pytest.raises(UsageError, match="cannot write"):
        new(tmp_path / "no" / "such" / "folder" / "t")


def test_an_older_trace_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    for count in (10, 20):
        with new(tmp_path / "t") as writer:
            writer.append_events(writer.add_process(pid=1), numbered(1, count))
    with Trace(tmp_path / "t") as trace:
        assert trace.event_count == 20


def test_leaving_by_an_exception_keeps_what_came_before(tmp_path: Path) -> None:
    def crash() -> None:
        with new(tmp_path / "t") as writer:
            writer.append_events(writer.add_process(pid=1), numbered(1, 10))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    with Trace(tmp_path / "t") as trace:
        assert (trace.event_count, trace.session.end_ns) == (10, None)


def test_names_that_are_not_utf8_do_not_stop_the_writer(tmp_path: Path) -> None:
    odd = b"caf\xe9".decode("utf-8", "surrogateescape")
    with new(tmp_path / "t") as writer:
        process = writer.add_process(pid=1, argv=[odd], exe=odd)
        modules = writer.add_modules(process, [{"number": 0, "path": odd}])
        writer.add_frames([{"module_id": modules[0], "offset": 1, "function": odd, "file": odd}])
    with Trace(tmp_path / "t") as trace:
        assert (trace.process().exe, trace.process().argv) == ("caf\\xe9", ["caf\\xe9"])


@both
def test_memory_stays_bounded_while_millions_of_events_are_written(tmp_path: Path, background: bool) -> None:
    tracemalloc.start()
    try:
        with new(tmp_path / "t", background=background) as writer:
            process = writer.add_process(pid=1)
            for first in range(1, 1_500_000, 50_000):
                writer.append_events(process, numbered(first, 50_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (120 if background else 60) << 20, f"{peak} bytes for 1.5 M events, which are 110 MB in memory"


@both
def test_memory_stays_bounded_while_many_processes_come_and_go(tmp_path: Path, background: bool) -> None:
    tracemalloc.start()
    try:
        with new(tmp_path / "t", background=background) as writer:
            for pid in range(25):
                writer.append_events(writer.add_process(pid=pid), numbered(1, 60_000))
                writer.flush()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (120 if background else 60) << 20, f"{peak} bytes for 25 processes, whose events are 110 MB in memory"
    with Trace(tmp_path / "t") as trace:
        assert trace.event_count == 25 * 60_000
        assert trace.check() == []


@both
def test_a_process_that_was_idle_goes_on_in_a_new_block(tmp_path: Path, background: bool) -> None:
    with new(tmp_path / "t", background=background) as writer:
        processes = [writer.add_process(pid=pid) for pid in range(7)]
        for process in processes:
            writer.append_events(process, numbered(1, 60_000))
        for _ in range(3):
            writer.flush()
        writer.append_events(processes[0], numbered(60_001, 10_000))
    with Trace(tmp_path / "t") as trace:
        assert np.array_equal(all_events(trace, processes[0]).addr, numbered(1, 70_000).addr)
        assert trace.process().events == 70_000
        assert trace.damaged == []


def test_a_flush_that_nobody_waits_for_is_told_of_in_order(tmp_path: Path) -> None:
    told: list[int] = []
    with new(tmp_path / "t", background=True) as writer:
        process = writer.add_process(pid=1)
        for number in range(20):
            writer.append_events(process, numbered(1 + 1000 * number, 1000))
            writer.flush_soon(partial(told.append, number))
        writer.flush()
        assert told == list(range(20))
        with Trace(tmp_path / "t") as trace:
            assert len(all_events(trace, process)) == 20_000


def test_what_goes_wrong_behind_the_callers_back_is_told_by_the_next_call(tmp_path: Path) -> None:
    told: list[int] = []

    def fail() -> None:
        raise RuntimeError("a bug")

    writer = new(tmp_path / "t", background=True)
    process = writer.add_process(pid=1)
    writer.append_events(process, numbered(1, 10))
    writer.flush_soon(fail)
    writer.flush_soon(partial(told.append, 1))
    with pytest.raises(HeapledgerError, match="RuntimeError: a bug"):
        writer.flush()
    with pytest.raises(HeapledgerError, match="a bug"):
        writer.append_events(process, numbered(11, 10))
    writer.close()
    assert told in ([], [1])  # gathered with the other one, or never
    with Trace(tmp_path / "t") as trace:
        assert len(all_events(trace, process)) == 10


def test_closing_tells_a_failure_that_nobody_has_heard_of(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    writer = new(tmp_path / "t", background=True)
    writer.append_events(writer.add_process(pid=1), numbered(1, 10))
    writer.flush_soon(fail)
    with pytest.raises(HeapledgerError, match="a bug"):
        writer.close()
    assert writer.closed


def test_a_background_takes_no_more_than_its_bound() -> None:
    gate, done, failures = threading.Event(), [], list[Exception]()
    background = Background("test", 10, failures.append)
    background.put(gate.wait, 10)
    waiting = threading.Thread(target=background.put, args=(partial(done.append, 1), 1))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    gate.set()
    waiting.join()
    background.put(partial(done.append, 2), 100)  # heavier than the bound: alone
    background.close()
    assert (done, failures) == ([1, 2], [])


def test_a_copy_of_a_snapshot_differs_only_in_what_is_asked(tmp_path: Path) -> None:
    with new(tmp_path / "t") as writer:
        process = writer.add_process(pid=1)
        vmas = [{"start": 4096 * n, "end": 4096 * (n + 1), "path": f"/{n}", "rss_bytes": n} for n in range(1, 6)]
        first = writer.add_snapshot(process, vmas, reason="exit", rss_bytes=15, seq=7, threads=2)
        second = writer.copy_snapshot(first, reason="peak")
    with Trace(tmp_path / "t") as trace:
        one, two = trace.snapshots(process)
        assert (one.id, one.reason, two.id, two.reason) == (first, "exit", second, "peak")
        assert (one.rss_bytes, one.seq, one.threads) == (two.rss_bytes, two.seq, two.threads) == (15, 7, 2)
        rows = [[(v.start, v.end, v.path, v.rss_bytes) for v in trace.vmas(number)] for number in (first, second)]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 5


@pytest.mark.parametrize("name", ["a?mode=ro#b%41&", "é ü.heapledger", "caf\udce9"])
def test_a_trace_may_have_any_name_that_a_file_can_have(tmp_path: Path, name: str) -> None:
    with new(tmp_path / name) as writer:
        writer.add_process(pid=1)
    assert os.listdir(tmp_path) == [name]
    with Trace(tmp_path / name) as trace:
        assert [process.pid for process in trace.processes()] == [1]


# ---- encoded blocks, and nodes


@both
def test_an_encoded_block_and_its_stacks_are_committed_before_it_is_told(tmp_path: Path, background: bool) -> None:
    """Who hands over blocks lets go of what they were made from: seen through a connection of its own."""
    path, seen = tmp_path / "t.heapledger", []

    def look() -> None:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            counts = (
                "SELECT (SELECT sum(count) FROM event_block), (SELECT events FROM process), count(*) FROM node_block"
            )
            seen.append(connection.execute(counts).fetchone())

    with new(path, background=background) as writer:
        process = writer.add_process(pid=1)
        writer.add_nodes(process, [1], [0], [64], [0])
        for first in (1, 1001):
            writer.append_block(process, blocks.encode_events(numbered(first, 1000)), look)
    assert seen == [(1000, 1000, 1), (2000, 2000, 1)]
    with Trace(path) as trace:
        assert all_events(trace, process).seq.tolist() == list(range(1, 2001))
        assert trace.process().events == 2000


@both
def test_encoded_blocks_and_events_keep_their_order(tmp_path: Path, background: bool) -> None:
    with new(tmp_path / "t", background=background) as writer:
        process = writer.add_process(pid=1)
        writer.append_events(process, numbered(1, 100))
        writer.append_block(process, blocks.encode_events(numbered(101, 50)))
        writer.append_block(process, blocks.encode_events(Events.empty()))
        writer.append_events(process, numbered(151, 70_000))
        writer.flush()
        writer.append_block(process, blocks.encode_events(numbered(70_151, 10)))
        with pytest.raises(HeapledgerError, match="out of order"):
            writer.append_block(process, blocks.encode_events(numbered(70_160, 10)))
    with Trace(tmp_path / "t") as trace:
        assert all_events(trace, process).seq.tolist() == list(range(1, 70_161))
        assert [block.count for block in trace.event_blocks(process)] == [100, 50, 65_536, 4464, 10]


@pytest.mark.parametrize("portion", [1000, 16_384, 40_000])
def test_nodes_in_any_portions_come_back_as_one(tmp_path: Path, portion: int) -> None:
    count = 50_000
    node = np.arange(1, count + 1)
    parent, address = node // 3, (node * 977 % 4093).astype(np.uint64) << np.uint64(52)
    with new(tmp_path / "t") as writer:
        process = writer.add_process(pid=1)
        for low in range(0, count, portion):
            part = slice(max(low - 100, 0), low + portion)  # a hundred of them are known already
            writer.add_nodes(process, node[part], parent[part], address[part], node[part] % 3)
            writer.append_block(process, blocks.encode_events(numbered(low + 1, 10)))
        writer.add_nodes(process, [], [], [], [])
    with Trace(tmp_path / "t") as trace:
        nodes = trace.nodes(process)
        assert np.array_equal(nodes.node, node)
        assert np.array_equal(nodes.parent, parent)
        assert np.array_equal(nodes.address.view(np.uint64), address)
        assert np.array_equal(nodes.module_id, node % 3)
    with contextlib.closing(sqlite3.connect(tmp_path / "t")) as connection:
        sizes = [row[0] for row in connection.execute("SELECT count FROM node_block ORDER BY id")]
    assert sizes == [16_384, 16_384, 16_384, 848], "full blocks, however they came"


def test_nodes_go_on_after_the_writer_died(tmp_path: Path) -> None:
    path = tmp_path / "t"
    first = new(path)
    process = first.add_process(pid=1)
    first.add_nodes(process, [1, 2], [0, 1], [16, 32], [0, 0])
    first.flush()
    first._connection.close()
    with TraceWriter.reopen(path) as writer:
        writer.add_nodes(process, [1, 2, 3], [0, 1, 2], [99, 99, 48], [0, 0, 0])
    with Trace(path) as trace:
        assert trace.nodes(process).address.tolist() == [16, 32, 48]
