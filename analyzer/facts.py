"""Results in the form they are stored in: plain JSON, small, resolved as far as many call stacks have to be.

    analysis       agreement, profile, counts              ledger.ID   owners, call sites, figures, maps of a snapshot
    leaks          call stacks with blocks not freed       holes.ID    holes and pins of a snapshot

A call stack is stored as [origin, node]: origin 0 is the process's own trie, 1 its parent's (a fork's child inherits
blocks), and so on. Lists are bounded; what is left out is summed beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from heapledger.analyzer.glibc.states import ChunkState
from heapledger.analyzer.holes import Hole, Holes, Pin
from heapledger.analyzer.kernel.maps_check import MapsCheck
from heapledger.analyzer.kernel.vma import Vma
from heapledger.analyzer.leaks.not_freed import NotFreed
from heapledger.analyzer.ledger import HeapState, Ledger, Owner, origin_of
from heapledger.analyzer.owners import SHIM, OwnerKind
from heapledger.analyzer.sites import Frame, fingerprint, frame_name, site_name, site_of
from heapledger.store.ddl import JIT
from heapledger.store.reader import Trace

#: Call sites kept by name, in a ledger; the rest is one sum.
MAX_SITES = 5000
#: Call stacks kept in a list of blocks not freed; and of these, the ones that are compared frame by frame.
MAX_STACKS, MAX_FINGERPRINTS = 10_000, 2000

NO_LEAKS: dict[str, Any] = {"groups": [], "stacks": 0, "own": [0, 0], "inherited": [0, 0]}


class Names:
    """Call stacks of a process and of those it was forked from."""

    def __init__(self, trace: Trace, chain: Sequence[Any]) -> None:
        self._trace = trace
        self._ids = [p.id for p in reversed(chain)]
        self._biases: dict[int, dict[str, int]] = {}

    def frames(self, origin: int, node: int) -> list[Frame]:
        """Innermost first; [] where nothing is known."""
        return list(self.each_frame(origin, node))

    def each_frame(self, origin: int, node: int) -> Iterator[Frame]:
        """As `frames`, resolved one by one: a site needs only the innermost few."""
        if not node or not 0 <= origin < len(self._ids):
            return
        process_id = self._ids[origin]
        biases = self._biases.get(process_id)
        if biases is None:
            biases = self._biases[process_id] = {m.path: m.bias for m in self._trace.modules(process_id)}
        for f in self._trace.frames(process_id, node):
            # The shim's own frames (it stands between a thread's start and its function) are none of the program's.
            if f.module == JIT and not f.function:
                yield Frame("", None, None, "", f.address, False, None)  # nothing to recognize it by in another run
            elif not f.module.endswith("/" + SHIM):
                offset = _offset(f.address, biases.get(f.module))
                yield Frame(f.function, f.file, f.line, f.module, f.address, f.inlined, offset)


def _offset(address: int, bias: int | None) -> int | None:
    return None if bias is None or address < bias else address - bias


def ledger_fact(
    ledger: Ledger, state: HeapState, check: MapsCheck, vmas: Sequence[Vma], names: Names
) -> dict[str, Any]:
    sites, other = _sites(ledger, names)
    return {
        "resident_bytes": ledger.resident_bytes,
        "unexplained_bytes": ledger.unexplained_bytes,
        "estimated": ledger.estimated,
        "owners": [_owner(o, names) for o in ledger.owners],
        "sites": sites,
        "other_sites": other,
        "heap": heap_figures(state),
        "swap_bytes": sum(v.swap_bytes for v in vmas),
        "maps": {"compared": check.compared, "exact": check.exact, "differences": check.differences},
        "notes": ledger.notes,
    }


def _owner(owner: Owner, names: Names) -> dict[str, Any]:
    name = owner.name
    if owner.kind is OwnerKind.MMAP:
        name = site_name(names.each_frame(owner.origin, owner.stack))
    return {
        "kind": str(owner.kind),
        "name": name,
        "rss_bytes": owner.rss_bytes,
        "bytes": owner.bytes,
        "blocks": owner.blocks,
        "stack": [owner.origin, owner.stack],
    }


def _sites(ledger: Ledger, names: Names) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Live blocks by call site, the largest first, and the sum of those that are too many."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in ledger.sites:
        columns = (part.stack, part.rss_bytes, part.requested_bytes, part.blocks)
        for node, rss, requested, blocks in zip(*(c.tolist() for c in columns), strict=True):
            frame = site_of(names.each_frame(part.origin, node))
            key = (
                (frame.function, frame.file, frame.line, frame.module) if frame is not None and frame.function
                else (frame.offset or frame.address, frame.module) if frame is not None
                else ()
            )  # fmt: skip
            site = merged.get(key)
            if site is None:
                site = merged[key] = {
                    "name": frame_name(frame) if frame is not None else site_name([]),
                    "function": frame.function if frame else "",
                    "file": frame.file if frame else None,
                    "line": frame.line if frame else None,
                    "module": frame.module if frame else "",
                    "rss_bytes": 0,
                    "bytes": 0,
                    "blocks": 0,
                    "stacks": 0,
                    "largest": -1,
                    "stack": [0, 0],
                }
            site["rss_bytes"] += rss
            site["bytes"] += requested
            site["blocks"] += blocks
            site["stacks"] += 1
            if requested > site["largest"]:
                site["largest"], site["stack"] = requested, [part.origin, node]
    ordered = sorted(merged.values(), key=lambda s: (-s["rss_bytes"], -s["bytes"], s["name"]))
    rest = ordered[MAX_SITES:]
    other = {key: sum(s[key] for s in rest) for key in ("rss_bytes", "bytes", "blocks")}
    return ordered[:MAX_SITES], {**other, "sites": len(rest)}


def heap_figures(state: HeapState) -> dict[str, int]:
    """What the model holds, in bytes (blocks: a count), resident or not."""
    table = state.chunks

    def total(*states: ChunkState) -> int:
        return int(table.size[np.isin(table.state, states)].sum())

    foreign = total(ChunkState.FOREIGN)
    return {
        "live_bytes": int(state.live.requested.sum()),
        "live_blocks": len(state.live),
        "heap_bytes": int(table.size.sum()) - foreign,
        "mmapped_bytes": int(state.mapped.size.sum()),
        "hole_bytes": total(ChunkState.FREE),
        "cached_bytes": total(ChunkState.TCACHE, ChunkState.FASTBIN),
        "top_bytes": total(ChunkState.TOP),
    }


def holes_fact(holes: Holes, own_since: Sequence[int], names: Names) -> dict[str, Any]:
    return {
        "count": holes.count,
        "total_bytes": holes.total_bytes,
        "total_resident_bytes": holes.total_resident_bytes,
        "total_reclaimable_bytes": holes.total_reclaimable_bytes,
        "holes_below_pin_bytes": holes.holes_below_pin_bytes,
        "holes": [_hole(h, own_since) for h in holes.holes],
        "top": _hole(holes.top, own_since) if holes.top else None,
        "break_pin": _pin(holes.break_pin, own_since),
        "pins": _pins_by_site(holes, own_since, names),
    }


def _pins_by_site(holes: Holes, own_since: Sequence[int], names: Names) -> list[dict[str, Any]]:
    """Pins summed by call site, the most resident bytes first; each with the stack that pins most."""
    merged: dict[str, dict[str, Any]] = {}
    fields = ("holes", "bytes", "resident_bytes", "reclaimable_bytes")
    for pinned in holes.pins:
        stack = [origin_of(pinned.time, own_since), pinned.stack]
        site = merged.setdefault(
            site_name(names.each_frame(stack[0], stack[1])), {"stack": stack, **dict.fromkeys(fields, 0)}
        )
        for field in fields:
            site[field] += getattr(pinned, field)
    return sorted(merged.values(), key=lambda p: -p["resident_bytes"])[:MAX_SITES]


def _hole(hole: Hole, own_since: Sequence[int]) -> dict[str, Any]:
    return {
        "kind": hole.kind,
        "address": hole.address,
        "bytes": hole.bytes,
        "resident_bytes": hole.resident_bytes,
        "reclaimable_bytes": hole.reclaimable_bytes,
        "held_by": hole.held_by,
        "pin": _pin(hole.pin, own_since),
    }


def _pin(pin: Pin | None, own_since: Sequence[int]) -> dict[str, Any] | None:
    if pin is None:
        return None
    stack = [origin_of(pin.time, own_since), pin.stack]
    return {"address": pin.address, "bytes": pin.bytes, "time_ns": pin.time, "stack": stack}


def leaks_fact(found: Sequence[NotFreed], names: Names) -> dict[str, Any]:
    """Blocks not freed, equal resolved stacks merged, the process's own first, then by bytes."""
    merged: dict[tuple[bool, str], dict[str, Any]] = {}
    totals = {False: [0, 0], True: [0, 0]}
    for number, group in enumerate(found):
        inherited = group.origin > 0
        totals[inherited][0] += group.bytes
        totals[inherited][1] += group.blocks
        if number >= MAX_STACKS:
            continue
        frames = names.frames(group.origin, group.stack) if number < MAX_FINGERPRINTS else []
        print_ = fingerprint(frames) if frames else ""
        entry = {
            "stack": [group.origin, group.stack],
            "inherited": inherited,
            "bytes": group.bytes,
            "blocks": group.blocks,
            "oldest_ns": group.oldest_ns,
            "newest_ns": group.newest_ns,
            "fingerprint": print_,
        }
        before = merged.setdefault((inherited, print_ or f"{group.origin}.{group.stack}"), entry)
        if before is not entry:
            before["bytes"] += group.bytes
            before["blocks"] += group.blocks
            before["oldest_ns"] = min(before["oldest_ns"], group.oldest_ns)
            before["newest_ns"] = max(before["newest_ns"], group.newest_ns)
    groups = sorted(merged.values(), key=lambda g: (g["inherited"], -g["bytes"], g["stack"]))
    return {
        "groups": groups,
        "stacks": len(groups) + max(len(found) - MAX_STACKS, 0),
        "own": totals[False],
        "inherited": totals[True],
    }
