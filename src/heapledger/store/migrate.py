"""From older schema versions to the current one, a step at a time, in a private copy of the file.

| version | what it was                                                                       |
|---------|-----------------------------------------------------------------------------------|
| 0       | drafts: snapshots without `consistent` and `pause_ns`, processes without `notes`  |
| 1       | processes without `sample_bytes`: everything was recorded                         |
| 2       | the present one                                                                   |
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from heapledger.errors import SchemaError
from heapledger.store.ddl import SCHEMA_VERSION


def _from_0(connection: sqlite3.Connection) -> None:
    # Nothing was held in drafts, so nothing is claimed for them.
    connection.execute("ALTER TABLE snapshot ADD COLUMN consistent BOOLEAN NOT NULL DEFAULT 0")
    connection.execute("ALTER TABLE snapshot ADD COLUMN pause_ns INTEGER NOT NULL DEFAULT 0")
    connection.execute("ALTER TABLE process ADD COLUMN notes JSON NOT NULL DEFAULT '[]'")


def _from_1(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE process ADD COLUMN sample_bytes INTEGER NOT NULL DEFAULT 0")


#: Version → what turns it into the next one.
STEPS: dict[int, Callable[[sqlite3.Connection], None]] = {0: _from_0, 1: _from_1}


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Brings a file of `version` to SCHEMA_VERSION, in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    for step in range(version, SCHEMA_VERSION):
        if step not in STEPS:
            raise SchemaError(f"there is no way from schema {step} to {step + 1}")
        STEPS[step](connection)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
