"""`heapledger report`: who owns each resident page."""

from __future__ import annotations

import click

from heapledger.cli import _analysis as common

EXAMPLES = """\
\b
Examples:
  heapledger report app.heapledger
  heapledger report app.heapledger --at peak --top 20
  heapledger report app.heapledger --format json | jq .unexplained_bytes"""


@click.command("report", epilog=EXAMPLES)
@common.file_argument
@common.at_option
@common.pid_option
@common.top_option("call sites")
@common.format_option
def command(file: str, at: str | None, pid: int | None, top: int | None, form: str) -> None:
    """Who owns each resident page of a process, at exit or at peak.

    Every resident byte has one owner: a call site's live blocks, a hole in the heap, the allocator, a stack, a
    library ... The owners sum to the kernel's Rss; what is left is printed as unexplained.
    """
    moment = common.moment(at)
    with common.opened(file) as trace:
        from heapledger.analyzer.reports import report
        from heapledger.analyzer.session import analyse

        wanted = moment if isinstance(moment, int) else None
        with common.progress("Replaying") as bar:
            analysis = analyse(trace, pid, snapshot=wanted, progress=bar)
        result = report.build(trace, analysis, at=moment, top=top or 100)
        if form == "json":
            common.print_json(result)
        else:
            report.render(result, common.page(), top=top or 10, file=file)
