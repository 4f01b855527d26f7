"""`heapledger import`: a log of glibc's mtrace becomes a trace file."""

from __future__ import annotations

import os
from pathlib import Path

import click

from heapledger.cli import _analysis as common

EXAMPLES = """\
\b
Examples:
  MALLOC_TRACE=app.log LD_PRELOAD=libc_malloc_debug.so.0 ./app
  heapledger import app.log
  heapledger leaks app.log.heapledger

\b
The program has to call mtrace() itself. Such a log has no times, no threads
and stacks of one frame: `heapledger run` records all of them."""


@click.command("import", epilog=EXAMPLES)
@click.argument("log", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The trace file.  [default: LOG.heapledger]")
@click.option("--no-symbols", is_flag=True, help="Do not look up callers in the files that the log names.")
def command(log: Path, output: Path | None, no_symbols: bool) -> None:
    """Turn LOG, written by glibc's mtrace, into a trace file."""
    from heapledger.tracer.mtrace import import_log

    output = output or log.with_name(log.name + ".heapledger")
    with common.progress("Importing") as bar:
        total = os.path.getsize(log) if log.is_file() else 0
        result = import_log(
            log, output, symbols=not no_symbols, progress=(lambda done: bar(done, total)) if bar else None
        )
    page = common.page()
    page.line(f"{output}: {result.events:,} events from {result.lines:,} lines")
    page.notes(result.notes())
