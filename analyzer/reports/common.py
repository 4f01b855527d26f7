"""What all reports share: processes, snapshots and call stacks as JSON."""

from __future__ import annotations

from typing import Any

from heapledger.analyzer.facts import Names
from heapledger.analyzer.reports.text import size
from heapledger.analyzer.session import START, Analysis, fork_chain
from heapledger.analyzer.sites import site_name, stack_json
from heapledger.errors import NotMeasuredError, UsageError
from heapledger.store.reader import Trace

VERSION = 1
#: Frames of one stack that are put into JSON.
MAX_FRAMES = 256
#: Snapshots that show a process at its end: a normal one, or that of an image replaced by exec.
_END_REASONS = ("exit", "exec")


def header(name: str, process: Any) -> dict[str, Any]:
    """The fields every report begins with."""
    return {"format": f"heapledger.{name}", "version": VERSION, "process": process_json(process)}


def process_json(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "pid": row.pid,
        "parent_id": row.parent_id,
        "start": row.start,
        "exe": row.exe,
        "argv": list(row.argv),
        "end": row.end,
        "exit_status": row.exit_status,
        "start_ns": row.start_ns,
        "end_ns": row.end_ns,
        "events": row.events,
        "lost": row.lost,
        "sample_bytes": row.sample_bytes,
        "glibc": row.libc_version,
        "notes": list(row.notes),
    }


def snapshot_json(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "reason": row.reason,
        "time_ns": row.time_ns,
        "seq": row.seq,
        "rss_bytes": row.rss_bytes,
        "method": row.method,
        "consistent": bool(row.consistent),
        "pause_ns": row.pause_ns,
        "threads": row.threads,
    }


def names_of(trace: Trace, process: Any) -> Names:
    """Call stacks of a process and of those it was forked from."""
    return Names(trace, fork_chain(trace.processes(), process))


def stack_of(names: Names, stored: list[int]) -> tuple[list[dict[str, Any]], str]:
    """A stored stack as JSON frames, and the name of its call site."""
    frames = names.frames(stored[0], stored[1])
    return stack_json(frames[:MAX_FRAMES]), site_name(frames)


def end_snapshot(snapshots: list[Any]) -> Any | None:
    """The snapshot at a process's end, if there is one."""
    found = [s for s in snapshots if s.reason in _END_REASONS]
    return found[-1] if found else None


def choose_snapshot(snapshots: list[Any], at: str | int | None) -> Any | None:
    """The snapshot that `--at` means. None (at None only): there is none at all.

    None: at exit, else the highest. "peak": the one with the highest RSS, whatever it was taken for. The maps at the
    start have no pages and are never meant.
    """
    snapshots = [s for s in snapshots if s.reason != START]
    if at is None:
        return end_snapshot(snapshots) or (_highest(snapshots) if snapshots else None)
    if at == "exit":
        found = end_snapshot(snapshots)
    elif at == "peak":
        found = _highest(snapshots) if snapshots else None
    else:
        found = next((s for s in reversed(snapshots) if at in (s.reason, s.id, str(s.id))), None)
        if found is None and str(at).isdigit():
            known = ", ".join(str(s.id) for s in snapshots) or "none"
            raise UsageError(f"this process has no snapshot {at}", hint=f"Its snapshots: {known}.")
    if found is None:
        known = ", ".join(dict.fromkeys(s.reason for s in snapshots))
        hint = f"Snapshots were taken at: {known}. Try --at with one of them." if known else "No snapshot was taken."
        raise NotMeasuredError(f"nobody looked at this process's pages at {at}", hint=hint)
    return found


def _highest(snapshots: list[Any]) -> Any:
    return max(snapshots, key=lambda s: (s.rss_bytes, s.time_ns))


def errors(analysis: Analysis, **standard_errors: int) -> dict[str, Any]:
    """What marks figures as estimates: `errors(a, bytes=3)` → "estimated", "standard_error_bytes"; {} of exact ones."""
    if not analysis.sample_bytes:
        return {}
    return {"estimated": True, **{f"standard_error_{name}": value for name, value in standard_errors.items()}}


#: What makes a call site of one fact that of another.
_SITE = ("name", "function", "file", "line", "module")


def lifetimes_by_site(analysis: Analysis) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What became of the blocks of each call site, by `site_key`."""
    return {site_key(site): site for site in analysis.lifetimes().get("sites", [])}


def site_key(site: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(site[field] for field in _SITE)


def freed_at_json(analysis: Analysis, site: dict[str, Any] | None, names: Names) -> dict[str, Any]:
    """Where blocks of a call site (of `lifetimes_by_site`) are freed, the most frequent place first."""
    if site is None:
        return {"freed_blocks": 0, "freed_at": []}
    blocks, _, blocks_error, _ = site["released"]
    places = [
        {
            **{field: place[field] for field in _SITE},
            "blocks": place["released"][0],
            "bytes": place["released"][1],
            "share": place["released"][0] / max(blocks, 1),
            "stack": stack_of(names, place["stack"])[0],
            **errors(analysis, blocks=place["released"][2], bytes=place["released"][3]),
        }
        for place in site["freed_at"]
    ]
    return {"freed_blocks": blocks, "freed_at": places, **errors(analysis, freed_blocks=blocks_error)}


def _forced_note(summary: dict[str, Any]) -> str:
    elsewhere = summary["reasons"].get("OTHER_ARENA", 0)
    wrong = summary["agreement"]["forced"] - elsewhere
    parts = []
    if elsewhere:
        parts.append(
            f"{elsewhere:,} addresses came from other threads' arenas, not modelled yet: taken over as observed."
        )
    if wrong:
        parts.append(f"{wrong:,} predictions were wrong; what was observed was taken over instead.")
    return " ".join(parts)


def common_notes(analysis: Analysis, snapshot: Any | None = None) -> list[str]:
    """What limits every figure of a process."""
    row, summary, notes = analysis.process, analysis.summary, []
    if row.lost:
        notes.append(f"{row.lost:,} events were lost: figures may be too low or too high.")
    if summary["damaged_events"]:
        notes.append(f"{summary['damaged_events']:,} events are in damaged blocks and were left out.")
    if summary["agreement"]["forced"]:
        notes.append(_forced_note(summary))
    if analysis.sample_bytes:
        notes.append(
            f"This is a sample: one allocation in about {size(analysis.sample_bytes)} was recorded. What is said of "
            "malloc's blocks are estimates (~), with their standard errors (±)."
        )
    elif row.libc_version and not summary["confirmed"]:
        notes.append(
            f"The model is not proven for glibc {row.libc_version}: the rules of {summary['profile']} were used."
        )
    if row.end in ("running", "vanished", ""):
        notes.append("The end of this process was not seen: its last state is what is known of it.")
    if snapshot is not None and not snapshot.consistent:
        notes.append("The process ran on while its pages were read: the snapshot may not fit the events exactly.")
    return notes
