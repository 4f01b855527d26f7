"""GET /api/v1/traces: what the index page lists."""

from __future__ import annotations

from flask import jsonify, url_for
from flask.typing import ResponseReturnValue

from heapledger.web.catalogue import Entry, Summary
from heapledger.web.rooms import rooms


def as_json(entry: Entry, summary: Summary) -> dict[str, object]:
    return {
        "id": entry.id,
        "name": entry.name,
        "url": url_for("pages.trace", trace_id=entry.id),
        "command": list(summary.command),
        "start_unix_ns": summary.start_unix_ns,
        "duration_ns": summary.duration_ns,
        "size_bytes": summary.size_bytes,
        "events": summary.events,
        "lost": summary.lost,
        "processes": summary.processes,
        "peak_rss_bytes": summary.peak_rss_bytes,
        "problem": summary.problem or None,
    }


def show() -> ResponseReturnValue:
    catalogue = rooms().catalogue
    return jsonify({"traces": [as_json(entry, catalogue.summary(entry)) for entry in catalogue.entries()]})
