"""The command line: one file a command, loaded only when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from heapledger import __version__
from heapledger.errors import HeapledgerError

#: Command name → (module in this package, one line of help). In the order `heapledger --help` shows them.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "Trace a program; the exit status is the program's own."),
    "import": ("import_", "Turn a log of glibc's mtrace into a trace file."),
    "recover": ("recover", "Turn a spool left by a crash into a trace file."),
    "info": ("info", "What a trace file holds."),
    "report": ("report", "Who owns each resident page, at exit or at peak."),
    "leaks": ("leaks", "Blocks not freed at exit, by call site."),
    "temporary": ("temporary", "Blocks freed before anything else was allocated, by site."),
    "holes": ("holes", "Free memory that stays resident, and what pins it."),
    "timeline": ("timeline", "Live bytes, heap, holes and RSS over time."),
    "verify": ("verify", "How much of the model's prediction was exact."),
    "sql": ("sql", "Query events and tables as rows."),
    "export": ("export", "Write the trace in another tool's format."),
    "serve": ("serve", "Look at traces in the browser."),
}

EXAMPLES = """\
\b
Examples:
  heapledger run -o app.heapledger -- ./app --its-own args
  heapledger report app.heapledger
  heapledger serve app.heapledger

\b
Exit status: that of the program for `run`; otherwise 0 good, 1 our fault,
2 usage or unreadable input, 3 leaks found with --fail-on-leak,
4 not measured. NO_COLOR is honoured."""


class LazyGroup(click.Group):
    """Imports a command's module when it is used: `heapledger run` need not pay for Flask."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"heapledger.cli.{COMMANDS[cmd_name][0]}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our output went away (`| head`): not an error, and Python must not complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="heapledger")
def command() -> None:
    """Where does my Linux process's memory go?"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: deliberate errors become one line, a hint, and their exit code."""
    try:
        status: Any = command.main(args=argv, prog_name="heapledger", standalone_mode=False)
    except HeapledgerError as error:
        click.echo(f"heapledger: {error.message}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("heapledger: interrupted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
