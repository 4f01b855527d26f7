"""Reading a trace file: rows through SQLAlchemy, events block by block, and the analyzer's results.

Everything in a file is checked before it is believed (`store.files`, the checksums of `store.blocks`). Blocks that are
damaged are left out, and listed in `Trace.damaged`: nothing is lost in silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import sqlalchemy
from sqlalchemy import orm
from sqlalchemy.pool import StaticPool

from heapledger.errors import TraceError, UsageError
from heapledger.store import blocks, files, residency
from heapledger.store.events import COLUMNS, Events
from heapledger.store.pyramid import Buckets, Pyramid, decode_level, encode_level
from heapledger.store.schema import Base, Fact, Module, Process, Sample, Session, Snapshot, SnapshotVma, Thread

Int64s = npt.NDArray[np.int64]

#: One statement may take this long: a file can be made so that a query on it takes forever.
STATEMENT_SECONDS = 120.0

#: What a node's address means where it is not an address.
_MARKS = {1: "[frames cut here]", 2: "[stack could not be unwound further]"}
_U64 = (1 << 64) - 1


@dataclass(slots=True, frozen=True)
class StackFrame:
    """One function of a call stack."""

    function: str  #: demangled; "" if not known
    file: str | None
    line: int | None
    module: str  #: path of the object; "" if not known
    address: int  #: return address; the call is the instruction before it
    inlined: bool  #: the compiler put it into the next outer function


@dataclass(slots=True, frozen=True)
class Damage:
    """Events that are in the file but cannot be read."""

    process_id: int
    block_id: int
    first_seq: int
    last_seq: int
    events: int
    reason: str


@dataclass(frozen=True)
class Vma:
    """A row of `snapshot_vma`."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str
    vm_flags: str
    rss_bytes: int
    pss_bytes: int
    swap_bytes: int
    private_bytes: int
    anonymous_bytes: int
    encoded_runs: bytes = dataclasses.field(repr=False)

    @cached_property
    def runs(self) -> tuple[residency.Pages, residency.Categories]:
        """(pages, category) of the runs that tile the VMA; see `store.residency`. Decoded when first asked for."""
        return residency.decode_runs(self.encoded_runs)


@dataclass(slots=True)
class Nodes:
    """A process's trie of call stacks, sorted by node."""

    node: Int64s
    parent: Int64s
    address: Int64s
    module_id: Int64s


@dataclass(slots=True, frozen=True)
class Block:
    """A row of `event_block`: up to 64k events of one process."""

    process_id: int
    id: int
    count: int
    first_seq: int
    last_seq: int
    first_ns: int
    last_ns: int


@dataclass(slots=True, frozen=True)
class StreamSize:
    """What one stream of all blocks of a process takes."""

    process_id: int
    what: str  #: "event" or "node"
    name: str
    bytes: int  #: in the file
    raw_bytes: int  #: before compression


_Row = TypeVar("_Row", bound=Base)


class Trace:
    """An open trace file. Reading is safe from several threads.

    The file itself is never written, except by `save_fact` and `save_pyramid`; where it cannot be, results live in
    memory as long as the Trace.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = files.path_of(path)
        self.damaged: list[Damage] = []
        self._lock = threading.RLock()
        self._folder: Path | None = None  # of a private copy
        self._deadline = 0.0
        self._facts: dict[tuple[int, str], tuple[str, dict[str, Any]]] = {}
        self._pyramids: dict[tuple[int, str], tuple[str, Pyramid]] = {}
        self._nodes: dict[int, Nodes] = {}
        self._stacks: dict[tuple[int, int], list[StackFrame]] = {}
        self._frames: dict[tuple[int, int], list[tuple[str, str | None, int | None]]] = {}
        self._closed = False
        with files.damage_is_a_trace_error(self.path):
            self._connection = self._open()
        try:
            self._connection.set_progress_handler(self._too_long, 100_000)
            self._engine = sqlalchemy.create_engine("sqlite://", creator=lambda: self._connection, poolclass=StaticPool)
            self._orm = orm.Session(self._engine, expire_on_commit=False, autoflush=False)
            self.session = self._only_session()
        except BaseException:
            self.close()
            raise

    # ---- opening and closing

    def _open(self) -> sqlite3.Connection:
        files.version_of(self.path)
        try:
            connection = files.connect_read_only(self.path)
        except sqlite3.OperationalError:
            # A writer died and left its log, and the folder cannot be written: only a copy can take the log in.
            return self._open_copy()
        try:
            files.check_schema(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _open_copy(self) -> sqlite3.Connection:
        copy = files.copy_aside(self.path)
        self._folder = copy.parent
        try:
            with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as connection:
                files.configure(connection)
                files.check_schema(connection)
            return files.connect_read_only(copy)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def close(self) -> None:
        """Lets go of the file. Closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if hasattr(self, "_orm"):
                self._orm.close()
                self._engine.dispose()
            self._connection.close()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def readable_path(self) -> Path:
        """The file that is really open: `path`, or the private copy of it."""
        return self.path if self._folder is None else self._folder / "trace"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *rest: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A Trace that was never closed must not leave its private copy behind, nor warn about the connection.
        if hasattr(self, "_connection"):
            self.close()

    def _too_long(self) -> int:
        return int(time.monotonic() > self._deadline)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One reader at a time, one state of the file, SQLite's complaints as TraceError."""
        with self._lock:
            if self._closed:
                raise TraceError(f"{str(self.path)!r} has been closed")
            self._deadline = time.monotonic() + STATEMENT_SECONDS
            try:
                with files.damage_is_a_trace_error(self.path):
                    yield self._connection
            finally:
                if self._connection.in_transaction:
                    self._connection.rollback()

    def _rows(self, sql: str, values: Iterable[Any] = ()) -> list[Any]:
        with self._reading() as connection:
            return connection.execute(sql, tuple(values)).fetchall()

    def _entities(self, statement: sqlalchemy.Select[_Row]) -> list[_Row]:
        """Rows as detached objects of `store.schema`, each value of the type its column promises."""
        with self._reading():
            try:
                rows = list(self._orm.scalars(statement))
                self._orm.expunge_all()
            except sqlalchemy.exc.DBAPIError as error:
                raise TraceError(f"{str(self.path)!r} is damaged ({files.one_line(error.orig)})") from error
            except (ValueError, TypeError) as error:
                raise TraceError(
                    f"{str(self.path)!r} is damaged (a value cannot be read: {files.one_line(error)})"
                ) from error
            finally:
                self._orm.rollback()
        for row in rows:
            _check_types(row)
        return rows

    # ---- ordinary rows

    def _only_session(self) -> Session:
        sessions = self._entities(sqlalchemy.select(Session))
        if len(sessions) != 1:
            raise TraceError(f"{str(self.path)!r} holds {len(sessions)} sessions instead of one")
        return sessions[0]

    def processes(self) -> list[Process]:
        """All process images: the main one (see `process`) first, the rest in the order they started."""
        processes = self._entities(sqlalchemy.select(Process).order_by(Process.start_ns, Process.id))
        if processes:
            main = max(processes, key=lambda process: process.events)  # the first of several with as many
            processes.remove(main)
            processes.insert(0, main)
        return processes

    def process(self, selector: int | None = None) -> Process:
        """The process with this pid, or else this id. None: the main one, that is the one with most events.

        A pid that several images had (exec) means the one of them with most events.
        """
        processes = self.processes()
        if not processes:
            raise TraceError(f"{str(self.path)!r} holds no process")
        if selector is None:
            return processes[0]
        with_pid = [process for process in processes if process.pid == selector]
        if with_pid:
            return max(with_pid, key=lambda process: process.events)
        for process in processes:
            if process.id == selector:
                return process
        pids = ", ".join(str(process.pid) for process in processes[:10])
        raise UsageError(f"the trace holds no process {selector}", hint=f"it holds {pids}; see `heapledger info`")

    def threads(self, process_id: int) -> list[Thread]:
        """Threads by number; 0 is the main one."""
        return self._entities(sqlalchemy.select(Thread).where(Thread.process_id == process_id).order_by(Thread.number))

    def modules(self, process_id: int) -> list[Module]:
        """Loaded objects by number, unloaded ones included."""
        return self._entities(sqlalchemy.select(Module).where(Module.process_id == process_id).order_by(Module.number))

    def snapshots(self, process_id: int) -> list[Snapshot]:
        """Residency snapshots by time."""
        statement = sqlalchemy.select(Snapshot).where(Snapshot.process_id == process_id)
        return self._entities(statement.order_by(Snapshot.time_ns, Snapshot.id))

    def snapshot(self, process_id: int, reason: str) -> Snapshot | None:
        """The last snapshot with this reason ("exit", "peak" ...), if there is one."""
        found = [snapshot for snapshot in self.snapshots(process_id) if snapshot.reason == reason]
        return found[-1] if found else None

    def vmas(self, snapshot_id: int) -> list[Vma]:
        """The VMAs of a snapshot by ascending address."""
        statement = sqlalchemy.select(SnapshotVma).where(SnapshotVma.snapshot_id == snapshot_id)
        names = [field.name for field in dataclasses.fields(Vma) if field.name != "encoded_runs"]
        vmas = [
            Vma(**{name: getattr(row, name) for name in names}, encoded_runs=row.runs)
            for row in self._entities(statement)
        ]
        return sorted(vmas, key=lambda vma: vma.start)

    def samples(self, process_id: int) -> dict[str, Int64s]:
        """Counters over time: column → array, all of equal length, by time. What was not read is -1."""
        rows = self._rows(f"SELECT {', '.join(_SAMPLE)} FROM sample WHERE process_id = ? ORDER BY 1, id", (process_id,))
        try:
            table = np.array([[-1 if v is None else v for v in row] for row in rows], np.int64)
        except (ValueError, TypeError, OverflowError) as error:
            raise TraceError(f"{str(self.path)!r} is damaged (a sample is not a number)") from error
        return dict(zip(_SAMPLE, table.reshape(-1, len(_SAMPLE)).T.copy(), strict=True))

    # ---- events

    @property
    def event_count(self) -> int:
        """Events of all processes, damaged ones included."""
        return int(self._rows("SELECT coalesce(sum(count), 0) FROM event_block")[0][0])

    def events(
        self,
        process_id: int,
        columns: Iterable[str] | None = None,
        first_seq: int | None = None,
        last_seq: int | None = None,
    ) -> Iterator[Events]:
        """The events of a process with first_seq <= seq <= last_seq, in seq order, up to 64k at a time.

        Columns not in `columns` (None: all) are zeros, and cost nothing. Damaged blocks are left out and listed in
        `damaged`.
        """
        wanted = set(COLUMNS if columns is None else columns)
        if not wanted <= COLUMNS.keys():
            raise ValueError(f"events have no columns {sorted(wanted - COLUMNS.keys())}")
        low, high = first_seq or 0, _U64 if last_seq is None else last_seq
        for block in self.event_blocks(process_id):
            if block.last_seq < low or block.first_seq > high:
                continue
            cut = block.first_seq < low or block.last_seq > high
            events = self.block_events(block, wanted | {"seq"} if cut else wanted)
            if events is None:
                continue
            if cut:
                inside = (events.seq >= np.uint64(low)) & (events.seq <= np.uint64(high))
                events = events.take(inside)
                if "seq" not in wanted:
                    events.seq[:] = 0
            if len(events):
                yield events

    def stream_sizes(self) -> list[StreamSize]:
        """What each stream of the blocks of each process takes in the file, the largest first."""
        found: dict[tuple[int, str, str], list[int]] = {}
        for what in ("event", "node"):
            for process_id, block_id in self._rows(f"SELECT process_id, id FROM {what}_block"):
                try:
                    _, _, blob = self._blob(f"{what}_block", block_id)
                    entries = blocks.directory(blob)
                except TraceError:
                    continue  # opening it reports it
                for entry in entries:
                    sizes = found.setdefault((process_id, what, entry.name), [0, 0])
                    sizes[0] += entry.high - entry.low
                    sizes[1] += entry.raw_bytes
        sizes_of = [StreamSize(*key, *sizes) for key, sizes in found.items()]
        return sorted(sizes_of, key=lambda size: (size.process_id, -size.bytes, size.name))

    def event_blocks(self, process_id: int) -> list[Block]:
        """What is known about a process's blocks without opening them, in seq order."""
        sql = "SELECT id, count, first_seq, last_seq, first_ns, last_ns FROM event_block WHERE process_id = ?"
        found = []
        for row in self._rows(sql, (process_id,)):
            if not all(isinstance(value, int) for value in row):
                raise TraceError(f"{str(self.path)!r} is damaged (the list of event blocks)")
            found.append(Block(process_id, row[0], row[1], *(value & _U64 for value in row[2:])))
        return sorted(found, key=lambda block: block.first_seq)

    def block_events(self, block: Block, columns: Iterable[str] | None = None) -> Events | None:
        """A block's events, as `events` gives them; None (and an entry in `damaged`) if it cannot be read."""
        wanted = set(COLUMNS if columns is None else columns)
        try:
            count, crc, blob = self._blob("event_block", block.id)
            events = blocks.decode_events(count, crc, blob, wanted)
            if "seq" in wanted and count and (int(events.seq[0]), count) != (block.first_seq, block.count):
                raise TraceError("a block is not what the list of blocks says")
        except TraceError as error:
            self._report(block, error.message)
            return None
        return events

    def _blob(self, table: str, block_id: int) -> tuple[int, int, bytes]:
        """(count, crc, data) of a row of `event_block` or `node_block`."""
        rows = self._rows(f"SELECT count, crc, data FROM {table} WHERE id = ?", (block_id,))
        if len(rows) != 1:
            raise TraceError("the block is not in the list of blocks")
        count, crc, blob = rows[0]
        if [type(count), type(crc), type(blob)] != [int, int, bytes]:
            raise TraceError("the block is damaged")
        return count, crc, blob

    def _report(self, block: Block, reason: str) -> None:
        if all(damage.block_id != block.id for damage in self.damaged):
            self.damaged.append(
                Damage(block.process_id, block.id, block.first_seq, block.last_seq, block.count, reason)
            )

    def check(self) -> list[Damage]:
        """Opens every block, for the list of what is damaged."""
        for process in self.processes():
            for _ in self.events(process.id):
                pass
        return self.damaged

    # ---- call stacks

    def stack(self, process_id: int, node: int) -> list[StackFrame]:
        """The frames of a stack, innermost first; [] for node 0 and for one that is not in the file."""
        key = (process_id, node)
        with self._lock:
            if key not in self._stacks:
                self._stacks[key] = list(self._walk(process_id, node))
            return self._stacks[key]

    def frames(self, process_id: int, node: int) -> Iterator[StackFrame]:
        """As `stack`, frame by frame: for who needs only the innermost ones of very many stacks."""
        with self._lock:
            if process_id not in self._nodes:
                self._load_nodes(process_id)
        return self._walk(process_id, node)

    def _walk(self, process_id: int, node: int) -> Iterator[StackFrame]:
        if process_id not in self._nodes:
            self._load_nodes(process_id)
        nodes = self._nodes[process_id]
        while node > 0:
            at = int(np.searchsorted(nodes.node, node))
            if at == len(nodes.node) or nodes.node[at] != node:
                return
            yield from self._frames_of(int(nodes.address[at]) & _U64, int(nodes.module_id[at]))
            parent = int(nodes.parent[at])
            # Parents are older than their children; a file in which they are not has a loop in it.
            node = parent if parent < node else 0

    def nodes(self, process_id: int) -> Nodes:
        """The whole trie of a process, for who looks at very many stacks at once."""
        with self._lock:
            if process_id not in self._nodes:
                self._load_nodes(process_id)
            return self._nodes[process_id]

    def frames_at(self, address: int, module_id: int) -> list[StackFrame]:
        """What the `address` and `module_id` of a node mean: the functions inlined there, the real one last."""
        with self._lock:
            return list(self._frames_of(address & _U64, module_id))

    def _load_nodes(self, process_id: int) -> None:
        parts: list[Sequence[Int64s]] = []
        rows = self._rows("SELECT first_node, id FROM node_block WHERE process_id = ? ORDER BY 1", (process_id,))
        for first, block_id in rows:
            columns = blocks.decode_nodes(*self._blob("node_block", block_id))
            before = parts[-1][0][-1] if parts else -(1 << 63)
            if first != columns[0][0] or columns[0][0] <= before or np.any(columns[0][1:] <= columns[0][:-1]):
                raise TraceError(f"{str(self.path)!r} is damaged (call stacks out of order)")
            parts.append(columns)
        nothing = [np.zeros(0, np.int64)] * 4
        self._nodes[process_id] = Nodes(*map(np.concatenate, zip(nothing, *parts, strict=True)))

    @cached_property
    def _modules(self) -> dict[int, tuple[str, int]]:
        """Module id → (path, bias)."""
        return {row.id: (row.path, row.bias) for row in self._entities(sqlalchemy.select(Module))}

    def _frames_of(self, address: int, module_id: int) -> Iterator[StackFrame]:
        if address in _MARKS:
            yield StackFrame(_MARKS[address], None, None, "", 0, False)
            return
        path, bias = self._modules.get(module_id, ("", 0))
        symbols = self._symbols(module_id, (address - bias) & _U64) or [("", None, None)]
        for depth, (function, file, line) in enumerate(symbols):
            yield StackFrame(function, file, line, path, address, depth < len(symbols) - 1)

    def _symbols(self, module_id: int, offset: int) -> list[tuple[str, str | None, int | None]]:
        key = (module_id, offset)
        if key not in self._frames:
            sql = 'SELECT function, file, line FROM frame WHERE module_id = ? AND "offset" = ? ORDER BY depth'
            self._frames[key] = [
                (str(function), None if file is None else str(file), line if isinstance(line, int) else None)
                for function, file, line in self._rows(sql, (module_id, _signed(offset)))
            ]
        return self._frames[key]

    def site(self, process_id: int, node: int) -> tuple[str, str, int]:
        """(path of the object, function, offset in the object) of a stack's innermost frame; ("", "", 0): unknown."""
        if process_id not in self._nodes:
            self._load_nodes(process_id)
        nodes = self._nodes[process_id]
        at = int(np.searchsorted(nodes.node, node))
        frames = self.stack(process_id, node)
        if not frames:
            return "", "", 0
        path, bias = self._modules.get(int(nodes.module_id[at]), ("", 0))
        return path, frames[0].function, (int(nodes.address[at]) - bias) & _U64

    def addresses(self, process_id: int) -> Iterator[tuple[int, int, int]]:
        """(module_id, offset in it, address) of every node whose module is known: what symbols are wanted for."""
        if process_id not in self._nodes:
            self._load_nodes(process_id)
        nodes = self._nodes[process_id]
        for module_id, address in zip(nodes.module_id.tolist(), nodes.address.tolist(), strict=True):
            if module_id in self._modules:
                yield module_id, (address - self._modules[module_id][1]) & _U64, address & _U64

    # ---- results of the analyzer

    def fact(self, process_id: int, name: str, version: str | None = None) -> dict[str, Any] | None:
        """A stored result; None if there is none, or none by this analyzer version."""
        if (process_id, name) in self._facts:
            found, value = self._facts[process_id, name]
            return value if version in (None, found) else None
        statement = sqlalchemy.select(Fact).where(Fact.process_id == process_id, Fact.name == name)
        for row in self._entities(statement):
            if version in (None, row.analyzer_version):
                return row.value
        return None

    def save_fact(self, process_id: int, name: str, version: str, value: dict[str, Any]) -> bool:
        """Stores a result in place of an older one. False: the file cannot be written, it is kept in memory."""
        self._facts[process_id, name] = (version, value)
        row = (process_id, name, version, json.dumps(value))
        return self._write([("INSERT OR REPLACE INTO fact VALUES (?, ?, ?, ?)", row)])

    def pyramid(self, process_id: int, series: str, version: str | None = None) -> Pyramid | None:
        """A stored timeline; None if there is none, or none by this analyzer version."""
        if (process_id, series) in self._pyramids:
            found, pyramid = self._pyramids[process_id, series]
            return pyramid if version in (None, found) else None
        rows = self._rows(
            "SELECT level, buckets, analyzer_version FROM pyramid WHERE process_id = ? AND series = ? ORDER BY level",
            (process_id, series),
        )
        if not rows or [row[0] for row in rows] != list(range(len(rows))):
            return None
        if any(version not in (None, row[2]) or not isinstance(row[1], int) for row in rows):
            return None
        return Pyramid([row[1] for row in rows], lambda level: self._level(process_id, series, level))

    def series(self, process_id: int) -> list[str]:
        """Names of the timelines that are stored for a process."""
        stored = self._rows("SELECT DISTINCT series FROM pyramid WHERE process_id = ?", (process_id,))
        return sorted({str(row[0]) for row in stored} | {s for p, s in self._pyramids if p == process_id})

    def save_pyramid(self, process_id: int, series: str, version: str, pyramid: Pyramid) -> bool:
        """Stores a timeline in place of an older one. False: the file cannot be written, it is kept in memory."""
        self._pyramids[process_id, series] = (version, pyramid)
        sql = "INSERT INTO pyramid VALUES (?, ?, ?, ?, ?, ?, ?)"
        steps: list[tuple[str, tuple[Any, ...]]] = [
            ("DELETE FROM pyramid WHERE process_id = ? AND series = ?", (process_id, series))
        ]
        for level, size in enumerate(pyramid.sizes):
            data = encode_level(pyramid.level(level))
            steps.append((sql, (process_id, series, level, version, size, zlib.crc32(data), data)))
        return self._write(steps)

    def _level(self, process_id: int, series: str, level: int) -> Buckets:
        rows = self._rows(
            "SELECT data, buckets, crc FROM pyramid WHERE process_id = ? AND series = ? AND level = ?",
            (process_id, series, level),
        )
        if len(rows) != 1 or [type(value) for value in rows[0]] != [bytes, int, int]:
            raise TraceError(f"{str(self.path)!r} is damaged (timeline {series!r})")
        return decode_level(*rows[0])

    def _write(self, steps: list[tuple[str, tuple[Any, ...]]]) -> bool:
        """Carries out `steps` in one transaction through a connection of its own; False if that is not possible."""
        if self._folder is not None or not os.access(self.path, os.W_OK):
            return False
        try:
            uri = files.uri_of(self.path, "rw")
            with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
                files.configure(connection)
                # A collector at work holds the lock nearly always: results are not worth waiting for it.
                connection.execute("PRAGMA busy_timeout = 500")
                connection.execute("BEGIN IMMEDIATE")
                for sql, values in steps:
                    connection.execute(sql, values)
                connection.execute("COMMIT")
        except sqlite3.Error:
            # A read-only folder, a full disk, a writer that is busy: results can always be made again.
            return False
        return True


_SAMPLE = [
    column.name for column in Sample.__table__.columns if column.name not in ("id", "process_id")
]  # time_ns comes first
_LISTS = frozenset({"argv", "notes", "command"})


def _check_types(row: Base) -> None:
    """TraceError unless every value has its column's type: SQLite stores any value in any column."""
    for column in row.__table__.columns:
        value = getattr(row, column.key)
        kind = column.type.python_type
        expected = (list if column.name in _LISTS else dict) if isinstance(column.type, sqlalchemy.JSON) else kind
        if value is None and column.nullable:
            continue
        if not isinstance(value, expected) or (expected is list and not all(isinstance(item, str) for item in value)):
            raise TraceError(f"the trace is damaged: {row.__tablename__}.{column.name} is not what it should be")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
