"""SQL over events, against the same statements on an ordinary table of the same rows."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from heapledger.errors import UsageError
from heapledger.store.events import COLUMNS, Events, Kind
from heapledger.store.reader import Block, Trace
from heapledger.store.sql import EVENT_COLUMNS, Database, kind_name
from heapledger.store.writer import TraceWriter

Run = Callable[..., subprocess.CompletedProcess[str]]


def random_events(count: int, seed: int) -> Events:
    random = np.random.default_rng(seed)
    events = Events.empty(count)
    events.kind = random.choice([1, 2, 3, 4, 16], count).astype(np.uint8)
    events.thread = random.integers(0, 3, count).astype(np.uint32)
    events.seq = np.cumsum(random.integers(1, 3, count)).astype(np.uint64)
    events.seq_exit = events.seq + np.uint64(1)
    events.time = np.cumsum(random.integers(0, 100, count)).astype(np.uint64)
    events.addr = random.integers(0, 2**64, count, dtype=np.uint64)
    events.size = random.integers(0, 5000, count).astype(np.uint64)
    events.stack = random.integers(0, 4, count).astype(np.uint32)
    return events


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sql") / "t.heapledger"
    with TraceWriter(path, source="run", command=["x"]) as writer:
        for pid, count in ((50, 140_000), (51, 3_000)):
            process = writer.add_process(pid=pid)
            writer.append_events(process, random_events(count, pid))
            modules = writer.add_modules(process, [{"number": 0, "path": "/bin/x"}])
            writer.add_nodes(process, [1, 2], [0, 1], [16, 32], [modules[0]] * 2)
            writer.add_frames([{"module_id": modules[0], "offset": 16, "function": "main"}])
    return path


@pytest.fixture(scope="module")
def oracle(path: Path) -> Iterator[sqlite3.Connection]:
    """The same events as rows of a real table."""
    connection = sqlite3.connect(":memory:")
    types = {name: "TEXT" if name == "kind_name" else "INTEGER" for name in EVENT_COLUMNS}
    connection.execute(f"CREATE TABLE events ({', '.join(f'{name} {kind}' for name, kind in types.items())})")
    connection.execute("CREATE INDEX by_seq ON events (process_id, seq)")
    with Trace(path) as trace:
        for process in trace.processes():
            for events in trace.events(process.id):
                columns = {name: getattr(events, name).astype(np.int64).tolist() for name in COLUMNS}
                columns["process_id"] = [process.id] * len(events)
                columns["kind_name"] = [kind_name(kind) for kind in columns["kind"]]
                rows = zip(*(columns[name] for name in EVENT_COLUMNS), strict=True)
                connection.executemany(f"INSERT INTO events VALUES ({', '.join('?' * len(EVENT_COLUMNS))})", rows)
    yield connection
    connection.close()


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    with Trace(path) as trace, Database(trace, timeout_s=30) as opened:
        yield opened


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT kind, count(*), sum(size) FROM events GROUP BY 1 ORDER BY 1",
        "SELECT kind_name, max(addr), min(addr) FROM events GROUP BY 1 ORDER BY 1",
        "SELECT count(*) FROM events",
        "SELECT * FROM events WHERE process_id = 2 ORDER BY seq LIMIT 5",
        "SELECT process_id, count(*) FROM events WHERE seq BETWEEN 100 AND 90000 GROUP BY 1 ORDER BY 1",
        "SELECT count(*) FROM events WHERE time > 3e6 AND time <= 4000000.5 AND kind_name = 'free'",
        "SELECT count(*) FROM events WHERE time < 1000 OR seq >= 140000",
        "SELECT seq FROM events WHERE seq = 4242 AND process_id = 1",
        "SELECT count(*) FROM events WHERE seq = '4242'",
        "SELECT count(*) FROM events WHERE seq > NULL",
        "SELECT count(*) FROM events WHERE seq > 'text'",
        "SELECT count(*) FROM events WHERE process_id IN (1, 7)",
        "SELECT count(*) FROM events WHERE process_id IN (2, 1) AND seq < 1000",
        "SELECT a.seq, b.seq FROM events a JOIN events b ON b.process_id = 2 AND b.seq = a.seq"
        " WHERE a.process_id = 1 AND a.seq < 40 ORDER BY 1",
        "SELECT thread, avg(size) FROM events WHERE stack = 3 GROUP BY 1 ORDER BY 1",
        "SELECT seq, lag(seq) OVER (ORDER BY seq) FROM events WHERE process_id = 2 LIMIT 4",
        "SELECT printf('%x', addr) FROM events WHERE addr < 0 ORDER BY process_id, seq LIMIT 3",
        "SELECT count(*) FROM events WHERE size > 4990 AND kind = 4 AND thread != 1",
        "SELECT count(*) FROM events WHERE size > 4990.5 AND stack IS NOT 3 AND addr >= -9e18",
        "SELECT count(*) FROM events WHERE kind = 77 OR size = 0 OR size = 1 AND addr > 9223372036854775807",
        "SELECT 1 WHERE EXISTS (SELECT * FROM events WHERE seq < 0)",
    ],
)
def test_events_answer_as_a_table_of_the_same_rows_would(
    database: Database, oracle: sqlite3.Connection, statement: str
) -> None:
    _, rows = database.execute(statement)
    assert list(rows) == oracle.execute(statement).fetchall()


def test_conditions_leave_out_blocks(path: Path) -> None:
    """A statement about few events decodes few: seen in the columns that are really fetched."""
    with Trace(path) as trace, Database(trace) as database:
        opened: list[frozenset[str]] = []
        fetch = trace.block_events

        def watched(block: Block, columns: Iterable[str] | None = None) -> Events | None:
            opened.append(frozenset(columns or ()))
            return fetch(block, columns)

        trace.block_events = watched  # type: ignore[method-assign]
        for statement, blocks in (
            ("SELECT size FROM events WHERE process_id = 2", 1),
            ("SELECT size FROM events WHERE process_id = 1 AND seq < 100", 1),
            ("SELECT size FROM events WHERE process_id = 1 AND time > 1e12", 0),
            ("SELECT size, arg FROM events", 4),
        ):
            opened.clear()
            list(database.execute(statement)[1])
            assert len(opened) == blocks, statement
            assert all(wanted and "addr" not in wanted for wanted in opened)


def test_nodes_of_call_stacks_are_a_table(database: Database) -> None:
    statement = "SELECT node, parent, address, module_id FROM call_node WHERE process_id = 1"
    nodes = list(database.execute(statement + " ORDER BY node")[1])
    assert [node[:3] for node in nodes] == [(1, 0, 16), (2, 1, 32)]
    assert list(database.execute(statement + " AND node = 2")[1]) == nodes[1:]
    assert list(database.execute(statement + " AND node = 'x'")[1]) == []
    assert list(database.execute("SELECT count(*) FROM call_node WHERE process_id = 9")[1]) == [(0,)]
    joined = (
        "SELECT DISTINCT e.stack, m.path FROM events e JOIN call_node n"
        " ON (n.process_id, n.node) = (e.process_id, e.stack) JOIN module m ON m.id = n.module_id ORDER BY 1"
    )
    assert {path for _, path in database.execute(joined)[1]} == {"/bin/x"}


def test_tables_views_of_stacks_and_names_are_there(database: Database) -> None:
    assert list(database.execute("SELECT pid, events FROM process ORDER BY 1")[1]) == [(50, 140_000), (51, 3_000)]
    assert list(database.execute("SELECT stack(1, 2), stack(1, 9), stack('x', 1)")[1]) == [
        ("/bin/x+0x20\nmain", None, None)
    ]
    assert {Kind(i).name.lower() for i in (1, 2, 3, 4, 16)} == {
        row[0] for row in database.execute("SELECT DISTINCT kind_name FROM events")[1]
    }


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM process",
        "INSERT INTO events VALUES (1)",
        "UPDATE fact SET value = '1'",
        "CREATE TABLE x(a)",
        "CREATE TEMP TABLE x(a)",
        "DROP TABLE sample",
        "ATTACH '/etc/passwd' AS x",
        "PRAGMA writable_schema = 1",
        "PRAGMA query_only = 0",
        "VACUUM INTO '/tmp/copy'",
        "SELECT load_extension('x')",
        "SELECT zeroblob(1000000000)",
        "REINDEX",
        "BEGIN",
    ],
)
def test_nothing_but_reading_is_allowed(database: Database, path: Path, statement: str) -> None:
    before = path.read_bytes()
    with pytest.raises(UsageError) as told:
        list(database.execute(statement)[1])
    assert "\n" not in told.value.message
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "statement", ["", ";", "-- x", "SELEC 1", "SELECT nope FROM events", "SELECT 1; SELECT 2", "SELECT\0"]
)
def test_what_is_no_statement_is_told_in_one_line(database: Database, statement: str) -> None:
    with pytest.raises(UsageError, match="SQL: ") as told:
        list(database.execute(statement)[1])
    assert "\n" not in told.value.message


@pytest.mark.parametrize(
    "statement",
    [
        "WITH RECURSIVE a(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM a) SELECT count(*) FROM a",
        "SELECT count(*) FROM events a, events b, events c",
    ],
)
def test_a_statement_without_end_is_ended(path: Path, statement: str) -> None:
    with Trace(path) as trace, Database(trace, timeout_s=0.3) as database:
        began = time.monotonic()
        with pytest.raises(UsageError, match=r"longer than 0\.3 s"):
            list(database.execute(statement)[1])
        assert time.monotonic() - began < 5
        assert list(database.execute("SELECT 1")[1]) == [(1,)], "and the next one has its own time"


def test_the_command_prints_tables_json_and_csv(heapledger: Run, path: Path) -> None:
    statement = "SELECT kind_name AS kind, count(*) AS n, x'00ff' AS b, NULL AS void FROM events GROUP BY 1 ORDER BY 1"
    table = heapledger("sql", path, statement).stdout.splitlines()
    assert table[0].split() == ["kind", "n", "b", "void"]
    assert table[1].split()[:2] == [
        "calloc",
        str(json.loads(heapledger("sql", path, statement, "--format", "json").stdout.split("\n")[0])["n"]),
    ]
    csv = heapledger("sql", path, statement, "--format", "csv").stdout.splitlines()
    assert csv[0] == "kind,n,b,void"
    assert csv[1].startswith("calloc,")
    assert csv[1].endswith(",00ff,")
    piped = heapledger("sql", path, "-", input="SELECT 42")
    assert piped.stdout.split() == ["42", "42"]


def test_the_command_fails_with_one_line_and_status_2(heapledger: Run, path: Path) -> None:
    for arguments in ((path, "DROP TABLE fact"), (path, "nonsense"), (path.with_name("none"), "SELECT 1")):
        done = heapledger("sql", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("heapledger: ")
        assert "Traceback" not in done.stderr
