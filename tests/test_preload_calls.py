"""Each function the shim stands in for is recorded with the values the program itself saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from preload_spool import Shim, rows_said, shim, shim_library  # noqa: F401

from heapledger.store.events import Kind

Native = Callable[..., Path]


def test_every_interposed_function_is_recorded_to_the_byte(shim: Shim, native: Native) -> None:  # noqa: F811
    run = shim.run(native("shim_calls.c", "-O1"))
    assert run.code == 0
    rows = run.first.rows()
    start = next(i for i, row in enumerate(rows) if row[0] == Kind.MALLOC and row[2] == 0x12345)
    said = rows_said(run.stdout)
    assert rows[start + 1 : start + 1 + len(said)] == said
    assert rows[start + 1 + len(said)][0] == Kind.EXIT
    run.first.check()
