"""How far the model can be believed: predictions against observations, of every process of a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from heapledger.analyzer.reports import common
from heapledger.analyzer.reports.report import model_json
from heapledger.analyzer.reports.text import Page, exact_percent, shorten, size
from heapledger.analyzer.session import Analysis
from heapledger.analyzer.sites import base_name
from heapledger.store.reader import Trace

_ADDRESSES = ("predicted", "exact", "reordered", "forced")


def build(trace: Trace, analyses: Sequence[Analysis], *, main: Analysis | None = None) -> dict[str, Any]:
    """The statement as JSON, over all of `analyses`; `main` (default: the first) names the process of the header."""
    parts = [_process(trace, analysis) for analysis in analyses]
    report = common.header("verify", (main or analyses[0]).process)
    report |= {
        "addresses": {key: sum(p["addresses"][key] for p in parts) for key in _ADDRESSES},
        "syscalls": {key: sum(p["syscalls"][key] for p in parts) for key in ("predicted", "compared", "exact")},
        "maps": {key: sum(p["maps"][key] for p in parts) for key in ("compared", "exact")},
        "rss": {key: sum(p["rss"][key] for p in parts) for key in _RSS},
        "reasons": _total(p["reasons"] for p in parts),
        "glibc": ", ".join(dict.fromkeys(p["glibc"] for p in parts if p["glibc"])),
        "events": sum(p["events"] for p in parts),
        "lost": sum(p["lost"] for p in parts),
        "ok": all(p["ok"] for p in parts),
        "sampled": any(p["sampled"] for p in parts),
        "processes": parts,
        "notes": list(dict.fromkeys(note for analysis in analyses for note in common.common_notes(analysis))),
    }
    return report


_RSS = ("kernel_bytes", "ledger_bytes", "unexplained_bytes", "snapshots")


def _total(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Forced results by reason, over all processes, the most frequent first."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total.most_common())


def _process(trace: Trace, analysis: Analysis) -> dict[str, Any]:
    row, model = analysis.process, model_json(analysis)
    maps = _maps(analysis)
    addresses = {key: model[key] for key in _ADDRESSES}
    lost = row.lost + analysis.summary["damaged_events"]
    all_exact = model["exact"] + model["reordered"] == model["predicted"]
    return {
        "id": row.id,
        "pid": row.pid,
        "exe": row.exe,
        "start": row.start,
        "addresses": addresses,
        "adopted_bases": model["adopted_bases"],
        "word_mismatches": model["word_mismatches"],
        "unknown_frees": model["unknown_frees"],
        "syscalls": {"predicted": model["syscalls_predicted"], "compared": 0, "exact": 0},
        "maps": maps,
        "rss": _rss(trace, analysis),
        "glibc": row.libc_version,
        "confirmed": model["confirmed"],
        "events": row.events,
        "lost": lost,
        "sampled": bool(analysis.sample_bytes),
        "ok": not analysis.sample_bytes and all_exact and maps["exact"] == maps["compared"] and not lost,
        "reasons": model["reasons"],
        "examples": model["examples"],
    }


def _maps(analysis: Analysis) -> dict[str, Any]:
    """The comparison of mappings, summed over a process's snapshots."""
    maps: dict[str, Any] = {"compared": 0, "exact": 0, "differences": []}
    for snapshot_id in analysis.summary["snapshots"]:
        ledger = analysis.ledger(snapshot_id)
        if ledger is not None:
            maps["compared"] += ledger["maps"]["compared"]
            maps["exact"] += ledger["maps"]["exact"]
            maps["differences"] += ledger["maps"]["differences"]
    maps["differences"] = maps["differences"][:20]
    return maps


def _rss(trace: Trace, analysis: Analysis) -> dict[str, int]:
    """The kernel's count at a process's end (or last snapshot), and what the ledger explains of it."""
    snapshots = [s for s in trace.snapshots(analysis.process.id) if analysis.ledger(s.id) is not None]
    chosen = common.end_snapshot(snapshots) or (snapshots[-1] if snapshots else None)
    ledger = analysis.ledger(chosen.id) if chosen is not None else None
    if chosen is None or ledger is None:
        return dict.fromkeys(_RSS, 0)
    unexplained = ledger["unexplained_bytes"]
    return {
        "kernel_bytes": chosen.rss_bytes,
        "ledger_bytes": ledger["resident_bytes"] - unexplained,
        "unexplained_bytes": unexplained,
        "snapshots": 1,
    }


def render(report: dict[str, Any], page: Page) -> None:
    """The statement for people."""
    addresses, maps, rss = report["addresses"], report["maps"], report["rss"]
    page.line(_verdict(report), style="bold green" if report["ok"] else "bold yellow")
    good = addresses["exact"] + addresses["reordered"]
    rows = [
        ["addresses", _share(good, addresses["predicted"]), f"{good:,} of {addresses['predicted']:,} as predicted"],
        ["", "", f"{addresses['reordered']:,} in another order, {addresses['forced']:,} taken over as observed"],
        *([["", "", reasons_line(report["reasons"])]] if report["reasons"] else []),
        ["mappings", _share(maps["exact"], maps["compared"]),
         f"{maps['exact']:,} of {maps['compared']:,} agree" if maps["compared"]
         else "of a sample nothing is predicted" if report["sampled"] else "no snapshot was taken"],
        ["RSS", _share(rss["ledger_bytes"], rss["kernel_bytes"]),
         f"{size(rss['ledger_bytes'])} of the kernel's {size(rss['kernel_bytes'])} have an owner"
         if rss["kernel_bytes"] else "no snapshot was taken"],
        ["system calls", "not compared", f"{report['syscalls']['predicted']:,} predicted; they are not recorded yet"],
        ["events", "", f"{report['events']:,} recorded, {report['lost']:,} lost"],
        ["glibc", "", report["glibc"] or "unknown"],
    ]  # fmt: skip
    page.table(["what", ">exact", ""], rows)
    if len(report["processes"]) > 1:
        page.heading(f"By process ({len(report['processes'])})")
        page.table(
            ["program", ">pid", ">addresses", ">exact", ">mappings", ">lost"],
            [
                [
                    shorten(base_name(p["exe"]) or "?", 24),
                    str(p["pid"]),
                    f"{p['addresses']['predicted']:,}",
                    _share(p["addresses"]["exact"] + p["addresses"]["reordered"], p["addresses"]["predicted"]),
                    f"{p['maps']['exact']}/{p['maps']['compared']}",
                    f"{p['lost']:,}",
                ]
                for p in report["processes"][:60]
            ],
        )
    _render_differences(report, page)
    page.notes(report["notes"])


def _verdict(report: dict[str, Any]) -> str:
    if report["sampled"]:
        return "Not measured: this trace is a sample, from which no address can be predicted."
    if not report["ok"]:
        return "Not everything is exact."
    unexplained = report["rss"]["unexplained_bytes"]
    but = f", but {size(unexplained)} of the RSS have no owner" if unexplained else ""
    return f"Everything that was compared is exact{but}."


def reasons_line(reasons: dict[str, int]) -> str:
    """`{"OTHER_ARENA": 12}` → `because of: other arena 12`."""
    return "because of: " + ", ".join(f"{name.lower().replace('_', ' ')} {n:,}" for name, n in reasons.items())


def _share(part: int, whole: int) -> str:
    return exact_percent(part, whole) if whole else "not compared"


def _render_differences(report: dict[str, Any], page: Page) -> None:
    """The first few things that were not as predicted."""
    lines = []
    for process in report["processes"]:
        lines += [
            f"pid {process['pid']}, event {e['seq']:,}: expected {e['expected']:#x}, saw {e['observed']:#x} "
            f"({e['reason']})"
            for e in process["examples"][:5]
        ]
        lines += [f"pid {process['pid']}: {difference}" for difference in process["maps"]["differences"][:5]]
    if lines:
        page.heading("Differences")
        for line in lines[:20]:
            page.line("  " + line)
