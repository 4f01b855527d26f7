"""`heapledger info`: what a trace file holds."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from heapledger.cli import _analysis as common

if TYPE_CHECKING:
    from heapledger.analyzer.reports.text import Page
    from heapledger.store.reader import Trace

EXAMPLES = """\
\b
Examples:
  heapledger info app.heapledger
  heapledger info --blocks app.heapledger      bytes by stream and process
  heapledger info --check app.heapledger       open every block
  heapledger info --format json app.heapledger | jq '.processes[].events'"""


@click.command("info", epilog=EXAMPLES)
@common.file_argument
@click.option("--blocks", "streams", is_flag=True, help="Show the bytes of each stream of the compressed blocks.")
@click.option("--check", is_flag=True, help="Open every block, to find all damage.")
@common.format_option
def command(file: str, streams: bool, check: bool, form: str) -> None:
    """What a trace file holds: session, processes, events, losses, damage."""
    with common.opened(file) as trace:
        result = build(trace, streams=streams, check=check)
    if form == "json":
        common.print_json(result)
    else:
        render(result, common.page())


def build(trace: Trace, *, streams: bool = False, check: bool = False) -> dict[str, Any]:
    """The report as JSON; see docs/trace-file.md."""
    session = trace.session
    processes = [_process(trace, row) for row in trace.processes()]
    if check:
        trace.check()
    result: dict[str, Any] = {
        "file": str(trace.path),
        "file_bytes": os.path.getsize(trace.path),
        "heapledger": session.heapledger_version,
        "source": session.source,
        "command": session.command,
        "cwd": session.cwd,
        "start_unix_ns": session.start_unix_ns,
        "duration_ns": session.end_ns,
        "complete": session.end_ns is not None or session.source == "mtrace",
        "host": session.host,
        "collector": session.collector,
        "events": trace.event_count,
        "lost": sum(process["lost"] for process in processes),
        "processes": processes,
        "checked": check,
        "damaged": [_damage(damage) for damage in trace.damaged],
    }
    if streams:
        result["streams"] = _streams(trace, processes)
    return result


def _process(trace: Trace, row: Any) -> dict[str, Any]:
    kinds = np.zeros(256, np.int64)
    for events in trace.events(row.id, ["kind"]):
        kinds += np.bincount(events.kind, minlength=256)
    samples = trace.samples(row.id)
    return {
        "id": row.id,
        "pid": row.pid,
        "parent_id": row.parent_id,
        "start": row.start,
        "exe": row.exe,
        "argv": row.argv,
        "libc_version": row.libc_version,
        "start_ns": row.start_ns,
        "end_ns": row.end_ns,
        "end": row.end,
        "exit_status": row.exit_status,
        "events": row.events,
        "lost": row.lost,
        "kinds": {_kind_name(kind): count for kind, count in enumerate(kinds.tolist()) if count},
        "threads": len(trace.threads(row.id)),
        "modules": len(trace.modules(row.id)),
        "samples": len(samples["rss"]),
        "peak_rss_bytes": int(samples["rss"].max()) if len(samples["rss"]) else None,
        "snapshots": [
            {"id": s.id, "reason": s.reason, "time_ns": s.time_ns, "rss_bytes": s.rss_bytes, "method": s.method}
            for s in trace.snapshots(row.id)
        ],
        "notes": row.notes,
    }


def _kind_name(kind: int) -> str:
    from heapledger.store.events import Kind

    with contextlib.suppress(ValueError):
        return Kind(kind).name.lower()
    return f"unknown {kind}"


def _damage(damage: Any) -> dict[str, Any]:
    return {
        "process_id": damage.process_id,
        "events": damage.events,
        "first_seq": damage.first_seq,
        "last_seq": damage.last_seq,
        "reason": damage.reason,
    }


def _streams(trace: Trace, processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each stream of the blocks of each process takes in the file; docs/trace-file.md says what is in them."""
    pids = {process["id"]: process["pid"] for process in processes}
    events = {process["id"]: max(process["events"], 1) for process in processes}
    return [
        {
            "process_id": size.process_id,
            "pid": pids.get(size.process_id),
            "of": size.what,
            "name": size.name,
            "bytes": size.bytes,
            "raw_bytes": size.raw_bytes,
            "bytes_per_event": size.bytes / events.get(size.process_id, 1),
        }
        for size in trace.stream_sizes()
    ]


def render(result: dict[str, Any], page: Page) -> None:
    """The report as text, 80 columns."""
    from heapledger.analyzer.reports.text import duration, safe, shorten, size

    page.line(f"{shorten(' '.join(map(safe, result['command'])), 76)}", style="bold")
    how = {"run": "recorded", "mtrace": "imported from an mtrace log", "recover": "recovered from a spool"}
    facts = [how.get(result["source"], safe(result["source"])), f"by heapledger {safe(result['heapledger'])}"]
    if result["duration_ns"]:
        facts.append(f"took {duration(result['duration_ns'])}")
    page.line(", ".join(facts))
    host = ", ".join(
        safe(str(result["host"][key])) for key in ("hostname", "kernel", "machine") if result["host"].get(key)
    )
    if host:
        page.line(f"on {host}")
    events = max(result["events"], 1)
    page.line(
        f"{result['events']:,} events, {result['lost']:,} lost, {size(result['file_bytes'])}"
        f" ({result['file_bytes'] / events:.2f} bytes an event with everything)"
    )
    if not result["complete"]:
        page.line("the session was cut off: it has no end", style="yellow")
    _render_processes(result["processes"], page)
    for process in result["processes"]:
        _render_process(process, page, alone=len(result["processes"]) == 1)
    if "streams" in result:
        _render_streams(result, page)
    _render_damage(result, page)


def _tree(processes: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(depth, process): children behind their parents. A loop in the parents cannot hide a process."""
    known = {process["id"] for process in processes}
    children: dict[int | None, list[dict[str, Any]]] = {}
    for process in sorted(processes, key=lambda process: (process["start_ns"], process["id"])):
        parent = process["parent_id"] if process["parent_id"] in known else None
        children.setdefault(parent, []).append(process)
    found: list[tuple[int, dict[str, Any]]] = []
    todo = [(0, process) for process in reversed(children.get(None, []))]
    while todo:
        depth, process = todo.pop()
        found.append((depth, process))
        todo.extend((depth + 1, child) for child in reversed(children.get(process["id"], [])))
    seen = {process["id"] for _, process in found}
    return found + [(0, process) for process in processes if process["id"] not in seen]


def _render_processes(processes: list[dict[str, Any]], page: Page) -> None:
    from heapledger.analyzer.reports.text import duration, size

    rows = []
    for depth, process in _tree(processes):
        name = os.path.basename(process["exe"]) or " ".join(process["argv"]) or process["start"]
        lasted = None if process["end_ns"] is None else process["end_ns"] - process["start_ns"]
        peak = process["peak_rss_bytes"]
        rows.append(
            [
                "  " * min(depth, 8) + name,
                str(process["pid"] or "-"),
                f"{process['events']:,}",
                f"{process['lost']:,}",
                "-" if peak is None else size(peak),
                "-" if lasted is None else duration(lasted),
                _ending(process),
            ]
        )
    page.heading("Processes")
    page.table(["name", ">pid", ">events", ">lost", ">peak RSS", ">time", "end"], rows)


def _ending(process: dict[str, Any]) -> str:
    status = "" if process["exit_status"] is None else f" {process['exit_status']}"
    return (process["end"] or "-") + (status if process["end"] else "")


def _render_process(process: dict[str, Any], page: Page, *, alone: bool) -> None:
    from heapledger.analyzer.reports.text import counted, duration, size

    page.heading("Events" if alone else f"Process {process['pid']}")
    page.line(", ".join(f"{count:,} {name}" for name, count in process["kinds"].items()) or "no events")
    page.line(
        f"libc {process['libc_version'] or 'not known'}, {counted(process['threads'], 'thread')},"
        f" {counted(process['modules'], 'module')},"
        f" {counted(process['samples'], 'sample')}"
    )
    for snapshot in process["snapshots"]:
        page.line(
            f"snapshot {snapshot['id']} ({snapshot['reason']}) at {duration(snapshot['time_ns'])}:"
            f" RSS {size(snapshot['rss_bytes'])}, by {snapshot['method']}"
        )
    for note in process["notes"]:
        page.line(f"* {note}", style="yellow")


def _render_streams(result: dict[str, Any], page: Page) -> None:
    for process in result["processes"]:
        streams = [stream for stream in result["streams"] if stream["process_id"] == process["id"]]
        if not streams:
            continue
        page.heading("Bytes by stream" + ("" if len(result["processes"]) == 1 else f", process {process['pid']}"))
        rows = [
            [s["of"], s["name"], f"{s['raw_bytes']:,}", f"{s['bytes']:,}", f"{s['bytes_per_event']:.3f}"]
            for s in streams
        ]
        totals = [sum(stream[key] for stream in streams) for key in ("raw_bytes", "bytes", "bytes_per_event")]
        rows.append(["all", "", f"{totals[0]:,}", f"{totals[1]:,}", f"{totals[2]:.3f}"])
        page.table(["of", "stream", ">before zstd", ">bytes", ">an event"], rows)


def _render_damage(result: dict[str, Any], page: Page) -> None:
    page.line()
    if not result["damaged"]:
        page.line("no damage" if result["checked"] else "no damage seen (--check opens every block)")
        return
    events = sum(damage["events"] for damage in result["damaged"])
    page.line(f"{len(result['damaged'])} damaged blocks, {events:,} events cannot be read:", style="red")
    for damage in result["damaged"][:20]:
        page.line(f"* seq {damage['first_seq']} to {damage['last_seq']}: {damage['reason']}")
