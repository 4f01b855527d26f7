"""Errors as a page with one clear sentence, or as JSON for the API."""

from __future__ import annotations

import logging

from flask import Flask, Response, jsonify, make_response, render_template, request
from werkzeug.exceptions import HTTPException, InternalServerError

from heapledger.errors import HeapledgerError, InputError, NotMeasuredError, UsageError
from heapledger.web.desk import TooBusyError

log = logging.getLogger("heapledger.web")


def status_of(error: HeapledgerError) -> int:
    """The HTTP status that says the same as the command line's exit code."""
    if isinstance(error, NotMeasuredError):
        return 404
    if isinstance(error, TooBusyError):
        return 503
    if isinstance(error, InputError):
        return 422
    if isinstance(error, UsageError):
        return 400
    return 500


def respond(status: int, title: str, message: str, hint: str = "") -> Response:
    if request.path.startswith("/api/"):
        response = jsonify({"error": {"status": status, "title": title, "message": message, "hint": hint}})
    else:
        response = make_response(render_template("error.html", title=title, message=message, hint=hint))
    response.status_code = status
    return response


def register(app: Flask) -> None:
    def on_heapledger_error(error: HeapledgerError) -> Response:
        response = respond(status_of(error), "This cannot be shown", error.message, error.hint)
        if isinstance(error, TooBusyError):
            response.headers["Retry-After"] = "5"
        return response

    def on_http_error(error: HTTPException) -> Response:
        response = respond(error.code or 500, error.name, error.description or error.name)
        # 405 says in a header which methods are allowed.
        for name, value in error.get_headers():
            if name == "Allow":
                response.headers[name] = value
        return response

    def on_bug(error: Exception) -> Response:
        # The last resort of a server: the reader gets a sentence, the log the traceback.
        log.exception("%s %s", request.method, request.path, exc_info=error)
        problem = InternalServerError()
        return respond(500, problem.name, "heapledger failed to answer this; its log on the terminal says why.")

    app.register_error_handler(HeapledgerError, on_heapledger_error)
    app.register_error_handler(HTTPException, on_http_error)
    app.register_error_handler(Exception, on_bug)
