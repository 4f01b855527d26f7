"""/api/v1: the command line's JSON over HTTP, one file a resource.

    /api/v1/traces                                       the catalogue
    /api/v1/traces/<id>/status                           how far the first analysis is
    /api/v1/traces/<id>/report?at=exit|peak|ID           as `heapledger report --format json`
    /api/v1/traces/<id>/timeline?t0=&t1=&points=         as `heapledger timeline --format json`
    /api/v1/traces/<id>/leaks · /temporary · /holes · /verify   as the commands of these names

`process=ID` chooses a process (the `id` of the report's `processes`). While the first analysis runs the answer is 202
with the status. Errors are {"error": {"status", "title", "message", "hint"}}.
"""

from __future__ import annotations

from flask import Blueprint

from heapledger.web.api import results, status, traces

api = Blueprint("api", __name__, url_prefix="/api/v1")
api.add_url_rule("/traces", endpoint="traces", view_func=traces.show)
api.add_url_rule("/traces/<trace_id>/status", endpoint="status", view_func=status.show)
api.add_url_rule("/traces/<trace_id>/report", endpoint="report", view_func=results.report)
api.add_url_rule("/traces/<trace_id>/timeline", endpoint="timeline", view_func=results.timeline)
api.add_url_rule("/traces/<trace_id>/leaks", endpoint="leaks", view_func=results.leaks)
api.add_url_rule("/traces/<trace_id>/temporary", endpoint="temporary", view_func=results.temporary)
api.add_url_rule("/traces/<trace_id>/holes", endpoint="holes", view_func=results.holes)
api.add_url_rule("/traces/<trace_id>/verify", endpoint="verify", view_func=results.verify)
