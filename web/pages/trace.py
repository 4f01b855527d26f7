"""The overview of one process of a trace, or how far its analysis is."""

from __future__ import annotations

from flask import make_response, render_template, request, url_for
from flask.typing import ResponseReturnValue

from heapledger.web.desk import State
from heapledger.web.rooms import ask_desk, find_entry
from heapledger.web.views.overview import overview


def show(trace_id: str) -> ResponseReturnValue:
    entry = find_entry(trace_id)
    job = ask_desk(entry)
    process = request.args.get("process") or None
    if job.state is not State.DONE or job.books is None:
        status_url = url_for("api.status", trace_id=trace_id, process=process)
        page = render_template("progress.html", name=entry.name, progress=job.progress, status_url=status_url)
        response = make_response(page, 202)
        response.headers["Retry-After"] = "2"
        return response
    return render_template("trace.html", trace_id=entry.id, name=entry.name, view=overview(job.books))
