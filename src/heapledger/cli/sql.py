"""`heapledger sql`: events and tables as rows."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import click

from heapledger.cli import _analysis as common

EXAMPLES = """\
\b
Examples:
  heapledger sql app.heapledger "SELECT kind_name, count(*), sum(size)
      FROM events GROUP BY 1"
  heapledger sql app.heapledger "SELECT printf('%x', addr), size FROM events
      WHERE time BETWEEN 1e9 AND 2e9 ORDER BY size DESC LIMIT 10"
  heapledger sql app.heapledger "SELECT stack(process_id, stack), sum(size)
      FROM events GROUP BY process_id, stack ORDER BY 2 DESC LIMIT 5"
  heapledger sql --format csv app.heapledger "SELECT * FROM sample"

\b
Tables: events (process_id seq seq_exit time thread kind kind_name addr size
arg arg2 word stack), session, process, thread, module, call_node, frame,
sample, snapshot, snapshot_vma, pyramid, fact. docs/trace-file.md describes
them. Times are ns; numbers from 2^63 up show as negative."""

_TABLE_ROWS = 1000


@click.command("sql", epilog=EXAMPLES)
@click.argument("file", type=click.Path())
@click.argument("statement", metavar="SELECT")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="Kind of output; json is one object a line.",
)
@click.option("--timeout", type=click.FloatRange(min=0.001), metavar="S", help="End a statement after S seconds.")
def command(file: str, statement: str, form: str, timeout: float | None) -> None:
    """Query events and tables as rows; SELECT may be `-` to read it from standard input."""
    from heapledger.store.sql import Database

    if statement == "-":
        statement = sys.stdin.read()
    with common.opened(file) as trace, Database(trace, timeout_s=timeout) as database:
        names, rows = database.execute(statement)
        if form == "table":
            _table(names, rows)
        elif form == "json":
            _json(names, rows)
        else:
            _csv(names, rows)
        _tell_damage(trace.damaged)


def _table(names: list[str], rows: Iterator[tuple[Any, ...]]) -> None:
    shown = list(islice(rows, _TABLE_ROWS))
    numeric = [all(isinstance(row[i], int | float | None) for row in shown) for i in range(len(names))]
    headings = [(">" if number else "") + name for name, number in zip(names, numeric, strict=True)]
    page = common.page()
    page.table(headings, [[_cell(value) for value in row] for row in shown])
    if next(rows, None) is not None:
        click.echo(f"... more than {_TABLE_ROWS:,} rows: --format csv and json print them all", err=True)


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else str(value).replace("\n", " < ")


def _json(names: list[str], rows: Iterator[tuple[Any, ...]]) -> None:
    for row in rows:
        values = (value.hex() if isinstance(value, bytes) else value for value in row)
        click.echo(json.dumps(dict(zip(names, values, strict=True))))


def _csv(names: list[str], rows: Iterator[tuple[Any, ...]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([value.hex() if isinstance(value, bytes) else value for value in row])


def _tell_damage(damaged: list[Any]) -> None:
    if damaged:
        events = sum(damage.events for damage in damaged)
        click.echo(f"heapledger: {len(damaged)} damaged blocks with {events:,} events were left out", err=True)
