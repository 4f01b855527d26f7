"""GET /api/v1/traces/<id>/...: the results of one process, as the command line prints them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flask import jsonify, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import BadRequest

from heapledger.web.api.status import as_json
from heapledger.web.books import Books
from heapledger.web.desk import EVERY_PROCESS, State
from heapledger.web.rooms import ask_desk, find_entry, number_argument

#: More than a plotly SVG line draws swiftly.
MAX_POINTS = 4_000
DEFAULT_POINTS = 1_000


def answer(
    trace_id: str, pick: Callable[[Books], Mapping[str, Any]], default: int | None = None
) -> ResponseReturnValue:
    """What `pick` takes from the books; 202 with the status while they are being made."""
    job = ask_desk(find_entry(trace_id), default)
    if job.state is not State.DONE or job.books is None:
        return jsonify(as_json(job)), 202, {"Retry-After": "2"}
    return jsonify(pick(job.books))


def report(trace_id: str) -> ResponseReturnValue:
    at = moment(request.args.get("at") or None)
    return answer(trace_id, lambda books: books.report_at(at))


def moment(text: str | None) -> str | int | None:
    """`at` as the report takes it."""
    if text is None or text in ("exit", "peak"):
        return text
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    raise BadRequest("at has to be exit, peak, or the id of a snapshot.")


def timeline(trace_id: str) -> ResponseReturnValue:
    start, end = number_argument("t0", None), number_argument("t1", None)
    if start is not None and end is not None and end <= start:
        raise BadRequest("t1 has to be later than t0.")
    points = number_argument("points", DEFAULT_POINTS, 2, MAX_POINTS) or DEFAULT_POINTS
    return answer(trace_id, lambda books: books.timeline(start, end, points))


def leaks(trace_id: str) -> ResponseReturnValue:
    return answer(trace_id, lambda books: books.leaks)


def temporary(trace_id: str) -> ResponseReturnValue:
    return answer(trace_id, lambda books: books.temporary_or_error())


def holes(trace_id: str) -> ResponseReturnValue:
    return answer(trace_id, lambda books: books.holes_or_error())


def verify(trace_id: str) -> ResponseReturnValue:
    return answer(trace_id, lambda books: books.verify, default=EVERY_PROCESS)
