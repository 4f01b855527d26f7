"""Opening trace files: what is checked before anything in one is believed.

A trace may come from anywhere. SQLite itself is safe against damaged files, but not against what a file may *ask*
for: a view named like a table that never ends, triggers, generated columns, huge values. So only plain tables with the
names and columns of `store.ddl` are let in, and the connection is told not to trust the schema.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from heapledger.errors import InputError, SchemaError, TraceError
from heapledger.store.ddl import APPLICATION_ID, SCHEMA_VERSION, TABLES

#: No value in a trace file is larger: a block of events as odd as can be has 11 MiB, a pyramid level 12 MiB.
MAX_VALUE_BYTES = 16 << 20
_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
#: Bytes of a name that stand for themselves in an SQLite URI.
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-")


def path_of(path: str | os.PathLike[str]) -> Path:
    """The path of an existing regular file; InputError says what is wrong otherwise."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"there is no file {str(path)!r}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot open {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise TraceError(f"{str(path)!r} is not a trace file, but a {'folder' if stat.S_ISDIR(mode) else 'device'}")
    return path


def version_of(path: Path) -> int:
    """The schema version, from the file's first 100 bytes; TraceError if they are not those of a trace file.

    Bytes 0-15 `SQLite format 3`, 60-63 user_version, 68-71 application_id, both big endian.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if not head:
        raise TraceError(f"{str(path)!r} is empty")
    if len(head) < _HEADER_BYTES or head[:16] != _MAGIC:
        raise TraceError(f"{str(path)!r} is not a trace file", hint="`heapledger import` reads logs of glibc's mtrace")
    (version,) = struct.unpack_from(">i", head, 60)
    (application,) = struct.unpack_from(">I", head, 68)
    if application != APPLICATION_ID:
        raise TraceError(f"{str(path)!r} is an SQLite database, but not a trace file")
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"{str(path)!r} was made by a newer heapledger (schema {version}; this one reads {SCHEMA_VERSION})",
            hint="upgrade heapledger to read it",
        )
    if version < SCHEMA_VERSION:
        raise SchemaError(
            f"{str(path)!r} was made by an older heapledger (schema {version}; this one reads {SCHEMA_VERSION})",
            hint="record it again, or read it with the heapledger that made it",
        )
    return int(version)


def uri_of(path: Path, mode: str) -> str:
    """An SQLite URI; `?` and `#` in file names are legal, so everything is quoted."""
    name = "".join(chr(b) if b in _PLAIN else f"%{b:02x}" for b in os.fsencode(path.absolute()))
    return f"file:{name}?mode={mode}"


def configure(connection: sqlite3.Connection) -> None:
    """Limits for a file that somebody else may have made."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA busy_timeout = 10000")


def connect_read_only(path: Path) -> sqlite3.Connection:
    """A connection that cannot write; shared between threads (SQLite serialises calls)."""
    connection = sqlite3.connect(uri_of(path, "ro"), uri=True, check_same_thread=False, isolation_level=None)
    try:
        configure(connection)
        connection.execute("PRAGMA query_only = ON")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


@cache
def known_tables() -> dict[str, frozenset[str]]:
    """Table → names of its columns, as this version writes them."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(TABLES)
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {
            name: frozenset(row[1] for row in connection.execute(f"PRAGMA table_info({name})"))
            for name in sorted(names)
        }


def check_schema(connection: sqlite3.Connection) -> None:
    """TraceError unless the file holds the known tables with all their columns, and nothing else."""
    tables = set()
    for kind, name, table, sql in connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema"):
        plain = kind == "table" and not str(sql).upper().lstrip().startswith("CREATE VIRTUAL")
        if kind == "table" and plain and name in known_tables():
            tables.add(name)
        elif not (kind == "index" and table in known_tables()):
            raise TraceError(f"not a trace file: it holds a {_what(kind, plain)} {str(name)[:60]!r}")
    for name, columns in known_tables().items():
        if name not in tables:
            raise TraceError(f"not a trace file: table {name} is missing")
        found = {row[1]: row[6] for row in connection.execute(f"PRAGMA table_xinfo({name})")}
        if any(found.values()):
            raise TraceError(f"not a trace file: table {name} computes its columns")
        if not columns <= found.keys():
            raise TraceError(f"table {name} lacks columns ({', '.join(sorted(columns - found.keys()))})")


def _what(kind: str, plain: bool) -> str:
    if kind != "table":
        return kind if kind in ("view", "trigger", "index") else "strange entry"
    return "table" if plain else "virtual table"


@contextlib.contextmanager
def damage_is_a_trace_error(path: Path) -> Iterator[None]:
    """SQLite's complaints about a file become one line. (It quotes what it found: that need not be text.)"""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise TraceError(f"{str(path)!r} is damaged ({one_line(error)})") from error


def one_line(error: object) -> str:
    """An error's text on one line and of bounded length: SQLite quotes from damaged files."""
    text = " ".join(str(error).split())[:200]
    return "".join(char if char.isprintable() else "?" for char in text)


def copy_aside(path: Path) -> Path:
    """A private copy of a trace, with the part that its writer had not moved into it yet; in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="heapledger-"))
    for suffix in ("", "-wal"):
        source = path.with_name(path.name + suffix)
        if suffix == "" or source.exists():
            shutil.copyfile(source, folder / ("trace" + suffix))
    return folder / "trace"
