"""`heapledger timeline`: memory over time."""

from __future__ import annotations

import click

from heapledger.cli import _analysis as common

EXAMPLES = """\
\b
Examples:
  heapledger timeline app.heapledger
  heapledger timeline app.heapledger --format json --points 1000"""


@click.command("timeline", epilog=EXAMPLES)
@common.file_argument
@common.pid_option
@click.option(
    "--points",
    type=click.IntRange(min=1, max=100_000),
    default=400,
    show_default=True,
    metavar="N",
    help="Most points of a series in the JSON; no extreme is lost by having few.",
)
@common.format_option
def command(file: str, pid: int | None, points: int, form: str) -> None:
    """Live bytes, heap, holes and RSS over time."""
    with common.opened(file) as trace:
        from heapledger.analyzer.reports import timeline
        from heapledger.analyzer.session import analyse

        with common.progress("Replaying") as bar:
            analysis = analyse(trace, pid, progress=bar)
        result = timeline.build(trace, analysis, points=points)
        if form == "json":
            common.print_json(result)
        else:
            timeline.render(result, common.page())
