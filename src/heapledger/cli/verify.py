"""`heapledger verify`: how much of the model's prediction was exact."""

from __future__ import annotations

import click

from heapledger.cli import _analysis as common
from heapledger.errors import NotMeasuredError

EXAMPLES = """\
\b
Examples:
  heapledger verify app.heapledger
  heapledger verify app.heapledger --strict   (status 4 unless all is exact)"""


@click.command("verify", epilog=EXAMPLES)
@common.file_argument
@click.option("--pid", type=int, help="One process only: its pid, or its id in the trace. Default: all of them.")
@click.option("--strict", is_flag=True, help="Exit with status 4 unless everything is exact and no event was lost.")
@common.format_option
def command(file: str, pid: int | None, strict: bool, form: str) -> None:
    """How much of what the model predicted was exact.

    Each address that malloc returned was predicted and compared; so were the heap's ends and large blocks with the
    kernel's maps, and the ledger with the kernel's Rss. Of a sampled trace nothing can be predicted: status 4.
    """
    with common.opened(file) as trace:
        from heapledger.analyzer.reports import verify
        from heapledger.analyzer.session import analyse, analyse_all

        with common.progress("Replaying") as bar:
            analyses = analyse_all(trace, progress=bar) if pid is None else [analyse(trace, pid, progress=bar)]
        if not analyses:
            raise NotMeasuredError("this trace has no process in it")
        result = verify.build(trace, analyses)
        if form == "json":
            common.print_json(result)
        else:
            verify.render(result, common.page())
    if result["sampled"]:
        raise NotMeasuredError(
            "this trace is a sample: nothing was predicted",
            hint="Trace the program without --sample to verify the model.",
        )
    if strict and not result["ok"]:
        raise NotMeasuredError("not everything is exact")
