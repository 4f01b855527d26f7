"""Results in the form they are stored in: plain JSON, small, resolved as far as many call stacks have to be.

    analysis       agreement, profile, counts              ledger.ID   owners, call sites, figures, maps of a snapshot
    leaks          call stacks with blocks not freed       holes.ID    holes and pins of a snapshot
    lifetimes      call sites: allocated, freed where, temporary, live

A call stack is stored as [origin, node]: origin 0 is the process's own trie, 1 its parent's (a fork's child inherits
blocks), and so on. Lists are bounded; what is left out is summed beside them. Where a trace is a sample, amounts are
estimates, and `..._error` is the standard error; else it is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.glibc.states import ChunkState
from heapledger.analyzer.holes import Freed, Hole, Holes, Pin
from heapledger.analyzer.kernel.maps_check import MapsCheck
from heapledger.analyzer.kernel.vma import Vma
from heapledger.analyzer.leaks.not_freed import NotFreed
from heapledger.analyzer.ledger import HeapState, Ledger, Owner, origin_of
from heapledger.analyzer.owners import OwnerKind
from heapledger.analyzer.replay import LiveTable
from heapledger.analyzer.sampling import error, weigh
from heapledger.analyzer.site_table import SiteTable, program_frame
from heapledger.analyzer.sites import Frame, fingerprint, frame_name, site_name
from heapledger.store.reader import Trace

#: Call sites kept by name, in a ledger; the rest is one sum.
MAX_SITES = 5000
#: Call stacks kept in a list of blocks not freed; and of these, the ones that are compared frame by frame.
MAX_STACKS, MAX_FINGERPRINTS = 10_000, 2000

NO_LEAKS: dict[str, Any] = {"groups": [], "stacks": 0, "own": [0, 0, 0, 0], "inherited": [0, 0, 0, 0]}


class Names:
    """Call stacks of a process and of those it was forked from."""

    def __init__(self, trace: Trace, chain: Sequence[Any]) -> None:
        self._trace = trace
        self._ids = [p.id for p in reversed(chain)]
        self._biases: dict[int, dict[str, int]] = {}
        self._sites: dict[int, SiteTable] = {}
        self._steps: dict[int, dict[int, tuple[int, tuple[Frame, ...]]]] = {}

    def frames(self, origin: int, node: int) -> list[Frame]:
        """Innermost first; [] where nothing is known."""
        return list(self.each_frame(origin, node))

    def each_frame(self, origin: int, node: int) -> Iterator[Frame]:
        """As `frames`, resolved one by one: a site needs only the innermost few."""
        if not node or not 0 <= origin < len(self._ids):
            return
        process_id = self._ids[origin]
        steps = self._steps.setdefault(process_id, {})
        while node > 0:
            step = steps.get(node)
            if step is None:
                step = steps[node] = self._step(process_id, node)
            yield from step[1]
            # Parents are older than their children; a file in which they are not has a loop in it.
            node = step[0] if step[0] < node else 0

    def _step(self, process_id: int, node: int) -> tuple[int, tuple[Frame, ...]]:
        """A node's parent, and the frames at its address. Kept: outer frames are shared by very many stacks."""
        nodes = self._trace.nodes(process_id)
        at = int(np.searchsorted(nodes.node, node))
        if at == len(nodes.node) or nodes.node[at] != node:
            return 0, ()
        biases = self._biases_of(process_id)
        there = self._trace.frames_at(int(nodes.address[at]), int(nodes.module_id[at]))
        frames = (program_frame(frame, biases) for frame in there)
        return int(nodes.parent[at]), tuple(frame for frame in frames if frame is not None)

    def sites(self, origin: int) -> SiteTable:
        """The call sites of very many stacks at once."""
        process_id = self._ids[min(max(origin, 0), len(self._ids) - 1)]
        if process_id not in self._sites:
            self._sites[process_id] = SiteTable(self._trace, process_id, self._biases_of(process_id))
        return self._sites[process_id]

    def _biases_of(self, process_id: int) -> dict[str, int]:
        if process_id not in self._biases:
            self._biases[process_id] = {m.path: m.bias for m in self._trace.modules(process_id)}
        return self._biases[process_id]


def ledger_fact(
    ledger: Ledger, heap: dict[str, Any], check: MapsCheck, vmas: Sequence[Vma], names: Names
) -> dict[str, Any]:
    """`heap`: `heap_figures`, or `sampled_figures`."""
    sites, other = _sites(ledger, names)
    return {
        "resident_bytes": ledger.resident_bytes,
        "unexplained_bytes": ledger.unexplained_bytes,
        "estimated": ledger.estimated,
        "owners": [_owner(o, names) for o in ledger.owners],
        "sites": sites,
        "other_sites": other,
        "heap": heap,
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


#: Columns of amounts in a ledger's call sites.
_SUMS = ("rss_bytes", "bytes", "blocks")
_ERRORS = ("rss_error", "bytes_error", "blocks_error")


def _sites(ledger: Ledger, names: Names) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Live blocks by call site, the largest first, and the sum of those that are too many."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in ledger.sites:
        table = names.sites(part.origin)
        numbers, index = np.unique(table.of(part.stack), return_inverse=True)
        sums = [_sum_by(index, c, len(numbers)) for c in (part.rss_bytes, part.requested_bytes, part.blocks)]
        variances = np.zeros((3, len(part.stack))) if part.variances is None else part.variances
        spread = [np.bincount(index, weights=row, minlength=len(numbers)) for row in variances]
        largest = _largest(index, part.requested_bytes, len(numbers))
        for i, number in enumerate(numbers.tolist()):
            site = merged.setdefault(table.key(number), _new_site(table.frames[number]))
            for field, column in zip(_SUMS, sums, strict=True):
                site[field] += int(column[i])
            for field, row in zip(_ERRORS, spread, strict=True):
                site[field] += float(row[i])
            requested = int(part.requested_bytes[largest[i]])
            if requested > site["largest"]:
                site["largest"], site["stack"] = requested, [part.origin, int(part.stack[largest[i]])]
    for site in merged.values():
        site |= {field: error(site[field]) for field in _ERRORS}
    ordered = sorted(merged.values(), key=lambda s: (-s["rss_bytes"], -s["bytes"], s["name"]))
    rest = ordered[MAX_SITES:]
    other = {key: sum(s[key] for s in rest) for key in _SUMS}
    return ordered[:MAX_SITES], {**other, "sites": len(rest)}


def _sum_by(index: npt.NDArray[np.intp], values: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    sums = np.zeros(count, np.int64)
    np.add.at(sums, index, values)
    return sums


def _largest(index: npt.NDArray[np.intp], values: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.intp]:
    """Where the largest value of each group is; the first of several."""
    order = np.lexsort((-np.arange(len(values)), values, index))
    at = np.full(count, -1, np.intp)
    at[index[order]] = order  # of equal indices, the last one stays
    return at


def site_words(frame: Frame | None) -> dict[str, Any]:
    """A call site as it stands in facts."""
    return {
        "name": frame_name(frame) if frame is not None else site_name([]),
        "function": frame.function if frame else "",
        "file": frame.file if frame else None,
        "line": frame.line if frame else None,
        "module": frame.module if frame else "",
    }


def _new_site(frame: Frame | None) -> dict[str, Any]:
    zeros = dict.fromkeys((*_SUMS, *_ERRORS), 0)
    return {**site_words(frame), **zeros, "largest": -1, "stack": [0, 0]}


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


def sampled_figures(live: LiveTable, sample_bytes: int) -> dict[str, Any]:
    """As `heap_figures`, from a sample: what is free, and where, is not known."""
    w = weigh(live.requested, sample_bytes)
    unknown = dict.fromkeys(("heap_bytes", "mmapped_bytes", "hole_bytes", "cached_bytes", "top_bytes"))
    return {
        "live_bytes": round(float(w.amount.sum())),
        "live_blocks": round(float(w.blocks.sum())),
        **unknown,
        "live_bytes_error": error(float(w.amount_variance.sum())),
        "live_blocks_error": error(float(w.blocks_variance.sum())),
    }


def holes_fact(holes: Holes, own_since: Sequence[int], names: Names) -> dict[str, Any]:
    places = _Places(names.sites(0))
    return {
        "freed": places(holes.freed),
        "count": holes.count,
        "total_bytes": holes.total_bytes,
        "total_resident_bytes": holes.total_resident_bytes,
        "total_reclaimable_bytes": holes.total_reclaimable_bytes,
        "holes_below_pin_bytes": holes.holes_below_pin_bytes,
        "holes": [_hole(h, own_since, places) for h in holes.holes],
        "top": _hole(holes.top, own_since, places) if holes.top else None,
        "break_pin": _pin(holes.break_pin, own_since),
        "pins": _pins_by_site(holes, own_since, names),
        "places": places.rows,
    }


def _pins_by_site(holes: Holes, own_since: Sequence[int], names: Names) -> list[dict[str, Any]]:
    """Pins summed by call site, the most resident bytes first; each with the stack that pins most."""
    merged: dict[str, dict[str, Any]] = {}
    fields = ("holes", "bytes", "resident_bytes", "reclaimable_bytes")
    stacks = np.array([pinned.stack for pinned in holes.pins], np.uint32)
    origins = [origin_of(pinned.time, own_since) for pinned in holes.pins]
    words = {origin: names.sites(origin).of(stacks).tolist() for origin in set(origins)}
    for i, (pinned, origin) in enumerate(zip(holes.pins, origins, strict=True)):
        name = site_words(names.sites(origin).frames[words[origin][i]])["name"]
        site = merged.setdefault(name, {"stack": [origin, pinned.stack], **dict.fromkeys(fields, 0)})
        for field in fields:
            site[field] += getattr(pinned, field)
    return sorted(merged.values(), key=lambda p: -p["resident_bytes"])[:MAX_SITES]


#: Places that freed what lies in the holes that are kept.
MAX_PLACES = 1000


class _Places:
    """The call sites that freed what lies in holes: kept once, and meant by their position."""

    def __init__(self, table: SiteTable) -> None:
        self._table = table
        self._numbers: dict[int, int] = {}
        self.rows: list[dict[str, Any]] = []

    def __call__(self, freed: Sequence[Freed]) -> list[list[int]]:
        """[place, blocks, bytes] of each; those beyond MAX_PLACES are left out."""
        found = []
        for f in freed:
            if f.site not in self._numbers and len(self.rows) < MAX_PLACES:
                self._numbers[f.site] = len(self.rows)
                frame = self._table.frames[f.site]
                self.rows.append({**site_words(frame), "stack": [0, self._table.example(f.site)]})
            if f.site in self._numbers:
                found.append([self._numbers[f.site], f.blocks, f.bytes])
        return found


def _hole(hole: Hole, own_since: Sequence[int], places: _Places) -> dict[str, Any]:
    return {
        "kind": hole.kind,
        "address": hole.address,
        "bytes": hole.bytes,
        "resident_bytes": hole.resident_bytes,
        "reclaimable_bytes": hole.reclaimable_bytes,
        "held_by": hole.held_by,
        "pin": _pin(hole.pin, own_since),
        "freed": places(hole.freed),
    }


def _pin(pin: Pin | None, own_since: Sequence[int]) -> dict[str, Any] | None:
    if pin is None:
        return None
    stack = [origin_of(pin.time, own_since), pin.stack]
    return {"address": pin.address, "bytes": pin.bytes, "time_ns": pin.time, "stack": stack}


def leaks_fact(found: Sequence[NotFreed], names: Names) -> dict[str, Any]:
    """Blocks not freed, equal resolved stacks merged, the process's own first, then by bytes."""
    merged: dict[tuple[bool, str], dict[str, Any]] = {}
    totals: dict[bool, list[float]] = {False: [0, 0, 0, 0], True: [0, 0, 0, 0]}
    for number, group in enumerate(found):
        inherited = group.origin > 0
        amounts = (group.bytes, group.blocks, group.bytes_variance, group.blocks_variance)
        totals[inherited] = [a + b for a, b in zip(totals[inherited], amounts, strict=True)]
        if number >= MAX_STACKS:
            continue
        frames = names.frames(group.origin, group.stack) if number < MAX_FINGERPRINTS else []
        print_ = fingerprint(frames) if frames else ""
        entry: dict[str, Any] = {
            "stack": [group.origin, group.stack],
            "inherited": inherited,
            "bytes": group.bytes,
            "blocks": group.blocks,
            "bytes_error": group.bytes_variance,
            "blocks_error": group.blocks_variance,
            "oldest_ns": group.oldest_ns,
            "newest_ns": group.newest_ns,
            "fingerprint": print_,
        }
        before = merged.setdefault((inherited, print_ or f"{group.origin}.{group.stack}"), entry)
        if before is not entry:
            for field in ("bytes", "blocks", "bytes_error", "blocks_error"):
                before[field] += entry[field]
            before["oldest_ns"] = min(before["oldest_ns"], group.oldest_ns)
            before["newest_ns"] = max(before["newest_ns"], group.newest_ns)
    for entry in merged.values():
        entry |= {field: error(entry[field]) for field in ("bytes_error", "blocks_error")}
    groups = sorted(merged.values(), key=lambda g: (g["inherited"], -g["bytes"], g["stack"]))
    return {
        "groups": groups,
        "stacks": len(groups) + max(len(found) - MAX_STACKS, 0),
        "own": _with_errors(totals[False]),
        "inherited": _with_errors(totals[True]),
    }


def _with_errors(total: list[float]) -> list[int]:
    """[bytes, blocks, their variances] with standard errors in the variances' place."""
    return [int(total[0]), int(total[1]), error(total[2]), error(total[3])]
