"""The report: who owns each resident page of a process, and what holds it there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from heapledger.analyzer.facts import Names
from heapledger.analyzer.reports import common
from heapledger.analyzer.reports.text import (
    Page,
    about,
    about_count,
    duration,
    exact_percent,
    percent,
    shorten,
    size,
)
from heapledger.analyzer.session import START, Analysis
from heapledger.analyzer.sites import Frame, base_name, short_function, site_of
from heapledger.analyzer.sites import frame_name as name_of_frame
from heapledger.store.reader import Trace

#: A thread's kernel stack (x86-64): computed, not measured (kernel-memory.md §4).
_KERNEL_STACK = 16 << 10

#: Outermost functions that say nothing: the C library's way to main, and to a thread's function.
_STARTERS = frozenset(
    ("_start", "__libc_start_main", "__libc_start_main_impl", "__libc_start_call_main", "start_thread", "clone3",
     "__clone3", "__clone", "clone")
)  # fmt: skip

#: Kind → words of the text report, in the order of the priority list.
LABELS = {
    "live": "live blocks",
    "chunk_overhead": "malloc: headers, rounding",
    "tcache": "malloc: thread caches",
    "fastbin": "malloc: fastbins",
    "hole_reclaimable": "holes: whole free pages",
    "hole_pinned": "holes: on shared pages",
    "top": "malloc: top of the heap",
    "arena": "malloc: its own tables",
    "arena_unmodelled": "malloc: other arenas",
    "foreign_sbrk": "sbrk by others",
    "unsampled": "heap: free, or not sampled",
    "stack": "stack",
    "thread_stack": "thread stacks",
    "tls": "thread-local storage",
    "library_text": "code of objects",
    "library_rodata": "constants of objects",
    "library_relro": "relocated data of objects",
    "library_data": "data of objects",
    "library_bss": "zeroed data of objects",
    "private_copy": "written file pages",
    "file_mapping": "mapped files",
    "mmap": "mmap by the program",
    "shm": "shared memory",
    "vdso": "kernel's vdso",
    "loader": "ld.so's own memory",
    "self": "heapledger's shim",
    "unexplained": "unexplained",
}


def build(trace: Trace, analysis: Analysis, *, at: str | int | None = None, top: int | None = 100) -> dict[str, Any]:
    """The report as JSON. `at`: "exit", "peak", "request", a snapshot's id, or None for the best there is."""
    row = analysis.process
    snapshots = [s for s in trace.snapshots(row.id) if s.reason != START]
    snapshot = common.choose_snapshot(snapshots, at)
    ledger = analysis.ledger(snapshot.id) if snapshot is not None else None
    names = common.names_of(trace, row)
    limit = len(ledger["sites"]) if ledger and top is None else top or 100
    report = common.header("report", row)
    report |= {
        "at": at if at in ("peak", "exit") else snapshot.reason if snapshot is not None else None,
        "snapshot": common.snapshot_json(snapshot) if snapshot is not None else None,
        "snapshots": [_snapshot_line(analysis, s) for s in snapshots],
    }
    report |= _books(analysis, snapshot, ledger, names, limit)
    report["sites"] = _sites(ledger, analysis, names, limit, report["rss_bytes"])
    report["heap"] = _heap(analysis, ledger["heap"] if ledger else analysis.summary["heap"])
    report |= _allocated(analysis)
    report["beside"] = _beside(snapshot, ledger)
    report["peak"] = _peak(trace, analysis, snapshots)
    report["model"] = model_json(analysis)
    report["session"] = _session(trace)
    report["processes"] = [_process_line(trace, p) for p in trace.processes()]
    report["notes"] = common.common_notes(analysis, snapshot) + _ledger_notes(ledger, report)
    return report


def _snapshot_line(analysis: Analysis, snapshot: Any) -> dict[str, Any]:
    ledger = analysis.ledger(snapshot.id)
    return {
        **common.snapshot_json(snapshot),
        "unexplained_bytes": ledger["unexplained_bytes"] if ledger else None,
    }


def _heap(analysis: Analysis, stored: dict[str, Any]) -> dict[str, Any]:
    """What malloc holds; of a sampled process, what is free is null."""
    figures = {key: value for key, value in stored.items() if not key.endswith("_error")}
    if not analysis.sample_bytes:
        return figures
    return figures | common.errors(analysis, bytes=stored["live_bytes_error"], blocks=stored["live_blocks_error"])


def _allocated(analysis: Analysis) -> dict[str, Any]:
    """All allocations of the process, and those that were temporary."""
    found = analysis.lifetimes()
    sums: dict[str, Any] = {}
    for name in ("allocated", "temporary"):
        amount = found.get(name)
        if amount is None:
            sums[name] = None
            continue
        blocks, count, blocks_error, bytes_error = amount
        sums[name] = {
            "bytes": count,
            "blocks": blocks,
            **common.errors(analysis, bytes=bytes_error, blocks=blocks_error),
        }
    return sums


def _books(
    analysis: Analysis, snapshot: Any | None, ledger: dict[str, Any] | None, names: Names, limit: int
) -> dict[str, Any]:
    """The fields about resident bytes; null without a snapshot."""
    if snapshot is None or ledger is None:
        empty = ("rss_bytes", "pss_bytes", "pagemap_bytes", "smaps_difference_bytes", "unexplained_bytes")
        return {**dict.fromkeys(empty), "estimated": bool(analysis.sample_bytes), "owners": [], "kinds": []}
    total = max(snapshot.rss_bytes, 1)
    owners = [_owner(o, names, total) for o in ledger["owners"] if o["rss_bytes"]] + _live(
        analysis, ledger, names, limit, total
    )
    owners.sort(key=lambda o: (-o["rss_bytes"], o["kind"], o["name"]))
    kinds: dict[str, int] = {}
    for owner in owners:
        kinds[owner["kind"]] = kinds.get(owner["kind"], 0) + owner["rss_bytes"]
    return {
        "rss_bytes": snapshot.rss_bytes,
        "pss_bytes": snapshot.pss_bytes,
        "pagemap_bytes": ledger["resident_bytes"],
        "smaps_difference_bytes": snapshot.rss_bytes - ledger["resident_bytes"],
        "unexplained_bytes": ledger["unexplained_bytes"],
        "estimated": ledger["estimated"],
        "owners": owners,
        "kinds": [
            {"kind": kind, "rss_bytes": amount, "share": amount / total, **_kind_errors(analysis, ledger, kind)}
            for kind, amount in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


def _kind_errors(analysis: Analysis, ledger: dict[str, Any], kind: str) -> dict[str, Any]:
    """Of a sampled process: what is not the live blocks' is the rest's, so both have one error."""
    if kind not in ("live", "unsampled"):
        return {}
    return common.errors(analysis, rss_bytes=_root(site["rss_error"] for site in ledger["sites"]))


def _root(standard_errors: Iterable[int]) -> int:
    """The standard error of a sum."""
    return round(math.sqrt(sum(e * e for e in standard_errors)))


def _site_errors(analysis: Analysis, *sites: dict[str, Any]) -> dict[str, Any]:
    """Standard errors of the sum of call sites."""
    sums = {name: _root(site[f"{name}_error"] for site in sites) for name in ("bytes", "blocks", "rss")}
    return common.errors(analysis, bytes=sums["bytes"], blocks=sums["blocks"], rss_bytes=sums["rss"])


def _owner(stored: dict[str, Any], names: Names, total: int) -> dict[str, Any]:
    owner = {key: stored[key] for key in ("kind", "name", "rss_bytes")}
    owner["share"] = stored["rss_bytes"] / total
    if stored["bytes"] is not None:
        owner |= {"bytes": stored["bytes"], "blocks": stored["blocks"]}
    if stored["stack"][1]:
        owner["stack"] = common.stack_of(names, stored["stack"])[0]
    return owner


def _live(analysis: Analysis, ledger: dict[str, Any], names: Names, limit: int, total: int) -> list[dict[str, Any]]:
    """Live blocks as owners: the first `limit` call sites, and the sum of the others."""
    listed, rest = ledger["sites"][:limit], ledger["sites"][limit:]
    owners = [
        {
            "kind": "live",
            "name": site["name"],
            "rss_bytes": site["rss_bytes"],
            "share": site["rss_bytes"] / total,
            "bytes": site["bytes"],
            "blocks": site["blocks"],
            "stack": common.stack_of(names, site["stack"])[0],
            **_site_errors(analysis, site),
        }
        for site in listed
    ]
    other = ledger["other_sites"]
    count = len(rest) + other["sites"]
    if count:
        sums = {key: sum(s[key] for s in rest) + other[key] for key in ("rss_bytes", "bytes", "blocks")}
        name = f"({count:,} other call sites)"
        owners.append(
            {"kind": "live", "name": name, "share": sums["rss_bytes"] / total, "stack": [], **sums}
            | _site_errors(analysis, *rest)
        )
    return owners


def _sites(
    ledger: dict[str, Any] | None, analysis: Analysis, names: Names, limit: int, rss_bytes: int | None
) -> list[dict[str, Any]]:
    """Call sites with live blocks: of the snapshot, or, without one, of what was not freed at the end."""
    fields = ("name", "function", "file", "line", "module", "bytes", "blocks", "rss_bytes")
    if ledger is not None:
        total = max(rss_bytes or 0, 1)
        lifetimes = common.lifetimes_by_site(analysis)
        return [
            {key: site[key] for key in fields}
            | {"share": site["rss_bytes"] / total, "stack": common.stack_of(names, site["stack"])[0]}
            | _site_errors(analysis, site)
            | common.freed_at_json(analysis, lifetimes.get(common.site_key(site)), names)
            for site in ledger["sites"][:limit]
        ]
    return _sites_not_freed(analysis, names)[:limit]


def _sites_not_freed(analysis: Analysis, names: Names) -> list[dict[str, Any]]:
    """Call sites of blocks not freed at the end, the largest first; resident bytes are not known."""
    sites: dict[str, dict[str, Any]] = {}
    parts: dict[str, list[dict[str, Any]]] = {}
    for group in analysis.leaks()["groups"]:
        frame = site_of(names.each_frame(*group["stack"]))
        name = name_of_frame(frame) if frame is not None else "(no call stack)"
        site = sites.get(name)
        if site is None:
            where = {key: getattr(frame, key, None) for key in ("function", "file", "line", "module")}
            measured = {"rss_bytes": None, "share": None}
            stack = common.stack_of(names, group["stack"])[0]
            site = sites[name] = {"name": name, **where, "bytes": 0, "blocks": 0, **measured, "stack": stack}
            parts[name] = []
        site["bytes"] += group["bytes"]
        site["blocks"] += group["blocks"]
        parts[name].append({**group, "rss_error": 0})
    for name, site in sites.items():
        site |= _site_errors(analysis, *parts[name])
    return sorted(sites.values(), key=lambda site: (-site["bytes"], site["name"]))


def _beside(snapshot: Any | None, ledger: dict[str, Any] | None) -> dict[str, Any]:
    """What the kernel spends on a process outside its Rss."""
    return {
        "page_tables_bytes": snapshot.page_tables_bytes if snapshot is not None else None,
        "kernel_stacks_bytes": snapshot.threads * _KERNEL_STACK if snapshot is not None and snapshot.threads else None,
        "swap_bytes": ledger["swap_bytes"] if ledger else None,
    }


def _peak(trace: Trace, analysis: Analysis, snapshots: Sequence[Any]) -> dict[str, Any]:
    """The highest RSS that anybody saw, and the highest live bytes, with their times."""
    samples = trace.samples(analysis.process.id)
    rss, times = samples["rss"], samples["time_ns"]
    seen = [(s.rss_bytes, s.time_ns) for s in snapshots]
    if len(rss):
        highest = int(rss.argmax())
        seen.append((int(rss[highest]), int(times[highest])))
    best = max(seen, default=(None, None))
    hwm = int(samples["vm_hwm"].max()) if len(rss) else -1
    return {
        "rss_bytes": best[0],
        "time_ns": best[1],
        "hwm_bytes": hwm if hwm >= 0 else None,
        "live_bytes": analysis.summary["peak_live_bytes"],
        "live_time_ns": analysis.summary["peak_live_ns"],
        **common.errors(analysis, bytes=analysis.summary["peak_live_error"]),
    }


def model_json(analysis: Analysis) -> dict[str, Any]:
    """How well the model's predictions were met."""
    agreement = analysis.summary["agreement"]
    counts = {key: value for key, value in agreement.items() if key != "forced_examples"}
    predicted = agreement["predicted"]
    return {
        **counts,
        "share_exact": agreement["exact"] / predicted if predicted else None,
        "glibc": analysis.process.libc_version,
        "profile": analysis.summary["profile"],
        "confirmed": analysis.summary["confirmed"],
        "reasons": analysis.summary["reasons"],
        "examples": agreement["forced_examples"][:10],
    }


def _session(trace: Trace) -> dict[str, Any]:
    row = trace.session
    return {
        "command": list(row.command),
        "source": row.source,
        "start_unix_ns": row.start_unix_ns,
        "duration_ns": row.end_ns,
        "heapledger_version": row.heapledger_version,
        "host": row.host,
    }


def _process_line(trace: Trace, row: Any) -> dict[str, Any]:
    """One process of the tree, with its peak and its last RSS."""
    snapshots = trace.snapshots(row.id)
    rss = trace.samples(row.id)["rss"]
    end = common.end_snapshot(snapshots)
    seen = [s.rss_bytes for s in snapshots] + ([int(rss.max())] if len(rss) else [])
    keys = ("id", "pid", "parent_id", "start", "exe", "argv", "events", "lost", "end", "exit_status")
    fields = common.process_json(row)
    return {key: fields[key] for key in keys} | {
        "peak_rss_bytes": max(seen, default=None),
        "exit_rss_bytes": end.rss_bytes if end is not None else None,
    }


def _ledger_notes(ledger: dict[str, Any] | None, report: dict[str, Any]) -> list[str]:
    if ledger is None:
        return ["Nobody looked at this process's pages, so who owns its resident memory is not known."]
    notes = list(ledger["notes"])
    if report["smaps_difference_bytes"]:
        notes.append(f"smaps counts {report['smaps_difference_bytes']:,} bytes more than the page map: not one moment.")
    other = sum(o["rss_bytes"] for o in ledger["owners"] if o["kind"] == "arena_unmodelled")
    if other:
        notes.append(
            f"{size(other)} lie in heaps of other threads' arenas, which are not modelled yet: free memory, caches and "
            "headers there are one sum."
        )
    return notes


# ---- text


def render(report: dict[str, Any], page: Page, *, top: int = 10, file: str = "FILE") -> None:
    """The report for people."""
    _render_head(report, page)
    if len(report["processes"]) > 1:
        _render_tree(report, page)
    if report["rss_bytes"] is not None:
        _render_ledger(report, page)
    _render_sites(report, page, top)
    page.notes([*report["notes"], *report["process"]["notes"]])
    _render_next(report, page, file)


def _render_head(report: dict[str, Any], page: Page) -> None:
    process, session, peak = report["process"], report["session"], report["peak"]
    command = " ".join(process["argv"] or session["command"]) or process["exe"]
    page.line(shorten(command.replace("\n", " "), 2 * page.width), style="bold")
    facts = [f"pid {process['pid']}", _ending(process)]
    if process["end_ns"]:
        facts.append(duration(process["end_ns"] - process["start_ns"]))
    if process["glibc"]:
        facts.append(f"glibc {process['glibc']}")
    page.line(", ".join(facts))
    page.line(f"{process['events']:,} events, {process['lost']:,} lost")
    sampled = process["sample_bytes"]
    if sampled:
        page.line(f"Sampled: one allocation in about {size(sampled)}; what is said of malloc's blocks is estimated")
    else:
        page.line(agreement_line(report["model"]))
    page.line()
    if report["rss_bytes"] is not None:
        page.line(f"RSS {moment(report)}: {size(report['rss_bytes'])}{_without_shim(report)}")
    if peak["rss_bytes"] is not None:
        page.line(f"RSS at its highest: {size(peak['rss_bytes'])}, seen at {duration(peak['time_ns'])}")
    _render_heap(report, page)


def _render_heap(report: dict[str, Any], page: Page) -> None:
    """What malloc holds, and all that it was asked for."""
    heap, peak = report["heap"], report["peak"]
    blocks = about_count(heap["live_blocks"], heap.get("standard_error_blocks"))
    page.line(
        f"Live bytes {moment(report)}: {about(heap['live_bytes'], heap.get('standard_error_bytes'))} in {blocks} "
        f"{'block' if heap['live_blocks'] == 1 else 'blocks'} "
        f"(highest {about(peak['live_bytes'], peak.get('standard_error_bytes'))} at {duration(peak['live_time_ns'])})"
    )
    if heap["heap_bytes"] is not None:
        page.line(
            f"Heap: {size(heap['heap_bytes'])} by brk, {size(heap['mmapped_bytes'])} in large blocks of their own;"
        )
        page.line(
            f"      free in it: {size(heap['hole_bytes'])} holes, {size(heap['cached_bytes'])} cached, "
            f"{size(heap['top_bytes'])} top"
        )
    allocated, temporary = report["allocated"], report["temporary"]
    if allocated is None or not allocated["blocks"]:
        return
    line = (
        f"In all: {about(allocated['bytes'], allocated.get('standard_error_bytes'))} in "
        f"{about_count(allocated['blocks'], allocated.get('standard_error_blocks'))} allocations"
    )
    if temporary is not None:
        line += f", {percent(temporary['blocks'] / allocated['blocks'])} of them temporary"
    page.line(line)


def _without_shim(report: dict[str, Any]) -> str:
    """Tracing costs memory of its own: what would be there without it."""
    own = sum(k["rss_bytes"] for k in report["kinds"] if k["kind"] == "self")
    return f" ({size(report['rss_bytes'] - own)} without heapledger's shim)" if own else ""


def moment(report: dict[str, Any]) -> str:
    """`at exit`, `at peak` ... in words."""
    at = report["at"]
    words = {"exit": "at exit", "peak": "at peak", "request": "on request", "exec": "before exec", None: "at the end"}
    return words.get(at, f"at {at}")


def _ending(process: dict[str, Any]) -> str:
    status = process["exit_status"]
    words = {"exec": "went on as another program", "running": "was still running", "vanished": "vanished"}
    if process["end"] in words:
        return words[process["end"]]
    if process["end"] == "signal":
        return f"killed by signal {abs(status)}" if status else "killed"
    if process["end"] == "stopped":
        return "recording stopped early"
    return f"exit status {status}" if status is not None else "end not seen"


def agreement_line(model: dict[str, Any]) -> str:
    """How much of the model was exact, in one line."""
    predicted = model["predicted"]
    if not predicted:
        return "Model: nothing to predict"
    good = model["exact"] + model["reordered"]
    line = f"Model: {exact_percent(good, predicted)} of {predicted:,} addresses predicted exactly"
    if model["forced"]:
        line += f", {model['forced']:,} taken over as observed"
    return line


def _render_tree(report: dict[str, Any], page: Page) -> None:
    """All processes, children below their parents."""
    page.heading(
        f"Processes ({len(report['processes'])}; this report: pid {report['process']['pid']}, --pid ID for another)"
    )
    children: dict[int | None, list[dict[str, Any]]] = {}
    known = {p["id"] for p in report["processes"]}
    for process in sorted(report["processes"], key=lambda p: p["id"]):
        parent = process["parent_id"] if process["parent_id"] in known else None
        children.setdefault(parent, []).append(process)
    rows: list[list[str]] = []
    waiting = [(p, 0) for p in reversed(children.get(None, []))]
    seen: set[int] = set()
    while waiting and len(rows) < 40:
        process, depth = waiting.pop()
        if process["id"] in seen:
            continue
        seen.add(process["id"])
        chosen = "*" if process["id"] == report["process"]["id"] else " "
        name = base_name(process["exe"]) or "?"
        label = f"{chosen} {'  ' * min(depth, 12)}{name} ({process['start']})"
        rows.append(
            [label, str(process["id"]), str(process["pid"]), _size_or_dash(process["peak_rss_bytes"]),
             _size_or_dash(process["exit_rss_bytes"]), f"{process['events']:,}"]
        )  # fmt: skip
        waiting += [(p, depth + 1) for p in reversed(children.get(process["id"], []))]
    page.table(["  program", ">id", ">pid", ">peak RSS", ">at exit", ">events"], rows)
    if len(rows) < len(report["processes"]):
        page.line(f"  ... and {len(report['processes']) - len(rows):,} more")


def _size_or_dash(count: int | None, standard_error: int | None = None) -> str:
    return "-" if count is None else about(count, standard_error)


def _render_ledger(report: dict[str, Any], page: Page) -> None:
    """The ledger by kind with bars, and the large owners within a kind."""
    total = report["rss_bytes"]
    page.heading(f"Who owns the {size(total)} ({total:,} bytes) resident {moment(report)}")
    width = max(page.width - 57, 6)
    rows = []
    largest = max((k["share"] for k in report["kinds"]), default=1) or 1
    for kind in report["kinds"]:
        label = LABELS.get(kind["kind"], kind["kind"])
        bar = page.bar(kind["share"] / largest, width)
        rows.append(
            [label, about(kind["rss_bytes"], kind.get("standard_error_rss_bytes")), percent(kind["share"]), bar]
        )
        if kind["kind"] != "live":
            rows += _large_owners(report, kind["kind"])
    if not report["unexplained_bytes"]:
        rows.append([LABELS["unexplained"], size(0), percent(0), ""])
    rows.append(
        ["sum", size(report["pagemap_bytes"]), "", "= the kernel's Rss" if not report["smaps_difference_bytes"] else ""]
    )
    page.table(["  ", ">", ">", ""], rows, styles={3: "cyan"})
    beside = report["beside"]
    parts = []
    if beside["page_tables_bytes"] is not None:
        parts.append(f"page tables {size(beside['page_tables_bytes'])}")
    if beside["kernel_stacks_bytes"] is not None:
        parts.append(f"kernel stacks {size(beside['kernel_stacks_bytes'])} (computed)")
    if beside["swap_bytes"]:
        parts.append(f"swapped out {size(beside['swap_bytes'])}")
    if parts:
        page.line("Beside Rss: " + ", ".join(parts))


def _large_owners(report: dict[str, Any], kind: str) -> list[list[str]]:
    """The owners of a kind that hold 3 % of Rss or more, if they have names; at most three."""
    named = [o for o in report["owners"] if o["kind"] == kind and o["name"] and o["share"] >= 0.03]
    if len(named) == 1 and kind in ("stack", "self", "vdso", "loader"):
        return []
    return [
        [f"  {shorten(_owner_words(o), 30, middle=True)}",
         size(o["rss_bytes"]), "", ""]
        for o in named[:3]
    ]  # fmt: skip


def _owner_words(owner: dict[str, Any]) -> str:
    if owner["name"].startswith("/"):
        return base_name(owner["name"])
    return callers(owner["stack"], owner["name"], 1) if owner.get("stack") else str(owner["name"])


def _render_sites(report: dict[str, Any], page: Page, top: int) -> None:
    """Call sites with live blocks, each with its callers."""
    sites = [s for s in report["sites"] if s["blocks"]][:top]
    if not sites:
        return
    page.heading(f"Call sites with most live blocks {moment(report)}")
    page.table(
        [">resident", ">requested", ">blocks", "site"],
        [
            [
                _size_or_dash(s["rss_bytes"], s.get("standard_error_rss_bytes")),
                about(s["bytes"], s.get("standard_error_bytes")),
                about_count(s["blocks"], s.get("standard_error_blocks")),
                callers(s["stack"], s["name"]),
            ]
            for s in sites
        ],
    )


def callers(stack: Sequence[dict[str, Any]], site: str, count: int = 3) -> str:
    """A site and who called it: `parse (json.c:41) < load < main`."""
    shown = trimmed(stack)
    names = [frame_name(f) for f in shown]
    start = names.index(site) if site in names else 0
    above = [short_name(frame) for frame in shown[start + 1 : start + count]]
    return " < ".join([*([short_name(shown[start], where=True)] if shown else [site]), *above])


def frame_name(frame: dict[str, Any]) -> str:
    """As sites.frame_name, of a frame in JSON."""
    return name_of_frame(Frame(**{key: frame[key] for key in Frame.__slots__}))


def short_name(frame: dict[str, Any], *, where: bool = False) -> str:
    """A frame for a table: the function without its parameters, and, if asked for, where it is."""
    if not frame["function"]:
        return frame_name(frame)
    short = short_function(frame["function"])
    return short if not where else frame_name({**frame, "function": short})


def trimmed(stack: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """A stack without the frames that start every program, unless there is nothing else."""
    for index, frame in enumerate(stack):
        if index and frame["function"].partition("@")[0] in _STARTERS:
            return stack[:index]
    return stack


def _render_next(report: dict[str, Any], page: Page, file: str) -> None:
    """What to look at next, by what was found."""
    hints = []
    heap = report["heap"]
    if (heap["hole_bytes"] or 0) > max((heap["heap_bytes"] or 0) // 10, 65536):
        hints.append(("holes", f"what keeps {size(heap['hole_bytes'])} of free memory in the heap"))
    if heap["live_blocks"]:
        hints.append(("leaks", "what was never freed, with whole stacks"))
    allocated, temporary = report["allocated"], report["temporary"]
    if allocated and temporary and temporary["blocks"] > allocated["blocks"] // 10:
        hints.append(("temporary", "who allocates for a moment only"))
    if report["model"]["forced"]:
        hints.append(("verify", "where the model and the program differ"))
    hints.append(("serve", "all of this in the browser"))
    page.heading("Next")
    for name, words in hints:
        page.line(f"  heapledger {name} {file}")
        page.line(f"      {words}", style="dim")
