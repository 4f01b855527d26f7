"""gunicorn's settings for the container; see wsgi.py.

One worker: analyses and their results are kept in the process. Requests are threads of it.
"""

from __future__ import annotations

import os

bind = os.environ.get("HEAPLEDGER_BIND", "127.0.0.1:8321")
workers = 1
worker_class = "gthread"
threads = 8
#: Seconds; a request never waits for an analysis, so none comes near it.
timeout = 60
graceful_timeout = 5
control_socket_disable = True
#: Bytes and counts of a request that is read at all.
limit_request_line = 4094
limit_request_fields = 64
