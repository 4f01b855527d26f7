"""The HTML pages, one file a page."""

from __future__ import annotations

from flask import Blueprint

from heapledger.web.pages import index, trace

pages = Blueprint("pages", __name__)
pages.add_url_rule("/", endpoint="index", view_func=index.show)
pages.add_url_rule("/traces/<trace_id>", endpoint="trace", view_func=trace.show)
