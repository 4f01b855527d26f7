"""What the commands that look at a trace share: opening it, the progress bar, and how results are printed."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from heapledger.analyzer.reports.text import Page
    from heapledger.analyzer.session import Progress
    from heapledger.store.reader import Trace

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

file_argument = click.argument("file", type=click.Path())
pid_option = click.option(
    "--pid",
    type=int,
    help="The process to look at: its pid, or its id in the trace. Default: the one with most events.",
)
format_option = click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Kind of output."
)
at_option = click.option(
    "--at",
    metavar="exit|peak|ID",
    help="The moment: at exit, at the highest RSS seen, or a snapshot's id. Default: exit.",
)


def top_option(what: str) -> Decorator:
    """`--top N`: how many to show. The JSON has up to 100 unless it is given."""
    help_text = f"Show the N largest {what}. Default: 10, in JSON 100."
    return click.option("--top", type=click.IntRange(min=1), metavar="N", help=help_text)


def moment(at: str | None) -> str | int | None:
    """`--at` as the reports take it."""
    if at is None or not at.isascii():
        return at
    if at.isdigit():
        return int(at)
    if at not in ("exit", "peak", "request", "exec"):
        raise click.BadParameter("one of exit, peak, request, exec, or a snapshot's id", param_hint="--at")
    return at


@contextlib.contextmanager
def opened(file: str) -> Iterator[Trace]:
    """The trace, closed again at the end."""
    from heapledger.store.reader import Trace

    with Trace(file) as trace:
        yield trace


def page() -> Page:
    """Standard output, colours only on a terminal and without NO_COLOR; 80 columns when piped."""
    from rich.console import Console

    from heapledger.analyzer.reports.text import Page

    return Page(Console(highlight=False, markup=False, emoji=False))


def print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2))


#: Work that is done sooner needs no bar.
_PATIENCE_S = 0.4


@contextlib.contextmanager
def progress(label: str) -> Iterator[Progress | None]:
    """A progress bar on standard error if that is a terminal and it takes a while; None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    bar = _LateBar(label)
    try:
        yield bar.update
    finally:
        bar.stop()


class _LateBar:
    """A bar that appears once the work turns out to be long."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = time.monotonic()
        self._bar: Any = None

    def update(self, done: int, total: int) -> None:
        if self._bar is None:
            if time.monotonic() - self._start < _PATIENCE_S or done >= total:
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn(self._label), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._label, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
