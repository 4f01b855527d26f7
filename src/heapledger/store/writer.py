"""Writing a trace file, while the traced program runs.

The file is an SQLite database in WAL mode until it is closed: a reader never blocks the writer, and after `kill -9` (of
the writer, or of everything) all that was flushed is there. `close` folds the log in and leaves one self-contained
file.

Not through SQLAlchemy: starting must cost nothing, and bulk rows go through the driver anyway (measured: 0.25 M rows/s
through SQLAlchemy Core, 1.4 M/s here). The tables are those of `store.schema`; `store.ddl` is generated from it.

Events come encoded (`append_block`: each is in the file for good as soon as may be) or as columns (`append_events`).
The latter are buffered per process and written 64k at a time. `flush` writes the rest as a block that is not full, and
replaces it when more has come, so that flushing often does not fragment the file; nodes of call stacks likewise. Only
where the buffers of many processes would add up do those that were idle since the last flush keep their short block.

With `background` a thread of the writer's encodes and writes events (`store.background`); all other rows are written by
the caller. Events of a process still reach the file in their order, and `flush` still means what it says.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heapledger import __version__
from heapledger.errors import HeapledgerError, InputError, SchemaError, UsageError
from heapledger.store import blocks, files, residency
from heapledger.store.background import Background, Task
from heapledger.store.ddl import APPLICATION_ID, SCHEMA_VERSION, TABLES

if TYPE_CHECKING:
    from heapledger.store.events import Events

#: What a column gets that the caller does not name (columns that may be NULL get NULL).
_DEFAULTS: dict[str, Any] = {"TEXT": "", "INTEGER": 0, "BOOLEAN": 0, "BLOB": b""}
_JSON_DEFAULTS = {"argv": "[]", "notes": "[]", "command": "[]"}
#: Events that may stay in memory after a flush, over all processes: 20 MiB.
_KEPT_EVENTS = 4 * blocks.BLOCK_EVENTS
#: Events that may wait for the background thread: 38 MiB.
_QUEUED_EVENTS = 8 * blocks.BLOCK_EVENTS
#: Flushes that nobody waits for are gathered for so long (s) at most.
_GATHER_S = 0.25


def signed(value: int) -> int:
    """A 64-bit value as SQLite stores it: two's complement."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


@dataclass(slots=True)
class _Buffer:
    """Events of one process on their way into blocks."""

    parts: list[Events] = field(default_factory=list)
    count: int = 0
    #: The row of the last block, if it is not full: it is replaced when more events have come. 0: there is none.
    open_block: int = 0
    #: Events that are in the file in `open_block` and also still in `parts`.
    written: int = 0

    def start_anew(self) -> None:
        """The next event begins a block."""
        self.parts = []
        self.count = self.written = self.open_block = 0


@dataclass(slots=True)
class _Nodes:
    """Nodes of one process's call stacks on their way into blocks, and the row of the last block if it is not full."""

    columns: list[array[int]] = field(default_factory=lambda: [array("q") for _ in range(4)])  # see add_nodes
    written: int = 0
    open_block: int = 0
    last: int = -(1 << 63)
    packer: blocks.Packer = field(default_factory=blocks.Packer)

    @property
    def count(self) -> int:
        return len(self.columns[0])


#: A row of the table frame: module_id, offset, depth, function, file, line.
FrameRow = tuple[int, int, int, str, str | None, int | None]


class TraceWriter:
    """The one writer of a trace file. Methods may be called from several threads.

    Every failure to write is a HeapledgerError, and the end of the writer: it takes nothing more, so that no event can
    be missing in the middle. What had been flushed before stays readable.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        source: str,
        command: Sequence[str],
        cwd: str = "",
        start_ns: int = 0,
        start_unix_ns: int = 0,
        host: Mapping[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        self._setup(Path(path), background)
        _make_way(self.path)
        with self._guard():
            self._connection = self._connect("rwc")
            # Before WAL mode and at once, so that the file itself says what it is from its first moment.
            marks = f"PRAGMA application_id = {APPLICATION_ID};PRAGMA user_version = {SCHEMA_VERSION};"
            self._connection.executescript(f"BEGIN;{marks}{TABLES}COMMIT;")
            self._start()
            self._insert(
                "session",
                heapledger_version=__version__,
                source=source,
                command=list(command),
                cwd=cwd,
                start_ns=start_ns,
                start_unix_ns=start_unix_ns,
                host=dict(host or {}),
            )
            self._commit()

    @classmethod
    def reopen(cls, path: str | os.PathLike[str]) -> TraceWriter:
        """Goes on with a file whose writer died. The session keeps its start; `close` gives it an end."""
        writer = cls.__new__(cls)
        writer._setup(files.path_of(path))
        files.version_of(writer.path)
        with files.damage_is_a_trace_error(writer.path):
            writer._connection = writer._connect("rw")
            files.configure(writer._connection)
            files.check_schema(writer._connection)
            writer._start()
            rows = writer._connection.execute("SELECT process_id, max(last_seq) FROM event_block GROUP BY 1")
            for process_id, last_seq in rows:
                writer._last_seq[process_id] = last_seq
            rows = writer._connection.execute("SELECT process_id, max(last_node) FROM node_block GROUP BY 1")
            for process_id, last in rows:
                writer._nodes[process_id] = _Nodes(last=last)
        return writer

    def _setup(self, path: Path, background: bool = False) -> None:
        self.path = path
        self.closed = False
        self._failed: HeapledgerError | None = None
        self._told = False  # a caller has seen the failure
        self._lock = threading.RLock()  # held around every use of the connection
        self._wants_background = background
        self._background: Background | None = None
        self._last_seq: dict[int, int] = {}  # by process, of the events handed over
        # Of whoever writes events: the background thread if there is one, else the caller.
        self._buffers: dict[int, _Buffer] = {}
        self._packers: dict[int, blocks.Packer] = {}
        self._nodes: dict[int, _Nodes] = {}  # with the lock held
        self._flushes_waiting = 0
        self._after_flush: list[Task] = []
        self._flushed_at = time.monotonic()
        self._columns: dict[str, dict[str, Any]] = {}
        self._insertions: dict[str, str] = {}
        self._next_block = self._next_node_block = 1

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = files.uri_of(self.path, mode)
        return sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)

    def _start(self) -> None:
        """WAL mode; the defaults of every column; the first free block id."""
        run = self._connection.execute
        run("PRAGMA journal_mode = WAL")
        # A flushed trace outlives the death of the writer at any level; NORMAL also keeps the file whole when power
        # fails. 4,000 pages: the log stays near 16 MiB.
        run("PRAGMA synchronous = NORMAL")
        run("PRAGMA wal_autocheckpoint = 4000")
        for table in files.known_tables():
            self._columns[table] = {}
            for _, name, kind, required, _, key in run(f"PRAGMA table_info({table})"):
                default = _JSON_DEFAULTS.get(name, "{}") if kind == "JSON" else _DEFAULTS[kind]
                self._columns[table][name] = default if required and not (key and name == "id") else None
        self._next_block = run("SELECT coalesce(max(id), 0) + 1 FROM event_block").fetchone()[0]
        self._next_node_block = run("SELECT coalesce(max(id), 0) + 1 FROM node_block").fetchone()[0]

    # ---- processes and what belongs to them

    def add_process(self, **fields: Any) -> int:
        """A row of `process`; fields that are not given are 0, empty or NULL. Returns its id."""
        with self._guard():
            return self._insert("process", **{"page_size": 4096, "start": "start", **fields})

    def update_process(self, process_id: int, **fields: Any) -> None:
        """Changes fields of a process."""
        with self._guard():
            self._update("process", process_id, fields)

    def add_note(self, process_id: int, note: str) -> None:
        """One more line to a process's notes."""
        with self._guard():
            sql = "UPDATE process SET notes = json_insert(notes, '$[#]', ?) WHERE id = ?"
            self._run(sql, (note, process_id))

    def add_threads(self, process_id: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds threads, or changes the given fields of those whose `number` is known."""
        by_fields: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for row in rows:
            by_fields.setdefault(tuple(row), []).append({"process_id": process_id, **row})
        with self._guard():
            for alike in by_fields.values():
                self._upsert("thread", ("process_id", "number"), alike)

    def add_modules(self, process_id: int, rows: Iterable[Mapping[str, Any]]) -> dict[int, int]:
        """Adds modules, or changes the given fields of those whose `number` is known. Returns number → module id."""
        with self._guard():
            numbers = []
            for row in rows:
                self._upsert("module", ("process_id", "number"), [{"process_id": process_id, **row}])
                numbers.append(int(row["number"]))
            known = dict(self._run("SELECT number, id FROM module WHERE process_id = ?", (process_id,)).fetchall())
            return {number: known[number] for number in numbers}

    def set_module_unload(self, process_id: int, number: int, unload_seq: int) -> None:
        """Module `number` was gone from `unload_seq` on."""
        with self._guard():
            sql = "UPDATE module SET unload_seq = ? WHERE process_id = ? AND number = ?"
            self._run(sql, (signed(unload_seq), process_id, number))

    def add_nodes(
        self,
        process_id: int,
        node: Iterable[int],
        parent: Iterable[int],
        address: Iterable[int],
        module_id: Iterable[int],
    ) -> None:
        """Nodes of the call-stack trie by ascending `node`, one column each; module_id <= 0: not known. Arrays of
        64-bit integers are taken as they are, others number by number.

        Nodes that are not behind all earlier ones of the process are known already, and left out. What was added
        is in the file with the next block of events that is written, or the next flush.
        """
        columns = [_column(values) for values in (node, parent, address, module_id)]
        with self._guard():
            nodes = self._nodes.setdefault(process_id, _Nodes())
            if columns[0] and columns[0][0] <= nodes.last:
                known = bisect_right(columns[0], nodes.last)
                columns = [column[known:] for column in columns]
            if not columns[0]:
                return
            nodes.last = columns[0][-1]
            for kept, column in zip(nodes.columns, columns, strict=True):
                kept.extend(column)
            if nodes.count >= blocks.BLOCK_NODES:
                self._write_nodes(process_id, nodes)

    def _write_nodes(self, process_id: int, nodes: _Nodes) -> None:
        """Writes what is not in the file, the first block in place of the one that held its beginning."""
        if nodes.count == nodes.written:
            return
        for low in range(0, nodes.count, blocks.BLOCK_NODES):
            part = [column[low : low + blocks.BLOCK_NODES] for column in nodes.columns]
            count = len(part[0])
            data = nodes.packer.pack(blocks.encode_nodes(*part))
            block_id = nodes.open_block or self._next_node_block
            self._next_node_block = max(self._next_node_block, block_id + 1)
            crc = blocks.checksum("nodes", count, data)
            row = (block_id, process_id, count, part[0][0], part[0][-1], crc, data)
            self._run("INSERT OR REPLACE INTO node_block VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            nodes.open_block = block_id if count < blocks.BLOCK_NODES else 0
        rest = nodes.count % blocks.BLOCK_NODES
        nodes.columns = [column[len(column) - rest :] for column in nodes.columns]
        nodes.written = rest

    def add_frames(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Resolved symbols: module_id, offset, depth, function, file, line. Known ones are replaced."""
        self.add_frame_rows(
            (
                int(row["module_id"]),
                int(row["offset"]),
                row.get("depth", 0),
                row.get("function") or "",
                row.get("file"),
                row.get("line"),
            )
            for row in rows
        )

    def add_frame_rows(self, rows: Iterable[FrameRow]) -> None:
        """As `add_frames`, for who has very many."""
        sql = (
            'INSERT INTO frame (module_id, "offset", depth, function, file, line) VALUES (?, ?, ?, ?, ?, ?)'
            ' ON CONFLICT (module_id, "offset", depth)'
            " DO UPDATE SET function = excluded.function, file = excluded.file, line = excluded.line"
        )
        with self._guard():
            self._begin()
            self._connection.executemany(
                sql,
                (
                    (
                        module_id,
                        signed(offset),
                        depth,
                        function if function.isascii() else _readable(function),
                        file if file is None or file.isascii() else _readable(file),
                        line,
                    )
                    for module_id, offset, depth, function, file, line in rows
                ),
            )

    def add_sample(self, process_id: int, **fields: Any) -> None:
        """One reading of the process's counters."""
        with self._guard():
            self._insert("sample", process_id=process_id, **fields)

    def add_snapshot(self, process_id: int, vmas: Iterable[Mapping[str, Any]], **fields: Any) -> int:
        """A snapshot and its VMAs. A VMA's `runs` is a blob of `store.residency`, or a pair (pages, category)."""
        with self._guard():
            snapshot_id = self._insert("snapshot", process_id=process_id, **fields)
            rows = []
            for vma in vmas:
                row = {**self._columns["snapshot_vma"], "snapshot_id": snapshot_id, **vma}
                if not isinstance(row["runs"], bytes):
                    row["runs"] = residency.encode_runs(*row["runs"])
                rows.append(self._values("snapshot_vma", row))
            self._connection.executemany(self._insertion("snapshot_vma"), rows)
            return snapshot_id

    def copy_snapshot(self, snapshot_id: int, **fields: Any) -> int:
        """The same snapshot again, but for these fields. Returns its id."""
        with self._guard():
            others = ", ".join(f'"{name}"' for name in self._columns["snapshot"] if name not in ("id", *fields))
            names = ", ".join(f'"{name}"' for name in fields)
            sql = (
                f"INSERT INTO snapshot ({names}, {others})"
                f" SELECT {', '.join('?' * len(fields))}, {others} FROM snapshot WHERE id = ?"
            )
            copy_id = int(self._run(sql, [*self._values("snapshot", fields), snapshot_id]).lastrowid or 0)
            rest = ", ".join(f'"{name}"' for name in self._columns["snapshot_vma"] if name != "snapshot_id")
            into = f"INSERT INTO snapshot_vma (snapshot_id, {rest})"
            self._run(f"{into} SELECT ?, {rest} FROM snapshot_vma WHERE snapshot_id = ?", (copy_id, snapshot_id))
            return copy_id

    def delete_snapshot(self, snapshot_id: int) -> None:
        """Forgets a snapshot: a later peak was higher."""
        with self._guard():
            self._run("DELETE FROM snapshot_vma WHERE snapshot_id = ?", (snapshot_id,))
            self._run("DELETE FROM snapshot WHERE id = ?", (snapshot_id,))

    def set_collector(self, collector: Mapping[str, Any]) -> None:
        """What collecting cost: session.collector."""
        with self._guard():
            self._update("session", 1, {"collector": dict(collector)})

    # ---- events

    def append_block(self, process_id: int, block: blocks.Block, then: Task | None = None) -> None:
        """A block that is encoded already, behind all earlier events of the process.

        It is compressed, written and committed, by the background thread if there is one; after that `then` is called,
        by the same thread. If it fails, never.
        """
        if not block.count:
            return
        self._expect(process_id, block.first_seq, block.last_seq)
        self._do(partial(self._take_block, process_id, block, then), block.count)

    def append_events(self, process_id: int, events: Events) -> None:
        """More events of a process: behind all earlier ones, by ascending seq. Full blocks go to the file at once."""
        if not len(events):
            return
        seq = events.seq
        if not bool((seq[1:] > seq[:-1]).all()):
            raise HeapledgerError(f"events of process {process_id} came out of order near seq {int(seq[0])}")
        self._expect(process_id, int(seq[0]), int(seq[-1]))
        self._do(partial(self._take_events, process_id, events), len(events))

    def _expect(self, process_id: int, first_seq: int, last_seq: int) -> None:
        """Events from `first_seq` to `last_seq` come now."""
        with self._guard():
            if not self._last_seq.get(process_id, -1) < first_seq <= last_seq:
                raise HeapledgerError(f"events of process {process_id} came out of order near seq {first_seq}")
            self._last_seq[process_id] = last_seq
            if self._wants_background and self._background is None:
                self._background = Background("writer", _QUEUED_EVENTS, self._note_failure)

    def _do(self, task: Task, weight: int = 0) -> None:
        """Now, or by the background thread behind all that was handed to it. Never with the lock held: to wait for the
        thread would be to wait for ourselves."""
        if self._background is None:
            with self._lock:
                task()
        else:
            self._background.put(task, weight)

    def _note_failure(self, error: Exception) -> None:
        """The background thread cannot go on: the next call says why."""
        if self._failed is None:
            what = error if isinstance(error, HeapledgerError) else None
            self._failed = what or HeapledgerError(f"cannot write {str(self.path)!r}: {type(error).__name__}: {error}")

    def _take_events(self, process_id: int, events: Events) -> None:
        buffer = self._buffers.setdefault(process_id, _Buffer())
        buffer.parts.append(events)
        buffer.count += len(events)
        if buffer.count >= blocks.BLOCK_EVENTS:
            self._write_full_blocks(process_id, buffer)

    def _write_full_blocks(self, process_id: int, buffer: _Buffer) -> None:
        events = _joined(buffer.parts)
        low = 0
        while len(events) - low >= blocks.BLOCK_EVENTS:
            self._write_block(process_id, buffer, events.take(slice(low, low + blocks.BLOCK_EVENTS)))
            buffer.open_block = buffer.written = 0
            low += blocks.BLOCK_EVENTS
        buffer.parts = [events.take(slice(low, None))]
        buffer.count = len(events) - low

    def _write_block(self, process_id: int, buffer: _Buffer, events: Events) -> int:
        """Writes a block, in place of the one that held its beginning. Returns its id."""
        block = blocks.encode_events(events)
        return self._store_block(process_id, block, block_id=buffer.open_block, counted=buffer.written)

    def _take_block(self, process_id: int, block: blocks.Block, then: Task | None) -> None:
        buffer = self._buffers.get(process_id)
        if buffer is not None:
            if buffer.count > buffer.written:
                self._write_block(process_id, buffer, _joined(buffer.parts))
            buffer.start_anew()
        self._store_block(process_id, block)
        with self._guard():
            self._commit()
        if then is not None:
            then()

    def _store_block(self, process_id: int, block: blocks.Block, block_id: int = 0, counted: int = 0) -> int:
        """A row for the block, new or in place of `block_id`, of whose events the process has `counted` already; and
        the stacks it may name. Returns its id."""
        data = self._packers.setdefault(process_id, blocks.Packer()).pack(block.streams)
        crc = blocks.checksum("events", block.count, data)
        with self._guard():
            if (nodes := self._nodes.get(process_id)) is not None:
                self._write_nodes(process_id, nodes)
            if not block_id:
                block_id = self._next_block
                self._next_block += 1
            header = (block_id, process_id, block.count, block.first_seq, block.last_seq, block.first_ns, block.last_ns)
            sql = "INSERT OR REPLACE INTO event_block VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            self._run(sql, (*map(signed, header), crc, data))
            sql = "UPDATE process SET events = events + ? WHERE id = ?"
            self._run(sql, (block.count - counted, process_id))
        return block_id

    # ---- the file

    def flush(self) -> None:
        """Everything handed over so far is in the file when this returns, and survives the death of the writer."""
        with self._guard():
            pass  # it can still be written to
        self._do(self._flush_now)
        if self._background is not None:
            self._background.drain()
            with self._guard():
                pass  # it could be written

    def flush_soon(self, then: Callable[[], object] | None = None) -> None:
        """`flush` without waiting for it: `then` is called, perhaps by another thread, when it is done; never if it
        fails. Flushes that follow closely are done as one."""
        with self._guard():
            self._flushes_waiting += 1
        self._do(partial(self._flush_gathered, then))

    def _flush_gathered(self, then: Task | None) -> None:
        if then is not None:
            self._after_flush.append(then)
        with self._lock:
            self._flushes_waiting -= 1
            more = self._flushes_waiting > 0
        if not more or time.monotonic() - self._flushed_at > _GATHER_S:
            self._flush_now()

    def _flush_now(self) -> None:
        idle = [buffer for buffer in self._buffers.values() if buffer.count == buffer.written]
        for process_id, buffer in self._buffers.items():
            if buffer.count > buffer.written:
                buffer.parts = [_joined(buffer.parts)]
                buffer.open_block = self._write_block(process_id, buffer, buffer.parts[0])
                buffer.written = buffer.count
        with self._guard():
            for process_id, nodes in self._nodes.items():
                self._write_nodes(process_id, nodes)
            self._commit()
        if sum(buffer.count for buffer in self._buffers.values()) > _KEPT_EVENTS:
            for buffer in idle:
                buffer.start_anew()
        self._flushed_at = time.monotonic()
        done, self._after_flush = self._after_flush, []
        for then in done:
            then()

    def close(self, end_ns: int | None = None) -> None:
        """Flushes, and leaves one self-contained file. `end_ns` (since the session's start) None: it was cut off."""
        if self.closed:
            return
        was_told = self._told
        try:
            if self._failed is None:
                with contextlib.suppress(HeapledgerError):  # told below
                    self.flush()
            if self._background is not None:
                self._background.close()
            if self._failed is not None:
                self._connection.rollback()  # what is not whole goes
                if not was_told:
                    raise self._failed
                return
            with self._guard():
                self._update("session", 1, {"end_ns": end_ns})
                self._commit()
                self._fold_in_the_log()
        finally:
            self.closed = True
            self._connection.close()

    def _fold_in_the_log(self) -> None:
        """Leaves WAL mode; while somebody reads that is not allowed, but the log's content can still be moved."""
        self._connection.execute("PRAGMA busy_timeout = 200")
        try:
            self._connection.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY":
                raise
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        """Leaving through an exception closes the file as well, as a session that was cut off."""
        if kind is None:
            self.close()
            return
        with contextlib.suppress(HeapledgerError):  # the first error is the one to be told
            self.close()

    # ---- rows

    def _begin(self) -> None:
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")

    def _commit(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("COMMIT")

    def _run(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        self._begin()
        return self._connection.execute(sql, values)

    def _values(self, table: str, fields: Mapping[str, Any]) -> list[Any]:
        known = self._columns[table]
        if not fields.keys() <= known.keys():
            raise TypeError(f"table {table} has no column {', '.join(sorted(fields.keys() - known.keys()))}")
        return [_plain(value) for value in fields.values()]

    def _insertion(self, table: str) -> str:
        """The statement that adds a whole row."""
        if table not in self._insertions:
            names = self._columns[table]
            self._insertions[table] = f"INSERT INTO {table} ({_names(names)}) VALUES ({', '.join('?' * len(names))})"
        return self._insertions[table]

    def _insert(self, table: str, **fields: Any) -> int:
        values = self._values(table, {**self._columns[table], **fields})
        return int(self._run(self._insertion(table), values).lastrowid or 0)

    def _update(self, table: str, row_id: int, fields: Mapping[str, Any]) -> None:
        if fields:
            sets = ", ".join(f'"{name}" = ?' for name in fields)
            self._run(f"UPDATE {table} SET {sets} WHERE id = ?", [*self._values(table, fields), row_id])

    def _upsert(self, table: str, keys: tuple[str, ...], rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that give the same fields; of a row that is there already, only these are changed."""
        sets = ", ".join(f'"{name}" = excluded."{name}"' for name in rows[0])
        values = [self._values(table, {**self._columns[table], **row}) for row in rows]
        self._begin()
        self._connection.executemany(
            f"{self._insertion(table)} ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {sets}", values
        )

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """One caller at a time; SQLite's errors become ours, with what to do about them."""
        with self._lock:
            if self._failed is not None:
                self._told = True
                raise self._failed
            if self.closed:
                raise HeapledgerError(f"{str(self.path)!r} has been closed")
            try:
                yield
            except sqlite3.Error as error:
                self._failed = _write_error(self.path, error)
                self._told = self._background is None or not self._background.is_here()
                raise self._failed from error


def _column(values: Iterable[int]) -> array[int]:
    if isinstance(values, array) and values.typecode == "q":
        return values
    return array("q", (signed(int(value)) for value in values))


def _joined(parts: list[Events]) -> Events:
    from heapledger.store.events import Events

    return Events.concat(parts)


def _names(row: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in row)


def _plain(value: Any) -> Any:
    """A value as the driver takes it: numpy scalars and wide integers become signed ints, lists and dicts JSON."""
    kind = type(value)
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else signed(value)
    if value is None or kind is bytes or (kind is str and value.isascii()):
        return value
    if isinstance(value, int):
        return signed(int(value))
    if isinstance(value, list | tuple | dict):
        return json.dumps(_readable(value))
    if (item := getattr(value, "item", None)) is not None:
        return _plain(item())
    return _readable(value)


def _readable(value: Any) -> Any:
    """Names from /proc and the environment may hold bytes that are not UTF-8 (lone surrogates): they become `\\xe9`."""
    if isinstance(value, str) and not value.isascii():
        try:
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:
            return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list | tuple):
        return [_readable(item) for item in value]
    if isinstance(value, dict):
        return {_readable(key): _readable(item) for key, item in value.items()}
    return value


def _write_error(path: Path, error: sqlite3.Error) -> HeapledgerError:
    code = getattr(error, "sqlite_errorname", "")
    if code == "SQLITE_FULL" or "disk I/O" in str(error):
        hint = "free some space or choose another place with -o; what was written before is readable"
        return HeapledgerError(f"cannot write {str(path)!r}: the disk is full, or failed ({error})", hint=hint)
    if code.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")):
        return UsageError(f"cannot write {str(path)!r} ({error})", hint="choose another place with -o")
    return HeapledgerError(f"cannot write {str(path)!r} ({error})")


def _make_way(path: Path) -> None:
    """Removes an older trace of this name; anything else is left alone and refused."""
    try:
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise UsageError(f"{str(path)!r} is not a file", hint="name a file with -o")
        if path.exists():
            if path.stat().st_size:
                _refuse_unless_trace(path)
            path.unlink()
        for suffix in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write {str(path)!r}: {error.strerror}", hint="choose another place with -o"
        ) from error


def _refuse_unless_trace(path: Path) -> None:
    try:
        files.version_of(path)
    except SchemaError:
        return  # a trace of another version is a trace
    except InputError as error:
        raise UsageError(
            f"{str(path)!r} exists and is not a trace file; it is left alone", hint="name another file with -o"
        ) from error
