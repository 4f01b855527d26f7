"""`heapledger export`: a trace in another tool's format."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from heapledger.cli import _analysis as common
from heapledger.errors import UsageError

EXAMPLES = """\
\b
Examples:
  heapledger export app.heapledger --format mtrace -o a.log; mtrace a.log
  heapledger export app.heapledger --format folded | flamegraph.pl > app.svg
  heapledger export app.heapledger --format csv -o app.csv

\b
mtrace   what glibc's mtrace would have written; the caller is the innermost
         frame. Times, threads and the kind of allocation are not in it.
folded   outermost;...;innermost BYTES, a line a call stack.
csv      every event with all its columns."""


@click.command("export", epilog=EXAMPLES)
@common.file_argument
@click.option("--format", "form", type=click.Choice(["mtrace", "folded", "csv"]), required=True, help="What to write.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: standard output]")
@click.option(
    "--value",
    type=click.Choice(["live", "requested"]),
    default="live",
    show_default=True,
    help="folded: bytes not given back by the end, or all that were requested.",
)
@common.pid_option
def command(file: str, form: str, output: Path | None, value: str, pid: int | None) -> None:
    """Write the trace in another tool's format."""
    from heapledger.store import export

    with common.opened(file) as trace:
        process = trace.process(pid).id
        if form == "mtrace":
            text = export.mtrace(trace, process)
        elif form == "folded":
            text = export.folded(trace, process, live=value == "live")
        else:
            text = export.csv(trace, process)
        _write(text, output)
        if trace.damaged:
            events = sum(damage.events for damage in trace.damaged)
            click.echo(
                f"heapledger: {len(trace.damaged)} damaged blocks with {events:,} events were left out", err=True
            )


def _write(text: Iterator[str], output: Path | None) -> None:
    if output is None:
        for portion in text:
            sys.stdout.write(portion)
        sys.stdout.flush()
        return
    try:
        with output.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(text)
    except OSError as error:
        with contextlib.suppress(OSError):
            output.unlink(missing_ok=True)
        raise UsageError(
            f"cannot write {str(output)!r}: {error.strerror}", hint="choose another place with -o"
        ) from error
