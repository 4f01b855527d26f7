"""All that is known about one process: the JSON of the reports, made once and kept.

The pages print these same objects that the API returns and the command line prints:
a figure cannot differ between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heapledger.web.desk import Progress

Json = Mapping[str, Any]
#: (t0 in ns or None, t1 in ns or None, points) → `timeline` JSON.
TimelineMaker = Callable[[int | None, int | None, int], Json]
#: A snapshot's id as text, "exit" or "peak" → `report` JSON.
ReportMaker = Callable[[str], Json]


@dataclass(frozen=True, slots=True)
class Books:
    """Results for one process of one content of a file."""

    process_id: int
    #: The report at exit, or of the moment nearest to it that there is.
    report: Json
    #: That report, and the one at peak where there is a snapshot of it.
    reports: tuple[Json, ...]
    leaks: Json
    holes: Json
    verify: Json
    report_at: ReportMaker
    timeline: TimelineMaker


def make_books(path: Path, process_id: int | None, progress: Progress) -> Books:
    raise NotImplementedError
