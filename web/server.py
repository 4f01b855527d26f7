"""`heapledger serve`: binds, says where it is, answers until Ctrl-C or SIGTERM."""

from __future__ import annotations

import errno
import ipaddress
import logging
import signal
import socket
import threading
import webbrowser
from pathlib import Path
from types import FrameType

import click
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from heapledger.errors import UsageError
from heapledger.web.app import create_app
from heapledger.web.catalogue import check_paths
from heapledger.web.config import DEFAULT_PORT, LOOPBACK_NAMES, Config


class RequestHandler(WSGIRequestHandler):
    """Says who answers, and not with which versions; a client that sends nothing for a while is let go."""

    timeout = 30
    protocol_version = "HTTP/1.1"
    verbose = False

    def version_string(self) -> str:
        return "heapledger"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        if self.verbose:
            super().log_request(code, size)


class VerboseRequestHandler(RequestHandler):
    verbose = True


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_name(host: str) -> str:
    """What stands for `host` in a URL and in a Host header."""
    return f"[{host}]" if ":" in host else host


def bind(host: str, port: int | None) -> socket.socket:
    """A listening socket. `port` None: the usual one, or a free one where that is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one
        raise UsageError(f"{host!r} is not an address of this machine") from error
    wanted = DEFAULT_PORT if port is None else port
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address[0], wanted))
        # Only listening tells for sure: SO_REUSEADDR lets two sockets bind one port as long as neither listens.
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            if port is None:
                return bind(host, 0)
            hint = "Choose another with --port, or --port 0 for a free one."
            raise UsageError(f"port {port} on {host} is taken by another program", hint=hint) from error
        raise UsageError(f"cannot listen on {host} port {wanted}: {error.strerror}") from error
    return listener


def names_for(host: str, allowed_hosts: frozenset[str]) -> frozenset[str]:
    """Host headers to answer: the address listened on goes without saying, unless it means "all of them"."""
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    return allowed_hosts if everywhere else allowed_hosts | {url_name(host).lower()}


def stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def announce(host: str, url: str, allowed_hosts: frozenset[str]) -> None:
    click.echo(f"heapledger: serving on {url}")
    if not is_loopback(host):
        click.echo(
            f"heapledger: warning: listening on {host}: whoever reaches this port can read the traces; "
            f"answered names: {', '.join(sorted(allowed_hosts | LOOPBACK_NAMES))}",
            err=True,
        )
    click.echo("  Ctrl-C stops it.", err=True)


def serve(
    paths: tuple[Path, ...],
    *,
    host: str,
    port: int | None,
    allowed_hosts: frozenset[str] = frozenset(),
    open_browser: bool = False,
    verbose: bool = False,
) -> None:
    """Serves until SIGINT or SIGTERM. A path that is no trace, or a taken port, is an error before anything starts."""
    check_paths(paths)
    names = names_for(host, allowed_hosts)
    app = create_app(Config(paths=tuple(path.resolve() for path in paths), allowed_hosts=names))
    logging.getLogger("werkzeug").setLevel(logging.INFO if verbose else logging.ERROR)
    listener = bind(host, port)
    try:
        server = wsgi_server(app, host, listener, verbose=verbose)
        url = f"http://{url_name('127.0.0.1' if host == '0.0.0.0' else host)}:{listener.getsockname()[1]}/"
        announce(host, url, names)
        signal.signal(signal.SIGTERM, stop)
        if open_browser:
            # A browser in the terminal (w3m) would not return before it is closed, and needs us to answer meanwhile.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        server.serve_forever()
    finally:
        listener.close()


def wsgi_server(app: object, host: str, listener: socket.socket, *, verbose: bool) -> BaseWSGIServer:
    """werkzeug's threaded server on a socket that already listens. It is for one reader on this machine; the container
    runs the same application under gunicorn."""
    handler = VerboseRequestHandler if verbose else RequestHandler
    port = int(listener.getsockname()[1])
    return make_server(
        host,
        port,
        app,  # type: ignore[arg-type]
        threaded=True,
        request_handler=handler,
        fd=listener.fileno(),
    )
