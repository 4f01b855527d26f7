"""Reading trace files that are damaged, hostile, old, new, or no traces at all."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heapledger.errors import HeapledgerError, InputError, SchemaError, TraceError, UsageError
from heapledger.store import blocks, ddl, pyramid
from heapledger.store.events import COLUMNS, Events
from heapledger.store.reader import StackFrame, Trace
from heapledger.store.writer import TraceWriter

BLOCKS = 3
EVENTS = BLOCKS * 65_536 - 100


def numbered(first: int, count: int) -> Events:
    events = Events.empty(count)
    events.seq = np.arange(first, first + count, dtype=np.uint64)
    events.seq_exit = events.seq + np.uint64(1)
    events.kind[:] = 1 + events.seq % np.uint64(4)
    scattered = events.seq * np.uint64(0x9E3779B97F4A7C15)
    events.addr = (scattered ^ scattered >> np.uint64(29)) % np.uint64(1 << 47)
    events.time = events.seq * np.uint64(100)
    events.stack[:] = events.seq % np.uint64(3)
    return events


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "t.heapledger"
    with TraceWriter(path, source="run", command=["./app"]) as writer:
        parent = writer.add_process(pid=70, exe="/bin/sh", start_ns=0)
        main = writer.add_process(pid=71, exe="/bin/app", parent_id=parent, start="fork", start_ns=5)
        writer.add_process(pid=71, exe="/bin/other", parent_id=main, start="exec", start_ns=9)
        writer.append_events(parent, numbered(1, 10))
        writer.append_events(main, numbered(1, EVENTS))
        modules = writer.add_modules(main, [{"number": 0, "path": "/bin/app", "bias": 0x10000}])
        known = modules[0]
        addresses = np.array([0x10100, 0x10200, 0xDEAD, 1, 0x10300], np.uint64)
        writer.add_nodes(main, [1, 2, 3, 4, 5], [0, 1, 2, 0, 4], addresses, [known, known, 0, 0, known])
        writer.add_frames(
            [
                {"module_id": known, "offset": 0x100, "depth": 0, "function": "main", "file": "a.c", "line": 3},
                {"module_id": known, "offset": 0x200, "depth": 0, "function": "inner", "file": "a.h", "line": 7},
                {"module_id": known, "offset": 0x200, "depth": 1, "function": "outer", "file": "a.c", "line": 9},
            ]
        )
        writer.add_snapshot(main, [{"start": 4096, "end": 8192, "runs": ([1], [1])}], reason="exit")
        writer.add_sample(main, time_ns=1, rss=5)
        writer.close(100)
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path / "t"))


@pytest.fixture
def trace(path: Path) -> Iterator[Trace]:
    with Trace(path) as opened:
        yield opened


def change(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


# ---- what is asked for


def test_the_main_process_is_the_one_with_most_events_and_comes_first(trace: Trace) -> None:
    assert [row.exe for row in trace.processes()] == ["/bin/app", "/bin/sh", "/bin/other"]
    assert trace.process().exe == "/bin/app"
    assert trace.process(70).exe == "/bin/sh"
    assert trace.process(71).exe == "/bin/app", "of two images with a pid the one with more events"
    assert trace.process(3).exe == "/bin/other", "no pid: an id"
    with pytest.raises(UsageError, match="no process 99") as told:
        trace.process(99)
    assert "70" in told.value.hint


@given(st.integers(0, EVENTS + 10), st.integers(0, EVENTS + 10))
@settings(max_examples=25, deadline=None)
def test_a_range_of_seq_gives_exactly_its_events(written: Path, first: int, last: int) -> None:
    with Trace(written) as trace:
        found = Events.concat(list(trace.events(2, ["addr"], first, last)))
    expected = numbered(1, EVENTS)
    inside = (expected.seq >= first) & (expected.seq <= last)
    assert np.array_equal(found.addr, expected.addr[inside])
    assert not found.seq.any(), "not asked for"


def test_a_stack_lists_frames_innermost_first_with_inlined_ones(trace: Trace) -> None:
    app = "/bin/app"
    main = StackFrame("main", "a.c", 3, app, 0x10100, False)
    inner, outer = StackFrame("inner", "a.h", 7, app, 0x10200, True), StackFrame("outer", "a.c", 9, app, 0x10200, False)
    assert trace.stack(2, 1) == [main]
    assert trace.stack(2, 2) == [inner, outer, main]
    assert trace.stack(2, 3) == [StackFrame("", None, None, "", 0xDEAD, False), inner, outer, main]
    assert [frame.function for frame in trace.stack(2, 5)] == ["", "[frames cut here]"]
    assert trace.stack(2, 0) == trace.stack(2, 999) == trace.stack(1, 1) == []
    assert trace.site(2, 2) == (app, "inner", 0x200)
    assert (1, 0x100, 0x10100) in set(trace.addresses(2))


def test_facts_and_timelines_are_kept_by_version(trace: Trace, path: Path) -> None:
    series = pyramid.build(np.arange(1000), np.arange(1000) % 37)
    assert trace.save_fact(2, "ledger", "1", {"a": [1, 2]})
    assert trace.save_pyramid(2, "live", "1", series)
    assert trace.save_fact(2, "ledger", "2", {"a": 3})
    with Trace(path) as again:
        assert again.fact(2, "ledger") == again.fact(2, "ledger", "2") == {"a": 3}
        assert again.fact(2, "ledger", "1") is again.fact(1, "ledger") is again.fact(2, "other") is None
        found = again.pyramid(2, "live", "1")
        assert found
        assert np.array_equal(found.query().max, series.query().max)
        assert again.pyramid(2, "live", "2") is again.pyramid(1, "live") is None
        assert again.series(2) == ["live"]


def test_a_trace_that_may_not_be_written_keeps_results_in_memory(path: Path) -> None:
    """As an unprivileged user, with the file and its folder read-only: in a child, for root may write anything."""
    path.chmod(0o444)
    path.parent.chmod(0o555)
    for folder in path.parents:
        if not folder.stat().st_mode & 0o001 and folder.stat().st_uid == os.getuid():
            folder.chmod(folder.stat().st_mode | 0o005)
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            with Trace(path) as trace:
                saved = trace.save_fact(2, "x", "1", {"a": 1}), trace.save_pyramid(2, "p", "1", pyramid.build([1], [2]))
                kept = trace.fact(2, "x", "1") == {"a": 1} and trace.series(2) == ["p"] and trace.event_count > 0
                status = 0 if saved == (False, False) and kept else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    path.parent.chmod(0o755)
    assert path.read_bytes() == before


# ---- files that are no traces


def test_what_is_no_trace_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello " * 100)
    (tmp_path / "short").write_bytes(b"SQLite format 3\0")
    change(tmp_path / "other", "CREATE TABLE process(id)")
    for name, words in (
        ("empty", "is empty"),
        ("text", "not a trace file"),
        ("short", "not a trace file"),
        ("other", "SQLite database, but not a trace"),
        ("missing", "there is no file"),
        (".", "folder"),
        ("a\0b", "cannot open"),
    ):
        with pytest.raises(InputError, match=words) as told:
            Trace(tmp_path / name)
        assert told.value.exit_code == 2
        assert "\n" not in told.value.message


def test_a_name_with_odd_characters_is_just_a_name(path: Path) -> None:
    odd = path.with_name("a?mode=rwc&x#%41 ü.heapledger")
    path.rename(odd)
    with Trace(odd) as trace:
        assert trace.event_count == EVENTS + 10


def test_a_trace_of_a_newer_version_is_refused(path: Path) -> None:
    change(path, f"PRAGMA user_version = {ddl.SCHEMA_VERSION + 1}")
    with pytest.raises(SchemaError, match="newer heapledger"):
        Trace(path)


@pytest.mark.parametrize("version", range(-1, ddl.SCHEMA_VERSION))
def test_a_trace_of_an_older_version_is_refused_and_left_alone(path: Path, version: int) -> None:
    change(path, f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    for attempt in (Trace, TraceWriter.reopen):
        with pytest.raises(SchemaError, match="older heapledger") as told:
            attempt(path)
        assert "record it again" in told.value.hint
    assert path.read_bytes() == before


# ---- files that mean harm

ENDLESS = "WITH RECURSIVE a(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM a) SELECT x AS id FROM a"


@pytest.mark.parametrize(
    ("statements", "words"),
    [
        (["DROP TABLE sample", f"CREATE VIEW sample AS {ENDLESS}"], "view 'sample'"),
        ([f"CREATE VIEW extra AS {ENDLESS}"], "view 'extra'"),
        (["CREATE TRIGGER t AFTER INSERT ON fact BEGIN DELETE FROM event_block; END"], "trigger 't'"),
        (["CREATE TABLE surprise(a)"], "table 'surprise'"),
        (["CREATE VIRTUAL TABLE v USING fts5(a)"], "virtual table 'v'"),
        (["DROP TABLE sample", "CREATE VIRTUAL TABLE sample USING fts5(a)"], "virtual table 'sample'"),
        (["ALTER TABLE sample ADD COLUMN x AS (zeroblob(1e9))"], "computes its columns"),
        (["DROP TABLE fact"], "fact is missing"),
        (["ALTER TABLE sample DROP COLUMN pss"], "lacks columns"),
        (["DELETE FROM session"], "0 sessions"),
    ],
)
def test_a_schema_that_is_not_ours_is_refused(path: Path, statements: list[str], words: str) -> None:
    change(path, *statements)
    with pytest.raises(TraceError, match=words):
        Trace(path)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE process SET pid = 'seven'",
        "UPDATE process SET argv = '{}'",
        "UPDATE process SET argv = '[1]'",
        "UPDATE process SET argv = 'not json'",
        "UPDATE process SET start_break = 'x'",
        "UPDATE process SET exe = zeroblob(10)",
    ],
)
def test_a_value_of_the_wrong_type_is_damage(path: Path, statement: str) -> None:
    change(path, statement)
    with Trace(path) as trace, pytest.raises(TraceError, match="damaged"):
        trace.processes()


def test_numbers_that_are_none_are_damage_everywhere(path: Path) -> None:
    change(
        path,
        "UPDATE sample SET rss = 'x'",
        "UPDATE node_block SET first_node = 'x'",
        "UPDATE event_block SET count = 'x'",
    )
    with Trace(path) as trace:
        with pytest.raises(TraceError):
            trace.samples(2)
        with pytest.raises(TraceError):
            trace.stack(2, 1)
        with pytest.raises(TraceError):
            list(trace.events(2))


def with_nodes(path: Path, node: list[int], parent: list[int], first: int | None = None) -> Path:
    """The trace with these call stacks, as somebody who means harm can make them: all checksums are right."""
    columns = [np.array(column, np.int64) for column in (node, parent, [0x10100] * len(node), [1] * len(node))]
    blob = blocks.Packer().pack(blocks.encode_nodes(*columns))
    row = (len(node), node[0] if first is None else first, blocks.checksum("nodes", len(node), blob), blob)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE node_block SET count = ?, first_node = ?, crc = ?, data = ?", row)
        connection.commit()
    return path


def test_a_loop_in_the_stacks_ends(path: Path) -> None:
    with Trace(with_nodes(path, [1, 2, 3], [3, 2, 2])) as trace:
        assert len(trace.stack(2, 3)) < 10


def test_stacks_that_are_damaged_or_out_of_order_are_damage(path: Path) -> None:
    with_nodes(path, [1, 3, 2], [0, 1, 1])
    with Trace(path) as trace, pytest.raises(TraceError, match="out of order"):
        trace.stack(2, 3)
    with_nodes(path, [1, 2, 3], [0, 1, 1], first=2)
    with Trace(path) as trace, pytest.raises(TraceError, match="out of order"):
        trace.stack(2, 3)
    change(path, "UPDATE node_block SET crc = crc + 1")
    with Trace(path) as trace, pytest.raises(TraceError, match="checksum"):
        trace.stack(2, 3)


def test_a_value_larger_than_any_we_write_is_not_loaded(path: Path) -> None:
    change(path, "UPDATE event_block SET data = zeroblob(40000000) WHERE id = 2")
    with Trace(path) as trace:
        count = sum(map(len, trace.events(2)))
        assert (len(trace.damaged), count) == (1, EVENTS - trace.damaged[0].events)


# ---- damage


@pytest.mark.parametrize("at", [1, 50, 20_000])
def test_a_damaged_block_is_left_out_and_listed(path: Path, at: int) -> None:
    damaged = f"CAST(substr(data, 1, {at}) || x'a5' || substr(data, {at} + 2) AS BLOB)"
    change(path, f"UPDATE event_block SET data = {damaged} WHERE id = 2")
    with Trace(path) as trace:
        found = Events.concat(list(trace.events(2)))
        (damage,) = trace.damaged
        assert (damage.block_id, damage.events) == (2, 65_536)
        expected = numbered(1, EVENTS)
        left = expected.take((expected.seq < damage.first_seq) | (expected.seq > damage.last_seq))
        assert all(np.array_equal(getattr(found, column), getattr(left, column)) for column in COLUMNS)
        list(trace.events(2))
        assert len(trace.damaged) == 1, "listed once"


def test_a_missing_blob_or_another_count_is_damage(path: Path) -> None:
    change(path, "UPDATE event_block SET data = x'' WHERE id = 1")
    change(path, "UPDATE event_block SET count = 77 WHERE id = 2")
    with Trace(path) as trace:
        assert sorted(damage.block_id for damage in trace.check()) == [1, 2]


def events_or_refusal(path: Path) -> tuple[Events, bool] | None:
    """(events of the main process, whether blocks were damaged); None if refused in one line with exit code 2."""
    try:
        with Trace(path) as trace:
            found = Events.concat(list(trace.events(2)))
            for row in trace.processes():
                trace.samples(row.id)
                trace.stack(row.id, 3)
            return found, bool(trace.damaged)
    except HeapledgerError as error:
        refusal = (error.exit_code, error.message.count("\n"))
    assert refusal == (2, 0)
    return None


def test_flipped_bytes_anywhere_never_change_an_event_in_silence(written: Path, tmp_path: Path) -> None:
    """Files with a few bytes flipped are refused in one line, or what is read from them is what was written."""
    original = written.read_bytes()
    expected = numbered(1, EVENTS)
    chance = random.Random(7)
    opened = damaged = 0
    for round_number in range(120):
        data = bytearray(original)
        for _ in range(chance.choice([1, 3, 20])):
            data[chance.randrange(len(data) // (1 + round_number % 4))] ^= 1 << chance.randrange(8)
        path = tmp_path / "t"
        path.write_bytes(data)
        if (result := events_or_refusal(path)) is None:
            continue
        found, with_damage = result
        opened += 1
        damaged += with_damage
        at = (found.seq - np.uint64(1)).astype(np.int64)
        assert len(found) == 0 or at.max() < EVENTS
        for column in COLUMNS:
            assert np.array_equal(getattr(found, column), getattr(expected, column)[at]), column
    assert opened > 40
    assert damaged > 20


def test_a_trace_cut_in_the_middle_is_refused_or_lists_what_is_gone(written: Path, tmp_path: Path) -> None:
    data = written.read_bytes()
    for size in (100, 4096, 50_000, len(data) // 2, len(data) * 3 // 4, len(data) - 1):
        path = tmp_path / str(size)
        path.write_bytes(data[:size])
        if (result := events_or_refusal(path)) is not None:
            assert len(result[0]) == EVENTS or result[1]


def test_the_log_of_a_dead_writer_is_read_even_where_nothing_can_be_written(tmp_path: Path) -> None:
    """A writer's log beside the file: as an unprivileged user in a read-only folder, without the shared index."""
    writer = TraceWriter(tmp_path / "t", source="run", command=["x"])
    writer.append_events(writer.add_process(pid=1), numbered(1, 5000))
    writer.flush()
    dead = tmp_path / "dead"
    dead.mkdir()
    for suffix in ("", "-wal"):
        shutil.copyfile(tmp_path / f"t{suffix}", dead / f"t{suffix}")
    writer.close()
    with Trace(dead / "t") as trace:
        assert (trace.event_count, json.dumps(trace.session.command)) == (5000, '["x"]')
