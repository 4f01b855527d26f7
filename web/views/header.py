"""The top of a trace's page: what ran, how it ended, and the figures that matter first."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heapledger.web.units import shorten, visible

Json = Mapping[str, Any]

#: Processes that the selector offers.
OPTION_LIMIT = 200

ENDS = {
    "": "",
    "exit": "exited",
    "_exit": "exited",
    "quick_exit": "exited",
    "exec": "replaced by exec",
    "signal": "killed by a signal",
    "stopped": "recording stopped",
    "running": "still running",
    "vanished": "vanished",
}


@dataclass(frozen=True, slots=True)
class ProcessOption:
    id: int
    text: str
    selected: bool


@dataclass(frozen=True, slots=True)
class HeaderView:
    command: str
    full_command: str
    #: 0: not known, as in an imported log.
    start_unix_ns: int
    duration_ns: int | None
    pid: int
    #: How the process ended; empty if that is not known.
    ending: str
    failed: bool
    events: int
    lost: int
    glibc: str
    #: Not 0: the trace is a sample, one allocation in about so many bytes.
    sample_bytes: int
    options: tuple[ProcessOption, ...]
    #: All there are; a build has thousands, and not all are offered.
    processes: int
    notes: tuple[str, ...]


def command_text(command: Sequence[str]) -> str:
    return visible(shlex.join(command)) if command else "no command recorded"


def ending(process: Json) -> tuple[str, bool]:
    """How the process ended, and whether that is a failure."""
    words = ENDS.get(process["end"], visible(process["end"]))
    status = process["exit_status"]
    if status is None:
        return words, process["end"] in ("signal", "vanished")
    if process["end"] == "signal" and status < 0:
        return f"killed by signal {-status}", True
    if process["end"] == "signal" and status > 128:
        return f"killed by signal {status - 128}", True
    return f"{words} with status {status}", status != 0


def offered(processes: Sequence[Json], selected_id: int) -> list[Json]:
    """The processes that the selector offers: those with most events, and the one that is shown."""
    busiest = sorted(processes, key=lambda process: -process["events"])[:OPTION_LIMIT]
    ids = {process["id"] for process in busiest} | {selected_id}
    return [process for process in processes if process["id"] in ids]


def option(process: Json, selected_id: int) -> ProcessOption:
    name = command_text(process["argv"]) if process["argv"] else visible(process["exe"])
    text = f"{process['pid']} · {shorten(name, 70)} · {process['events']:,} events"
    return ProcessOption(process["id"], text, process["id"] == selected_id)


def header_view(report: Json) -> HeaderView:
    session, process = report["session"], report["process"]
    words, failed = ending(process)
    command = session["command"] or process["argv"]
    return HeaderView(
        command=shorten(command_text(command), 200),
        full_command=command_text(command),
        start_unix_ns=session["start_unix_ns"],
        duration_ns=session["duration_ns"],
        pid=process["pid"],
        ending=words,
        failed=failed,
        events=process["events"],
        lost=process["lost"],
        glibc=visible(process["glibc"] or ""),
        sample_bytes=process["sample_bytes"],
        options=tuple(option(other, process["id"]) for other in offered(report["processes"], process["id"])),
        processes=len(report["processes"]),
        notes=tuple(visible(note) for note in dict.fromkeys([*process["notes"], *report["notes"]])),
    )
