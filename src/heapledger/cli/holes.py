"""`heapledger holes`: free memory that does not go back."""

from __future__ import annotations

import click

from heapledger.cli import _analysis as common

EXAMPLES = """\
\b
Examples:
  heapledger holes app.heapledger
  heapledger holes app.heapledger --at peak --top 30
  heapledger holes app.heapledger --format json | jq '.holes[0].pin'"""


@click.command("holes", epilog=EXAMPLES)
@common.file_argument
@common.at_option
@common.pid_option
@common.top_option("holes and pins")
@common.format_option
def command(file: str, at: str | None, pid: int | None, top: int | None, form: str) -> None:
    """Free memory inside the heap that stays resident, and what pins it.

    A hole's pin is the live block next above it: while that one lives, the hole cannot go back with the break.
    "Whole pages" are what malloc_trim(0) returns nevertheless.
    """
    moment = common.moment(at)
    with common.opened(file) as trace:
        from heapledger.analyzer.reports import holes
        from heapledger.analyzer.session import analyse

        wanted = moment if isinstance(moment, int) else None
        with common.progress("Replaying") as bar:
            analysis = analyse(trace, pid, snapshot=wanted, progress=bar)
        result = holes.build(trace, analysis, at=moment, top=top or 100)
        if form == "json":
            common.print_json(result)
        else:
            holes.render(result, common.page(), rows=top or 10)
