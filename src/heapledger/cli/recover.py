"""`heapledger recover`: a spool that a crash has left becomes a trace file."""

from __future__ import annotations

import os
from pathlib import Path

import click

_EPILOG = """\
\b
Examples:
  heapledger recover /dev/shm/heapledger-k2j3h4
  heapledger recover /dev/shm/heapledger-k2j3h4 -o crashed.heapledger

A run that was killed leaves its spool behind, and often an unfinished trace file: that one is finished, unless -o names
another. Events that lie in neither are counted as lost. The spool is removed afterwards, unless --keep is given."""


@click.command("recover", epilog=_EPILOG, help="Turn a spool left by a crash into a trace file.")
@click.argument("spool", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The trace file to write.")
@click.option("--keep", is_flag=True, help="Leave the spool where it is.")
@click.option("--no-symbols", is_flag=True, help="Do not resolve function names.")
def command(spool: Path, output: Path | None, keep: bool, no_symbols: bool) -> None:
    from heapledger.tracer import launch
    from heapledger.tracer.recover import recover

    progress = launch.draw_progress if os.isatty(2) else None
    result = recover(spool, output, symbols=not no_symbols, keep=keep, progress=progress)
    totals = result.totals
    if progress is not None:
        launch.clear_progress()
    for note in totals.notes:
        click.echo(f"heapledger: {note}", err=True)
    processes = "1 process" if totals.processes == 1 else f"{totals.processes} processes"
    lost = f", {totals.lost:,} lost" if totals.lost else ""
    click.echo(f"{totals.events:,} events of {processes}{lost} → {result.trace}")
