"""GET /api/v1/traces/<id>/status: how far the first analysis is. Asking starts it."""

from __future__ import annotations

from flask import jsonify
from flask.typing import ResponseReturnValue

from heapledger.web.desk import Job
from heapledger.web.rooms import ask_desk, find_entry


def as_json(job: Job) -> dict[str, object]:
    return {"state": job.state.value, "progress": round(job.progress, 4), "elapsed_s": round(job.elapsed_s, 2)}


def show(trace_id: str) -> ResponseReturnValue:
    return jsonify(as_json(ask_desk(find_entry(trace_id))))
