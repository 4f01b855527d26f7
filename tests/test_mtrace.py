"""mtrace logs: those the system's libc writes, as its `mtrace` script reads them, and those nobody should write."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heapledger.errors import InputError, MtraceError
from heapledger.store import export
from heapledger.store.events import COLUMNS, Events, Kind
from heapledger.store.reader import Trace
from heapledger.store.writer import TraceWriter
from heapledger.tracer import mtrace

DEBUG_LIBRARY = "libc_malloc_debug.so.0"


def imported(text: str | bytes, folder: Path) -> tuple[mtrace.Imported, Events, Trace]:
    """(result, events, open trace) of a log."""
    log = folder / "log"
    log.write_bytes(text.encode() if isinstance(text, str) else text)
    result = mtrace.import_log(log, folder / "out")
    trace = Trace(folder / "out")
    return result, Events.concat(list(trace.events(trace.process().id))), trace


def brief(events: Events) -> list[tuple[str, int, int, int]]:
    """(kind, addr, size, arg) of each event."""
    columns = (events.kind.tolist(), events.addr.tolist(), events.size.tolist(), events.arg.tolist())
    return [(Kind(kind).name, *rest) for kind, *rest in zip(*columns, strict=True)]


# ---- against the system's libc and its script


@pytest.fixture(scope="module")
def real_log(native: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log that the system's libc wrote."""
    program = native("mtrace_calls.c", "-O1", "-Wno-alloc-size-larger-than")
    log = tmp_path_factory.mktemp("mtrace") / "real.log"
    environment = {**os.environ, "MALLOC_TRACE": str(log), "LD_PRELOAD": DEBUG_LIBRARY}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True)
    if "cannot be preloaded" in done.stderr or not log.exists():
        pytest.skip(f"this system has no {DEBUG_LIBRARY}")
    return log


def script(log: Path) -> tuple[str, list[tuple[int, int]]]:
    """What the `mtrace` script says about a log: its words, and (address, size) of what was not freed."""
    if not shutil.which("mtrace"):
        pytest.skip("this system has no mtrace script (Debian: libc-devtools)")
    said = subprocess.run(["mtrace", log], capture_output=True, text=True, check=False).stdout
    return said, [(int(a, 16), int(n, 16)) for a, n in re.findall(r"^(0x[0-9a-f]+)\s+(0x[0-9a-f]+|0)  at", said, re.M)]


def not_freed(trace: Trace, process: int) -> list[tuple[int, int]]:
    """(address, size) of what was not given back by the end."""
    live: dict[int, int] = {}
    for events in trace.events(process):
        for kind, addr, size, arg in brief(events):
            if kind == "FREE":
                live.pop(addr, None)
            elif kind == "REALLOC" and arg and (addr or not size):
                live.pop(arg, None)
            if kind != "FREE" and addr:
                live[addr] = size
    return sorted(live.items())


def test_a_log_of_the_systems_libc_gives_the_leaks_of_its_script(real_log: Path, tmp_path: Path) -> None:
    result = mtrace.import_log(real_log, tmp_path / "t")
    with Trace(tmp_path / "t") as trace:
        leaks = not_freed(trace, trace.process().id)
        assert leaks == script(real_log)[1]
        assert len(leaks) == 45, "42 of the 64 blocks kept, and `small`, `aligned` and `empty`"
        events = Events.concat(list(trace.events(1)))
        assert [row.path for row in trace.modules(1)] == [re.search(r"@ (\S+?):", real_log.read_text())[1]]  # type: ignore[index]
        assert trace.process().start == "import"
        assert trace.session.source == "mtrace"
    assert (result.unknown, result.starts, result.ended, result.cut) == (0, 1, True, False)
    assert np.all(events.seq_exit > events.seq)
    assert np.all(events.seq[1:] > events.seq_exit[:-1]), "no two calls overlap"


def test_the_round_trip_of_a_real_log_is_the_same_to_the_byte(real_log: Path, tmp_path: Path) -> None:
    mtrace.import_log(real_log, tmp_path / "t", symbols=False)
    with Trace(tmp_path / "t") as trace:
        assert "".join(export.mtrace(trace, 1)).encode() == real_log.read_bytes()


def test_the_script_reads_an_export_and_finds_the_same(
    real_log: Path, tmp_path: Path, heapledger: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert heapledger("import", real_log, "-o", tmp_path / "t").returncode == 0
    assert heapledger("export", tmp_path / "t", "--format", "mtrace", "-o", tmp_path / "log").returncode == 0
    assert script(tmp_path / "log") == script(real_log)


def test_an_export_of_threads_that_overlap_never_confuses_the_script(tmp_path: Path) -> None:
    """A block freed by one thread and got by another: by entry the malloc comes first, in truth the free does."""
    events = Events.empty(5)
    events.kind[:] = [Kind.MALLOC, Kind.MALLOC, Kind.FREE, Kind.FREE, Kind.REALLOC]
    events.seq[:], events.seq_exit[:] = [1, 3, 4, 7, 10], [2, 6, 5, 8, 11]
    events.addr[:] = [0x1000, 0x1000, 0x1000, 0x1000, 0x2000]
    events.size[:] = [8, 8, 0, 0, 24]
    with TraceWriter(tmp_path / "t", source="run", command=["x"]) as writer:
        writer.append_events(writer.add_process(pid=1), events)
    with Trace(tmp_path / "t") as trace:
        (tmp_path / "log").write_text("".join(export.mtrace(trace, 1)))
    said, leaks = script(tmp_path / "log")
    assert leaks == [(0x2000, 24)]
    assert "duplicate" not in said
    assert "never alloc'd" not in said


def test_the_order_of_an_export_holds_across_blocks(tmp_path: Path) -> None:
    """A call that returns in a later block of events stands there."""
    count = 70_000
    events = Events.empty(count)
    events.kind[:] = Kind.MALLOC
    events.seq = 1 + 2 * np.arange(count, dtype=np.uint64)
    events.seq_exit = events.seq + np.uint64(1)
    events.addr = events.seq * np.uint64(16)
    events.seq_exit[65_000] = events.seq[69_000] + np.uint64(1)
    events.seq[69_001:] += np.uint64(1)
    events.seq_exit[69_001:] += np.uint64(1)
    events.seq_exit[69_000] += np.uint64(1)
    with TraceWriter(tmp_path / "t", source="run", command=["x"]) as writer:
        writer.append_events(writer.add_process(pid=1), events)
    with Trace(tmp_path / "t") as trace:
        portions = list(export.operations(trace, 1))
    keys = np.concatenate([portion.key for portion in portions])
    assert len(keys) == count
    assert np.all(keys[1:] > keys[:-1])


@pytest.mark.parametrize("flags", [("-O1",), ("-O1", "-no-pie"), ("-O1", "-rdynamic")])
def test_callers_get_the_function_and_line_that_the_script_finds(
    native: Callable[..., Path], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    program = native("mtrace_calls.c", "-Wno-alloc-size-larger-than", *flags)
    log = tmp_path / "log"
    environment = {**os.environ, "MALLOC_TRACE": str(log), "LD_PRELOAD": DEBUG_LIBRARY}
    subprocess.run([program], env=environment, capture_output=True, check=True)
    if not log.exists():
        pytest.skip(f"this system has no {DEBUG_LIBRARY}")
    result = mtrace.import_log(log, tmp_path / "t")
    assert result.resolved == result.callers > 5
    with Trace(tmp_path / "t") as trace:
        leaked = {stack for portion in export.operations(trace, 1) for stack in portion.stack.tolist()}
        names = {stack: trace.stack(1, stack)[0] for stack in leaked}
    assert {"take", "grow", "main"} == {frame.function for frame in names.values()}
    if "-no-pie" in flags:
        return  # the script adds the object's address only for libraries, and finds nothing here
    said = subprocess.run(["mtrace", program, log], capture_output=True, text=True, check=False).stdout
    lines = set(re.findall(r"at (\S+:\d+)", said))
    assert lines
    assert lines <= {f"{frame.file}:{frame.line}" for frame in names.values()}


def test_a_file_that_is_not_the_one_of_the_log_gives_no_symbols(native: Callable[..., Path], tmp_path: Path) -> None:
    program = native("mtrace_calls.c", "-O1", "-Wno-alloc-size-larger-than")
    log = f"= Start\n@ {program}:(other+0x1)[0x1180] + 0x10 0x8\n@ {program}:[0xfffff0] + 0x30 0x8\n= End\n"
    result, events, trace = imported(log, tmp_path)
    assert result.resolved == 0
    assert [trace.stack(1, stack)[0].function for stack in events.stack.tolist()] == ["other", ""]
    trace.close()


# ---- the format, line by line


def test_each_kind_of_line_becomes_its_event(tmp_path: Path) -> None:
    log = """= Start
@ ./app:(main+0x1d)[0x1186] + 0xa0 0x18
@ ./app:[0x11a0] < 0xa0
@ ./app:[0x11a0] > 0xb0 0x30
@ ./app:(_ZN3foo3barEv+0x9)[0x1199] ! 0xb0 0xfffffffffff
@ [0x4242] + 0xc0 0
+ 0xd0 0x10
@ ./app:(main+1d)[0x1187] + (nil) 0x4000
- 0xb0
@ somewhere odd - 0xd0
= End
"""
    result, events, trace = imported(log, tmp_path)
    assert brief(events) == [
        ("MALLOC", 0xA0, 0x18, 0),
        ("REALLOC", 0xB0, 0x30, 0xA0),
        ("REALLOC", 0, 0xFFFFFFFFFFF, 0xB0),
        ("MALLOC", 0xC0, 0, 0),
        ("MALLOC", 0xD0, 0x10, 0),
        ("MALLOC", 0, 0x4000, 0),
        ("FREE", 0xB0, 0, 0),
        ("FREE", 0xD0, 0, 0),
    ]
    with trace:
        frames = [trace.stack(1, stack) for stack in events.stack.tolist()]
        assert [(f[0].function, f[0].module, f[0].address) if f else None for f in frames] == [
            ("main", "./app", 0x1186),
            ("", "./app", 0x11A0),
            ("foo::bar()", "./app", 0x1199),
            ("", "", 0x4242),
            None,
            ("main", "./app", 0x1187),
            None,
            ("somewhere odd", "", 0),
        ]
    assert not events.time.any()
    assert not events.word.any()
    assert result.unknown == 0


def test_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    log = "= Start\n@ ./a:[0x1] + 0x10 0x20\n@ ./a:[0x2] < 0x10\n@ ./a:[0x2] > 0x50 0x30\n- 0x50\n= End\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, unix, one = imported(log, tmp_path / "a")
    result, windows, other = imported(log.replace("\n", "\r\n"), tmp_path / "b")
    assert brief(unix) == brief(windows)
    assert (result.unknown, result.ended) == (0, True)
    one.close()
    other.close()


def test_unknown_lines_are_counted_and_numbered(tmp_path: Path) -> None:
    lines = [
        "= Start",
        "+ 0x10 0x8",
        "what is this",
        "",
        "+ 0x20",
        "+ 0x11112222333344445 0x1",
        "- 0x10",
        "* 0x1",
        "= End",
    ]
    result, events, trace = imported("\n".join(lines) + "\n", tmp_path)
    assert (result.unknown, result.unknown_lines, result.lines) == (4, [3, 5, 6, 8], 9)
    assert len(events) == 2
    assert "4 of 9 lines were not understood and left out: line 3, 5, 6, 8" in trace.process().notes
    trace.close()


def test_a_log_cut_in_the_middle_of_a_line_loses_that_line_and_says_so(tmp_path: Path) -> None:
    whole = "= Start\n+ 0x10 0x8\n@ ./a:[0x1] - 0x10\n"
    for cut in range(20, len(whole) - 1):
        result, events, trace = imported(whole[:cut], tmp_path)
        assert brief(events) == [("MALLOC", 0x10, 8, 0)], whole[:cut]
        assert result.cut
        assert any("cut off" in note for note in trace.process().notes)
        trace.close()
    result, events, trace = imported(whole, tmp_path)
    assert (len(events), result.cut, result.ended) == (2, False, False)
    assert any("no end mark" in note for note in trace.process().notes)
    trace.close()


def test_halves_of_a_realloc_without_the_other_half_are_what_the_script_takes_them_for(tmp_path: Path) -> None:
    _, events, trace = imported("= Start\n+ 0x10 0x8\n< 0x10\n+ 0x30 0x1\n> 0x20 0x9\n< 0x20\n", tmp_path)
    assert [kind for kind, *_ in brief(events)] == ["MALLOC", "FREE", "MALLOC", "MALLOC", "FREE"]
    assert not_freed(trace, 1) == script(tmp_path / "log")[1] == [(0x30, 1)]
    trace.close()


def test_several_starts_are_one_process_with_a_note(tmp_path: Path) -> None:
    result, events, trace = imported("= Start\n+ 0x10 0x8\n= End\n= Start\n- 0x10\n= End\n", tmp_path)
    assert (result.starts, len(events), len(trace.processes())) == (2, 2, 1)
    assert any("2 start marks" in note for note in trace.process().notes)
    trace.close()


def test_the_largest_numbers_there_are_come_through(tmp_path: Path) -> None:
    _, events, trace = imported("= Start\n+ 0xffffffffffffffff 0xfffffffffffffffe\n", tmp_path)
    assert brief(events) == [("MALLOC", 2**64 - 1, 2**64 - 2, 0)]
    trace.close()


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, os.urandom(50_000), b"hello\nworld\n", b"x" * 300_000])
def test_what_is_no_log_is_refused_and_leaves_nothing_behind(tmp_path: Path, content: bytes) -> None:
    log = tmp_path / "log"
    log.write_bytes(content)
    with pytest.raises(MtraceError) as told:
        mtrace.import_log(log, tmp_path / "out")
    assert "\n" not in told.value.message
    assert sorted(os.listdir(tmp_path)) == ["log"]
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError):
            mtrace.import_log(missing, tmp_path / "out")


def test_a_log_without_a_single_call_is_a_log(tmp_path: Path) -> None:
    result, events, trace = imported("= Start\n= End\n", tmp_path)
    assert (len(events), result.ended, trace.process().events) == (0, True, 0)
    trace.close()


def test_an_endless_line_costs_a_line_and_not_the_memory(tmp_path: Path) -> None:
    log = b"= Start\n+ 0x10 0x8\n@ " + b"x" * 3_000_000 + b"\n< 0x10\n> 0x20 0x9\n" + b"= End\n"
    result, events, trace = imported(log, tmp_path)
    assert brief(events) == [("MALLOC", 0x10, 8, 0), ("REALLOC", 0x20, 9, 0x10)]
    assert (result.unknown, result.unknown_lines, result.lines) == (1, [3], 6)
    trace.close()


LINE = st.one_of(
    st.builds(lambda a, n: f"+ {a:#x} {n:#x}", st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    st.builds(lambda a: f"- {a:#x}", st.integers(0, 50)),
    st.builds(
        lambda a, b: f"@ ./a:[{a:#x}] < {a:#x}\n@ ./a:[{a:#x}] > {b:#x} 0x8", st.integers(0, 50), st.integers(0, 50)
    ),
    st.sampled_from(["= Start", "= End", "", "junk", "@", "@ x", "+", "< 0x", "@ a b (c) [0x1] + 0x1 0x2"]),
    st.text(alphabet=st.characters(blacklist_characters="\n", blacklist_categories=["Cs"]), max_size=20),
)


@given(st.lists(LINE, max_size=60), st.integers(20, 200))
@settings(max_examples=150, deadline=None)
def test_the_size_of_the_portions_changes_nothing(lines: list[str], portion: int) -> None:
    text = ("= Start\n" + "\n".join(lines) + "\n").encode()
    results = []
    for size in (1 << 20, portion):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mtrace, "CHUNK_BYTES", size)
            parser = mtrace.Parser(io.BytesIO(text))
            events = Events.concat(list(parser.portions()))
        columns = {name: getattr(events, name).tolist() for name in COLUMNS}
        results.append((parser.result, columns, parser.callers))
    assert results[0] == results[1]
    assert results[0][0].lines == text.count(b"\n")


def test_an_import_is_not_slow(tmp_path: Path) -> None:
    """A million lines a second is the aim (see bench/store_bench.py); here a tenth of it, in CPU time."""
    body = "".join(
        f"@ ./app:[{i % 50:#x}] + {i * 16:#x} 0x20\n@ ./app:[0x99] - {i * 16:#x}\n" for i in range(1, 50_001)
    )
    began = time.process_time()
    result, _, trace = imported(f"= Start\n{body}= End\n", tmp_path)
    assert time.process_time() - began < 1
    assert result.events == 100_000
    trace.close()
