"""What the dashboard serves, and to whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

#: Names under which a browser on this machine reaches a loopback address.
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

#: The port that is tried first when none is asked for.
DEFAULT_PORT = 8321


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one application. `paths` are the only files and folders it ever opens.

    `allowed_hosts` are names that a request's Host header may carry besides the loopback ones: a page of another site
    that points its own name at 127.0.0.1 (DNS rebinding) does not carry one of them.
    """

    paths: tuple[Path, ...] = ()
    allowed_hosts: frozenset[str] = field(default_factory=frozenset)
    #: Traces of one folder that are listed, newest first: a folder of a million files must not stall the index.
    folder_limit: int = 500
    #: Processes whose results are kept in memory.
    kept_results: int = 32
    #: How long a request waits for an analysis before it shows the progress page instead.
    patience_s: float = 0.4
    #: How long results of a file that keeps changing are shown before they are made anew.
    rest_s: float = 5.0
    #: Analyses that may wait for their turn; more are refused with a clear sentence.
    queue_limit: int = 16

    def is_allowed_host(self, name: str) -> bool:
        """`name`: a Host header without its port, lower case."""
        return name in LOOPBACK_NAMES or name in self.allowed_hosts
