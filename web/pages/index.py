"""The list of traces."""

from __future__ import annotations

from flask import redirect, render_template, url_for
from flask.typing import ResponseReturnValue

from heapledger.web.rooms import rooms
from heapledger.web.views.index import index_rows


def show() -> ResponseReturnValue:
    """All traces; where exactly one file was given, that one right away."""
    catalogue, paths = rooms().catalogue, rooms().config.paths
    entries = catalogue.entries()
    if len(entries) == 1 and len(paths) == 1 and not paths[0].is_dir():
        return redirect(url_for("pages.trace", trace_id=entries[0].id))
    rows = index_rows([(entry, catalogue.summary(entry)) for entry in entries])
    return render_template("index.html", rows=rows, folders=[str(path) for path in paths if path.is_dir()])
