"""SQL over a trace: `events` and `call_node` as tables, beside the ordinary ones, for reading only.

`events` is a virtual table over the compressed blocks. Only the columns that a statement names are decoded; conditions
on process_id, seq and time leave out whole blocks, and comparisons with whole numbers are made a block at a time. Its
columns are those of `store.events`, and `process_id` and `kind_name`. Numbers from 2**63 up come out negative, as in
every SQLite; `printf('%x', addr)` shows them right.

`call_node` is the trie of call stacks, over its compressed blocks: the frame `address` (of module `module_id`) called
from the frame `parent` (0: outermost). Conditions on `process_id`, and on that and `node`, leave out the rest.

`stack(process_id, stack)` is a function: the call stack as text, innermost first.

The statement may come from anybody: the file is opened for reading only, an authorizer lets nothing pass but SELECT,
and a deadline or an interrupt ends what takes too long.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import apsw
import numpy as np

from heapledger.errors import TraceError, UsageError
from heapledger.store import files
from heapledger.store.blocks import BLOCK_EVENTS
from heapledger.store.events import COLUMNS, Events, Kind
from heapledger.store.reader import Block, Trace

#: In the order `SELECT *` shows them.
EVENT_COLUMNS = (
    "process_id",
    "seq",
    "seq_exit",
    "time",
    "thread",
    "kind",
    "kind_name",
    "addr",
    "size",
    "arg",
    "arg2",
    "word",
    "stack",
)
_NODE_COLUMNS = ("process_id", "node", "parent", "address", "module_id")
_NODE_DECLARATION = f"CREATE TABLE call_node ({', '.join(f'{name} INTEGER' for name in _NODE_COLUMNS)})"
_DECLARATION = "CREATE TABLE events ({})".format(
    ", ".join(f"{name} {'TEXT' if name == 'kind_name' else 'INTEGER'}" for name in EVENT_COLUMNS)
)
#: Conditions that leave out blocks: column → the two block fields that bound it.
_BOUNDED = {
    "process_id": ("process_id", "process_id"),
    "seq": ("first_seq", "last_seq"),
    "time": ("first_ns", "last_ns"),
}
_KIND_NAMES = {int(kind): kind.name.lower() for kind in Kind}
_OPERATORS = {
    apsw.SQLITE_INDEX_CONSTRAINT_EQ: "=",
    apsw.SQLITE_INDEX_CONSTRAINT_GT: ">",
    apsw.SQLITE_INDEX_CONSTRAINT_GE: ">=",
    apsw.SQLITE_INDEX_CONSTRAINT_LT: "<",
    apsw.SQLITE_INDEX_CONSTRAINT_LE: "<=",
}
_ALLOWED = frozenset({apsw.SQLITE_SELECT, apsw.SQLITE_READ, apsw.SQLITE_RECURSIVE})
_FUNCTIONS_DENIED = frozenset({"load_extension", "fts3_tokenizer", "randomblob", "zeroblob"})
_PROGRESS_STEPS = 20_000
_CACHED_BLOCKS = 8
_COMPARE: dict[str, Callable[[Any, int], Any]] = {
    "=": operator.eq,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


def kind_name(kind: int) -> str:
    """`malloc` for 1, `unknown 77` for a number no version has used."""
    return _KIND_NAMES.get(kind, f"unknown {kind}")


class _EventsModule:
    """What SQLite asks to make the table: there is one, and it needs no CREATE."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def Connect(  # noqa: N802 (names are SQLite's)
        self, connection: apsw.Connection, modulename: str, databasename: str, tablename: str, *args: Any
    ) -> tuple[str, Any]:
        return _DECLARATION, _EventsTable(self._trace)

    Create = Connect


@dataclass(slots=True, frozen=True)
class _Plan:
    """What one part of a statement needs: conditions (column, operator), and columns to show."""

    conditions: tuple[tuple[str, str], ...]
    wanted: frozenset[str]


class _EventsTable:
    """Tells SQLite which conditions are cheap, and makes cursors."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._plans: list[_Plan] = []
        self._blocks: list[Block] | None = None
        #: The last decoded blocks: the inner loop of a join comes back to the same ones.
        self._cache: dict[tuple[int, frozenset[str]], Events | None] = {}

    def BestIndexObject(self, index: apsw.IndexInfo) -> bool:  # noqa: N802
        conditions: list[tuple[str, str]] = []
        cost = 1e9
        for i in range(index.nConstraint):
            column = index.get_aConstraint_iColumn(i)
            sign = _OPERATORS.get(index.get_aConstraint_op(i))
            name = EVENT_COLUMNS[column] if 0 <= column < len(EVENT_COLUMNS) else "kind_name"
            if index.get_aConstraint_usable(i) and sign and name != "kind_name":
                conditions.append((name, sign))
                index.set_aConstraintUsage_argvIndex(i, len(conditions))
                # What is left out here is only what cannot match: SQLite still checks each row.
                index.set_aConstraintUsage_omit(i, False)
                cost /= (10_000 if sign == "=" else 100) if name in _BOUNDED else 2
        wanted = frozenset(EVENT_COLUMNS[i] for i in index.colUsed if i < len(EVENT_COLUMNS))
        index.idxNum = len(self._plans)
        self._plans.append(_Plan(tuple(conditions), wanted))
        index.estimatedCost = max(cost, 1.0)
        return True

    def blocks(self) -> list[Block]:
        """All blocks of all processes."""
        if self._blocks is None:
            self._blocks = [b for process in self._trace.processes() for b in self._trace.event_blocks(process.id)]
        return self._blocks

    def decoded(self, block: Block, columns: frozenset[str]) -> Events | None:
        """The events of a block; None if it is damaged."""
        key = (block.id, columns)
        if key not in self._cache:
            while len(self._cache) >= _CACHED_BLOCKS:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = self._trace.block_events(block, columns)
        return self._cache[key]

    def plan(self, number: int) -> _Plan:
        return self._plans[number]

    def Open(self) -> _EventsCursor:  # noqa: N802
        return _EventsCursor(self)

    def Disconnect(self) -> None:  # noqa: N802
        pass

    Destroy = Disconnect


class _EventsCursor:
    """Walks the events, a block at a time. A row is an index into Python lists: what SQLite wants one by one."""

    def __init__(self, table: _EventsTable) -> None:
        self._table = table
        self._portions: Iterator[list[Any]] = iter(())
        self._lists: list[Any] = []
        self._block = 0
        self._rows: Any = ()
        self._at = 0
        self._count = 0

    def Filter(self, number: int, _: str | None, values: tuple[Any, ...]) -> None:  # noqa: N802
        plan = self._table.plan(number)
        bounds = [(name, sign, value) for (name, sign), value in zip(plan.conditions, values, strict=True)]
        self._portions = self._decode(bounds, plan.wanted)
        self._advance()

    def _decode(self, bounds: list[tuple[str, str, Any]], wanted: frozenset[str]) -> Iterator[list[Any]]:
        """Of each block with rows that may match: a list (or one value for all rows) a column, row ids, the count."""
        exact = [bound for bound in bounds if bound[0] in COLUMNS and type(bound[2]) is int]
        columns = frozenset({"kind" if name == "kind_name" else name for name in wanted} & COLUMNS.keys())
        columns |= {name for name, _, _ in exact}
        for block in self._table.blocks():
            if not all(_may_match(block, *bound) for bound in bounds):
                continue
            events = self._table.decoded(block, columns)
            if events is None:
                continue
            rows: Any = range(len(events))
            if exact:
                mask = np.ones(len(events), np.bool_)
                for name, sign, value in exact:
                    mask &= _COMPARE[sign](getattr(events, name).astype(np.int64), value)
                found = np.flatnonzero(mask)
                rows, events = found.tolist(), events.take(found)
            if len(events):
                yield [*(_values(name, block, events, wanted) for name in EVENT_COLUMNS), block.id, rows, len(events)]

    def _advance(self) -> None:
        self._at = 0
        portion: list[Any] = next(self._portions, [0, (), 0])
        self._lists = portion[:-3]
        self._block, self._rows, self._count = portion[-3:]

    def Eof(self) -> bool:  # noqa: N802
        return self._count == 0

    def Next(self) -> None:  # noqa: N802
        self._at += 1
        if self._at == self._count:
            self._advance()

    def Column(self, number: int) -> Any:  # noqa: N802
        if number < 0:
            return self.Rowid()
        values = self._lists[number]
        return None if values is None else values[self._at]

    def Rowid(self) -> int:  # noqa: N802
        """The same for the same event in every scan: SQLite joins the halves of an OR by it."""
        return int(self._block) * BLOCK_EVENTS + int(self._rows[self._at])

    def Close(self) -> None:  # noqa: N802
        self._portions = iter(())
        self._lists = []


def _values(name: str, block: Block, events: Events, wanted: frozenset[str]) -> Any:
    """What a column holds for the rows of a block; None if nobody asks."""
    if name not in wanted:
        return None
    if name == "process_id":
        return _Same(block.process_id)
    if name == "kind_name":
        return [kind_name(kind) for kind in events.kind.tolist()]
    return getattr(events, name).astype(np.int64).tolist()


class _Same:
    """A column that has one value."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __getitem__(self, _: int) -> int:
        return self._value


def _may_match(block: Block, name: str, sign: str, value: Any) -> bool:
    """Whether a block can hold a row with `name sign value`."""
    if name not in _BOUNDED or not isinstance(value, int | float):
        return True  # odd comparisons are left to SQLite, row by row
    low_field, high_field = _BOUNDED[name]
    low: int = getattr(block, low_field)
    high: int = getattr(block, high_field)
    if sign == "=":
        return low <= value <= high
    return high >= value if sign.startswith(">") else low <= value


class _NodesModule:
    """As `_EventsModule`."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def Connect(  # noqa: N802
        self, connection: apsw.Connection, modulename: str, databasename: str, tablename: str, *args: Any
    ) -> tuple[str, Any]:
        return _NODE_DECLARATION, _NodesTable(self._trace)

    Create = Connect


class _NodesTable:
    """Finds the nodes of one process, or one node of it; everything else is left to SQLite."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def BestIndexObject(self, index: apsw.IndexInfo) -> bool:  # noqa: N802
        usable: dict[int, int] = {}
        for i in range(index.nConstraint):
            equal = index.get_aConstraint_op(i) == apsw.SQLITE_INDEX_CONSTRAINT_EQ
            if equal and index.get_aConstraint_usable(i):
                usable.setdefault(index.get_aConstraint_iColumn(i), i)
        index.idxNum, index.estimatedCost = 0, 1e7
        for column in (0, 1):  # process_id, then node
            if column not in usable:
                break
            index.set_aConstraintUsage_argvIndex(usable[column], column + 1)
            index.idxNum += 1
            index.estimatedCost /= 1000
        return True

    def rows(self, *known: Any) -> Iterator[list[list[Any]]]:
        """The columns of each process: those of the process `known[0]`, of the node `known[1]`, if they are given."""
        for process in self._trace.processes():
            if known and known[0] != process.id:
                continue
            nodes = self._trace.nodes(process.id)
            columns: tuple[Any, ...] = (nodes.node, nodes.parent, nodes.address, nodes.module_id)
            if len(known) > 1:
                if not isinstance(known[1], int | float):
                    continue
                low, high = (np.searchsorted(columns[0], known[1], side) for side in ("left", "right"))
                columns = tuple(column[low:high] for column in columns)
            if len(columns[0]):
                node, parent, address, module = (column.tolist() for column in columns)
                yield [[process.id] * len(node), node, parent, address, [number or None for number in module]]

    def Open(self) -> _NodesCursor:  # noqa: N802
        return _NodesCursor(self)

    def Disconnect(self) -> None:  # noqa: N802
        pass

    Destroy = Disconnect


class _NodesCursor:
    """Walks the nodes, a process at a time."""

    def __init__(self, table: _NodesTable) -> None:
        self._table = table
        self._portions: Iterator[list[list[Any]]] = iter(())
        self._lists: list[list[Any]] = [[]]
        self._at = 0

    def Filter(self, number: int, _: str | None, values: tuple[Any, ...]) -> None:  # noqa: N802
        self._portions = self._table.rows(*values)
        self._advance()

    def _advance(self) -> None:
        self._at = 0
        self._lists = next(self._portions, [[]])

    def Eof(self) -> bool:  # noqa: N802
        return not self._lists[0]

    def Next(self) -> None:  # noqa: N802
        self._at += 1
        if self._at == len(self._lists[0]):
            self._advance()

    def Column(self, number: int) -> Any:  # noqa: N802
        return self.Rowid() if number < 0 else self._lists[number][self._at]

    def Rowid(self) -> int:  # noqa: N802
        """The same for the same node in every scan."""
        process_id, node = int(self._lists[0][self._at]), int(self._lists[1][self._at])
        return (process_id << 40 ^ node) & ((1 << 63) - 1)

    def Close(self) -> None:  # noqa: N802
        self._portions = iter(())
        self._lists = [[]]


class Database:
    """A trace opened for SQL. `timeout_s`: a statement that takes longer is ended with a UsageError."""

    def __init__(self, trace: Trace, *, timeout_s: float | None = None) -> None:
        self._trace = trace
        self._timeout_s = timeout_s
        self._deadline = float("inf")
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        try:
            self._connection = apsw.Connection(files.uri_of(trace.readable_path, "ro"), flags=flags)
            self._configure()
        except apsw.Error as error:
            raise TraceError(f"{str(trace.path)!r} cannot be queried ({error})") from error

    def _configure(self) -> None:
        connection = self._connection
        connection.limit(apsw.SQLITE_LIMIT_LENGTH, files.MAX_VALUE_BYTES)
        connection.limit(apsw.SQLITE_LIMIT_ATTACHED, 0)
        connection.pragma("trusted_schema", False)
        connection.pragma("query_only", True)
        connection.pragma("temp_store", 2)  # sorting a billion rows must not fill /tmp
        for name, module in (("events", _EventsModule(self._trace)), ("call_node", _NodesModule(self._trace))):
            connection.create_module(
                name,
                cast("Any", module),
                use_bestindex_object=True,
                eponymous=True,
                eponymous_only=True,
                read_only=True,
            )
        connection.create_scalar_function("stack", self._stack, 2, deterministic=True)
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(self._too_long, _PROGRESS_STEPS)

    def _stack(self, *values: Any) -> str | None:
        process_id, node = values
        if not isinstance(process_id, int) or not isinstance(node, int):
            return None
        frames = self._trace.stack(process_id, node)
        return "\n".join(frame.function or f"{frame.module}+{frame.address:#x}" for frame in frames) or None

    def _too_long(self) -> bool:
        return time.monotonic() > self._deadline

    def execute(self, sql: str) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
        """(names of the columns, rows as they are found). UsageError with one line for anything that is wrong."""
        if "\0" in sql:
            raise UsageError("SQL: a statement cannot hold a zero byte")
        self._deadline = time.monotonic() + self._timeout_s if self._timeout_s else float("inf")
        cursor = self._connection.cursor()
        names: list[str] = []

        def describe(made: apsw.Cursor, _sql: str, _bindings: Any) -> bool:
            if names:
                raise UsageError("SQL: one statement at a time")
            names[:] = [column[0] for column in made.get_description()]
            return True

        cursor.exec_trace = describe
        rows = self._guarded(lambda: cursor.execute(sql))
        # The first row comes now, so that errors and names are known before anything is printed.
        first = self._guarded(lambda: next(rows, None))
        if not names:
            raise UsageError("SQL: there is no statement")
        return names, self._rows(first, rows)

    def _rows(self, first: Any, rows: Any) -> Iterator[tuple[Any, ...]]:
        while first is not None:
            yield first
            first = self._guarded(lambda: next(rows, None))

    def _guarded(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except apsw.AuthError as error:
            raise UsageError("SQL: a trace can only be read: SELECT is the one statement there is") from error
        except (apsw.InterruptError, apsw.AbortError) as error:
            raise UsageError(
                f"SQL: the statement took longer than {self._timeout_s:g} s", hint="--timeout sets the limit"
            ) from error
        except apsw.Error as error:
            raise UsageError(
                f"SQL: {files.one_line(error)}", hint="`heapledger sql --help` lists tables and columns"
            ) from error

    def close(self) -> None:
        """The trace stays open: it is the caller's."""
        self._connection.close(True)

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _authorize(operation: int, name: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    """SELECT and what is part of one. The table of tables may be read: it helps to find the columns."""
    if operation == apsw.SQLITE_FUNCTION:
        return apsw.SQLITE_DENY if second in _FUNCTIONS_DENIED else apsw.SQLITE_OK
    return apsw.SQLITE_OK if operation in _ALLOWED else apsw.SQLITE_DENY
