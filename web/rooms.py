"""What the pages and the API share within one application, and how a request gets at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from flask import current_app, request
from werkzeug.exceptions import BadRequest, NotFound

from heapledger.web.catalogue import Catalogue, Entry
from heapledger.web.config import Config
from heapledger.web.desk import Desk, Job

EXTENSION = "heapledger"

#: The largest number a query may carry: what SQLite and the trace's times hold.
NUMBER_LIMIT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Rooms:
    config: Config
    catalogue: Catalogue
    desk: Desk


def rooms() -> Rooms:
    return cast(Rooms, current_app.extensions[EXTENSION])


def find_entry(trace_id: str) -> Entry:
    entry = rooms().catalogue.entry(trace_id)
    if entry is None:
        raise NotFound("There is no such trace here. It may have been moved or deleted.")
    return entry


def number_argument(name: str, default: int | None, low: int = 0, high: int = NUMBER_LIMIT) -> int | None:
    """A whole number of the query string, within [low, high]; anything else is refused in one sentence."""
    text = request.args.get(name)
    if text is None or text == "":
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 19) or not low <= int(text) <= high:
        raise BadRequest(f"{name} has to be a whole number from {low:,} to {high:,}.")
    return int(text)


def ask_desk(entry: Entry, default: int | None = None) -> Job:
    """The job of the process that the request's `process` names, or of `default` (None: the main one)."""
    process_id = number_argument("process", default)
    job = rooms().desk.ask(entry.path, process_id, patience_s=rooms().config.patience_s)
    if job.error is not None:
        raise job.error
    return job
