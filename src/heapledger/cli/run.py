"""`heapledger run`: trace a program from its start to its end."""

from __future__ import annotations

from pathlib import Path

import click

#: Far above any heap, and what the shim's arithmetic holds.
_MOST_SAMPLE_BYTES = 1 << 40


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int:
    """4096, 512K, 1M, 2G (powers of 1024) as a number; 0 for none given."""
    if value is None:
        return 0
    text = value.upper().removesuffix("B").removesuffix("I")
    shift = {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    digits = text[:-1] if shift else text
    if not (digits.isascii() and digits.isdigit()) or not 1 <= int(digits) << shift <= _MOST_SAMPLE_BYTES:
        raise click.BadParameter(f"{value!r} is not a number of bytes such as 4096, 512K or 1M", context, parameter)
    return int(digits) << shift


_EPILOG = """\
\b
Examples:
  heapledger run ls -l
  heapledger run -o json.heapledger -- python3 work.py --size 10
  heapledger run --snapshot-every 1 -- ./server
  heapledger run --sample 512K -- ./server

The exit status is the program's own; killed by a signal, heapledger dies by the same one. Its input, output and
terminal are the program's; heapledger's own few lines go to stderr.

Ctrl-C goes to the program, and the trace is still written. SIGTERM, SIGHUP, SIGINT, SIGQUIT and SIGUSR2 sent to
heapledger are passed on to the program; SIGUSR1 takes a snapshot of every traced process.

An older trace with the name given with -o is overwritten; any other file is left alone. Programs that the traced one
starts are traced too."""


@click.command(
    "run",
    epilog=_EPILOG,
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    help="Trace a program; the exit status is the program's own.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The trace file.  [default: heapledger.NAME.PID.heapledger in this folder]",
)
@click.option(
    "--interval", type=click.FloatRange(1, 60_000), default=50, show_default=True, metavar="MS", help="Between samples."
)
@click.option("--snapshot-every", type=click.FloatRange(0.01), default=None, metavar="S", help="Snapshot all pages.")
@click.option(
    "--wait-children",
    type=click.FloatRange(0),
    default=5,
    show_default=True,
    metavar="S",
    help="How long to follow children that outlive the program.",
)
@click.option(
    "--hold",
    type=click.FloatRange(0),
    default=10,
    show_default=True,
    metavar="S",
    help="How long a process may wait at its end to be looked at.",
)
@click.option(
    "--depth", type=click.IntRange(1, 4096), default=128, show_default=True, help="Frames kept of a call stack."
)
@click.option("--no-free-stacks", is_flag=True, help="No call stacks of free: a smaller trace, and less time.")
@click.option(
    "--sample",
    callback=_bytes,
    default=None,
    metavar="BYTES",
    help="Record allocations by chance, one in BYTES (512K, 1M) on average: cheap; what is shown are estimates.",
)
@click.option("--sample-seed", type=click.IntRange(0), default=0, hidden=True)
@click.option("--no-residency", is_flag=True, help="No snapshots of pages (no ledger).")
@click.option("--no-peak", is_flag=True, help="No snapshot at the highest RSS.")
@click.option("--no-symbols", is_flag=True, help="Do not resolve function names.")
@click.option(
    "--spill-limit",
    type=click.FloatRange(0),
    default=None,
    metavar="GIB",
    help="Disk space beside the trace for events that wait to be written.  [default: half of what is free]",
)
@click.option("--keep-spool", is_flag=True, hidden=True)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing unless something goes wrong.")
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] CMD [ARG]...")
def command(
    output: Path | None,
    interval: float,
    snapshot_every: float | None,
    wait_children: float,
    hold: float,
    depth: int,
    no_free_stacks: bool,
    sample: int,
    sample_seed: int,
    no_residency: bool,
    no_peak: bool,
    no_symbols: bool,
    spill_limit: float | None,
    keep_spool: bool,
    quiet: bool,
    cmd: tuple[str, ...],
) -> None:
    from heapledger.tracer import launch

    outcome = launch.run(
        list(cmd),
        launch.RunOptions(
            output=output,
            interval=interval / 1000,
            snapshot_every=snapshot_every or 0.0,
            wait_children=wait_children,
            hold=hold,
            depth=depth,
            free_stacks=not no_free_stacks,
            sample_bytes=sample,
            sample_seed=sample_seed,
            residency=not no_residency,
            peaks=not no_peak,
            symbols=not no_symbols,
            keep_spool=keep_spool,
            spill_limit=None if spill_limit is None else int(spill_limit * (1 << 30)),
            quiet=quiet,
        ),
    )
    for problem in outcome.problems if outcome.trace is not None else []:
        launch.say(problem)
    if outcome.trace is None and outcome.spool is not None:
        launch.say(f"what was not written yet is in {outcome.spool} (heapledger recover {outcome.spool})")
    if outcome.summary:
        launch.say(outcome.summary, quiet=quiet)
    launch.end_as(outcome.status)
