"""`heapledger leaks`: what was never freed."""

from __future__ import annotations

import click

from heapledger.cli import _analysis as common
from heapledger.errors import GateFailure

EXAMPLES = """\
\b
Examples:
  heapledger leaks app.heapledger
  heapledger leaks app.heapledger --top 3
  heapledger leaks app.heapledger --fail-on-leak   (status 3 if any)"""


@click.command("leaks", epilog=EXAMPLES)
@common.file_argument
@common.pid_option
@common.top_option("call stacks")
@click.option("--fail-on-leak", is_flag=True, help="Exit with status 3 if anything was not freed.")
@common.format_option
def command(file: str, pid: int | None, top: int | None, fail_on_leak: bool, form: str) -> None:
    """Blocks not freed at exit, by call stack.

    Whether anything still pointed to them is not looked at: a block that is in use until the end is listed as well.
    """
    with common.opened(file) as trace:
        from heapledger.analyzer.reports import leaks
        from heapledger.analyzer.session import analyse

        with common.progress("Replaying") as bar:
            analysis = analyse(trace, pid, progress=bar)
        result = leaks.build(trace, analysis, top=top or (100 if form == "json" else 10))
        if form == "json":
            common.print_json(result)
        else:
            leaks.render(result, common.page())
    if fail_on_leak and result["total_blocks"]:
        raise GateFailure(f"{result['total_bytes']:,} bytes in {result['total_blocks']:,} blocks were not freed")
