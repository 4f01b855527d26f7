"""`python -m heapledger.web.health`: asks the dashboard in this container whether it is well. Exit 0 or 1."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request


def is_healthy(bind: str) -> bool:
    """`bind`: HOST:PORT as the server was given it; it is asked through loopback."""
    port = bind.rpartition(":")[2]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=3) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(0 if is_healthy(os.environ.get("HEAPLEDGER_BIND", "127.0.0.1:8321")) else 1)
