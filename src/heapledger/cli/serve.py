"""`heapledger serve`: the dashboard in the browser."""

from __future__ import annotations

from pathlib import Path

import click

from heapledger.web.config import DEFAULT_PORT

EPILOG = """\
\b
Examples:
  heapledger serve app.heapledger          one trace
  heapledger serve traces/ --open          a folder of them, in the browser
  heapledger serve --port 0 app.heapledger on a free port

\b
Only this machine is answered unless --host says otherwise. There is no
password: with --host 0.0.0.0 whoever reaches the port reads the traces."""


@click.command(name="serve", epilog=EPILOG)
@click.argument("paths", metavar="[FILE|FOLDER]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=None,
    help=f"Port to listen on; 0: a free one.  [default: {DEFAULT_PORT}, or a free one if that is taken]",
)
@click.option("--allow-host", "allowed_hosts", multiple=True, metavar="NAME", help="Also answer under this name.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the browser.")
@click.option("-v", "--verbose", is_flag=True, help="Print each request.")
def command(
    paths: tuple[Path, ...],
    host: str,
    port: int | None,
    allowed_hosts: tuple[str, ...],
    open_browser: bool,
    verbose: bool,
) -> None:
    """Look at traces in the browser.

    A FOLDER lists the *.heapledger files in it; without arguments, the current folder. Runs until Ctrl-C.
    """
    from heapledger.web.server import serve  # Flask is loaded only when it is needed, not for --help

    serve(
        paths or (Path(),),
        host=host,
        port=port,
        allowed_hosts=frozenset(name.lower() for name in allowed_hosts),
        open_browser=open_browser,
        verbose=verbose,
    )
