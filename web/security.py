"""Who may ask, and what a browser may do with the answer.

Traces are untrusted input: a symbol can be `<script>`. Everything is escaped where it is printed; the policy below is
the second wall. plotly.js writes inline styles, hence `style-src 'unsafe-inline'`; scripts come from this host only.
"""

from __future__ import annotations

import re

from flask import Flask, Response, request
from werkzeug.exceptions import BadRequest, Forbidden

from heapledger.web.config import Config

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}

#: A query string longer than this is not one of ours.
QUERY_LIMIT = 2_000


#: A name or an IPv4 address, or an IPv6 address in brackets; then perhaps a port, and nothing else.
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")


def host_name(header: str) -> str:
    """The name in a Host header, without port, lower case: `[::1]:80` → `[::1]`. Empty if it is not well-formed."""
    match = HOST.fullmatch(header.lower())
    return match[1] if match else ""


def guard(app: Flask, config: Config) -> None:
    """Registers the checks before each request and the headers after it."""

    def check_request() -> None:
        name = host_name(request.headers.get("Host", ""))
        if not config.is_allowed_host(name):
            raise Forbidden("This dashboard does not answer under that host name; see `heapledger serve --allow-host`.")
        if len(request.query_string) > QUERY_LIMIT:
            raise BadRequest("The query is too long.")

    def add_headers(response: Response) -> Response:
        for name, value in HEADERS.items():
            response.headers[name] = value
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    app.before_request(check_request)
    app.after_request(add_headers)
