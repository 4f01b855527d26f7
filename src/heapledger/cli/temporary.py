"""`heapledger temporary`: what is allocated for a moment only."""

from __future__ import annotations

import click

from heapledger.cli import _analysis as common

EXAMPLES = """\
\b
Examples:
  heapledger temporary app.heapledger
  heapledger temporary app.heapledger --top 30
  heapledger temporary app.heapledger --format json | jq '.sites[0]'"""


@click.command("temporary", epilog=EXAMPLES)
@common.file_argument
@common.pid_option
@common.top_option("call sites")
@common.format_option
def command(file: str, pid: int | None, top: int | None, form: str) -> None:
    """Temporary allocations, by call site.

    Blocks that the thread which allocated them freed before it allocated anything else: a buffer that is kept, or one
    on the stack, would have done as well.
    """
    with common.opened(file) as trace:
        from heapledger.analyzer.reports import temporary
        from heapledger.analyzer.session import analyse

        with common.progress("Replaying") as bar:
            analysis = analyse(trace, pid, progress=bar)
        result = temporary.build(trace, analysis, top=top or (100 if form == "json" else 10))
        if form == "json":
            common.print_json(result)
        else:
            temporary.render(result, common.page())
