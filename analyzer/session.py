"""One pass over a process's events: replay, the books at each snapshot, holes, what was not freed, timelines.

    events ──▶ Replay ────┬──▶ TimelineBuilder ──▶ pyramids    kept in the trace as facts and pyramids, keyed by
               Lifetimes  │                                    ANALYZER_VERSION: the next look needs no pass
               Mappings   ├── at each snapshot's seq ──▶ ledger, holes, comparison of maps
                          ├── at each fork ──▶ a copy of the state: the child goes on from there
                          └── at the end ──▶ not freed, lifetimes by call site, agreement

A sampled process (`process.sample_bytes`) has no Replay: addresses cannot be predicted from some of the events. Its
figures are estimates from Lifetimes, and where its holes are is not known.

A fork's child is analysed from its parent's state at the fork; an exec starts anew.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heapledger.analyzer import facts as stored
from heapledger.analyzer.fact_shapes import is_sound
from heapledger.analyzer.glibc import Profile, Settings, profile_for
from heapledger.analyzer.holes import Holes, find_holes
from heapledger.analyzer.kernel import maps_check
from heapledger.analyzer.kernel.mappings import Mappings
from heapledger.analyzer.kernel.residency import from_vmas
from heapledger.analyzer.kernel.vma import Vma, sane
from heapledger.analyzer.leaks.not_freed import not_freed
from heapledger.analyzer.ledger import HeapState, adopted_addresses, balance, origins_of
from heapledger.analyzer.lifetime_facts import lifetimes_fact
from heapledger.analyzer.lifetimes import Lifetimes
from heapledger.analyzer.owners import Claims, ModuleSpan, ThreadSpan
from heapledger.analyzer.replay import HEAP_LIMIT_BYTES, Agreement, LiveTable, Replay, Series
from heapledger.analyzer.sampled_ledger import arena_addresses, balance_sampled
from heapledger.analyzer.sampling import MAX_SAMPLE_BYTES, error
from heapledger.analyzer.timeline import MODEL_SERIES, SAMPLED_SERIES, TimelineBuilder, sample_pyramids
from heapledger.store.events import Events
from heapledger.store.pyramid import Pyramid
from heapledger.store.reader import Trace

#: Results made by another version are thrown away and made anew.
ANALYZER_VERSION = "11"
#: The reason of the snapshot of the maps as the shim found them.
START = "start"
#: More snapshots on request than this are looked at only when asked for by id.
_REQUESTED_SNAPSHOTS = 16
#: Chains of forks longer than this are not followed back (each level is a copy of the heap's state).
_MAX_FORK_DEPTH = 100

#: Called with (events done, events in all) now and then.
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Analysis:
    """The results for one process. Facts are plain JSON, exactly as they are stored; `facts` says what is in them."""

    process: Any  #: store.schema.Process
    summary: dict[str, Any]
    _fact: Callable[[str], dict[str, Any] | None]
    _pyramid: Callable[[str], Pyramid | None]

    def stored(self, name: str) -> dict[str, Any] | None:
        """A fact by its name; None if it is not there, or not sound."""
        return self._fact(name)

    def ledger(self, snapshot_id: int) -> dict[str, Any] | None:
        return self._fact(f"ledger.{snapshot_id}")

    def holes(self, snapshot_id: int) -> dict[str, Any] | None:
        return self._fact(f"holes.{snapshot_id}")

    def leaks(self) -> dict[str, Any]:
        return self._fact("leaks") or stored.NO_LEAKS

    def lifetimes(self) -> dict[str, Any]:
        """Call sites by what became of their blocks; see `lifetime_facts`."""
        return self._fact("lifetimes") or {}

    @property
    def sample_bytes(self) -> int:
        """Not 0: the trace holds a sample, and figures are estimates."""
        return int(self.summary["sample_bytes"])

    def pyramid(self, series: str) -> Pyramid | None:
        return self._pyramid(series)


@dataclass(slots=True)
class _Walk:
    """The state that events move forward. `replay` None: of a sampled process."""

    replay: Replay | None
    lifetimes: Lifetimes
    mappings: Mappings
    profile: Profile

    def feed(self, events: Events, sites: npt.NDArray[np.uint32]) -> Series:
        self.mappings.feed(events)
        if self.replay is None:
            return self.lifetimes.feed_estimating(events, sites)
        self.lifetimes.feed(events, sites)
        return self.replay.feed(events)

    def copy(self) -> _Walk:
        """The same state, to go on from by itself."""
        replay = self.replay.copy() if self.replay is not None else None
        return _Walk(replay, self.lifetimes.copy(), self.mappings.copy(), self.profile)

    def begin(self, process: Any) -> None:
        """From here on it is the state of a fork's child: it counts anew."""
        if self.replay is not None:
            self.replay.reset_agreement()
        self.lifetimes.begin(process.start_ns)

    def live(self) -> LiveTable:
        """The blocks not freed; of a sampled process, those of them that were recorded."""
        return self.lifetimes.live() if self.replay is None else self.replay.live()

    def agreement(self) -> Agreement:
        return Agreement() if self.replay is None else self.replay.agreement

    def heap_figures(self) -> dict[str, Any]:
        if self.replay is None:
            return stored.sampled_figures(self.live(), self.lifetimes.sample_bytes)
        return stored.heap_figures(heap_state(self.replay))


def heap_state(replay: Replay) -> HeapState:
    chunks = replay.chunks()
    end = int(chunks.start[-1] + chunks.size[-1]) if len(chunks) else 0
    return HeapState(chunks, replay.mmapped(), replay.live(), replay.heap_start, max(end, replay.break_address))


@dataclass(slots=True)
class _Results:
    """What one pass found, before it is stored."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    pyramids: dict[str, Pyramid] = field(default_factory=dict)


def analyse(
    trace: Trace,
    process: Any = None,
    *,
    snapshot: int | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    heap_limit: int | None = None,
) -> Analysis:
    """The analysis of one process (default: the main one), from the file where it is stored already.

    `snapshot`: the id of a snapshot that must be among the results. `fresh`: do not use stored results. `heap_limit`:
    see `default_heap_limit`.
    """
    row = process if process is not None and hasattr(process, "pid") else trace.process(process)
    found = None if fresh else load(trace, row)
    if found is not None and (snapshot is None or found.ledger(snapshot) is not None):
        return found
    chain = fork_chain(trace.processes(), row)
    total = sum(p.events for p in chain)
    counter = _Counter(progress, total)
    walk = _walk_to(trace, chain, counter, heap_limit)
    results = _pass(trace, row, chain, walk, counter, extra=snapshot)
    _store(trace, row, results)
    return _analysis(trace, row, results)


def analyse_all(trace: Trace, *, progress: Progress | None = None, heap_limit: int | None = None) -> list[Analysis]:
    """The analyses of every process, in the order of the file. Each event is replayed once, forks included."""
    rows = list(trace.processes())
    missing = {row.id for row in rows if load(trace, row) is None}
    if missing:
        counter = _Counter(progress, sum(row.events for row in rows))
        chains = [fork_chain(rows, row) for row in rows]
        children: dict[int, list[Any]] = {}
        for chain in chains:
            if len(chain) > 1:
                children.setdefault(chain[-2].id, []).append(chain[-1])
        needed = _needed(rows, children, missing)
        for row, chain in zip(rows, chains, strict=True):
            if len(chain) == 1 and row.id in needed:
                _pass_tree(trace, row, [row], _start(row, heap_limit), counter, children, needed)
    return [load(trace, row) or analyse(trace, row, heap_limit=heap_limit) for row in rows]


def load(trace: Trace, row: Any) -> Analysis | None:
    """The stored analysis of this version, if there is one."""
    found = _analysis(trace, row, None)
    if not found.summary:
        return None
    # One damaged result, and all are made anew.
    kinds = ("ledger",) if found.sample_bytes else ("ledger", "holes")
    names = [f"{kind}.{number}" for number in found.summary["snapshots"] for kind in kinds]
    return found if all(found.stored(name) is not None for name in ("leaks", "lifetimes", *names)) else None


def fork_chain(rows: Sequence[Any], row: Any) -> list[Any]:
    """The processes (of `rows`) whose events made this one's state: the one that began anew first, `row` last."""
    by_id = {p.id: p for p in rows}
    chain = [row]
    while chain[0].start == "fork" and chain[0].fork_seq is not None and len(chain) < _MAX_FORK_DEPTH:
        parent = by_id.get(chain[0].parent_id)
        if parent is None or any(parent.id == p.id for p in chain):
            break
        chain.insert(0, parent)
    return chain


def _needed(rows: Sequence[Any], children: dict[int, list[Any]], missing: set[int]) -> set[int]:
    """Processes that have to be walked: those without results, and all they were forked from."""
    parents = {child.id: parent for parent, forked in children.items() for child in forked}
    needed = set()
    for row in rows:
        at: int | None = row.id if row.id in missing else None
        while at is not None and at not in needed:
            needed.add(at)
            at = parents.get(at)
    return needed


class _Counter:
    """Adds up events for the progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def default_heap_limit() -> int:
    """The largest heap that is modelled here, in bytes: an eighth of the memory that is available.

    The model takes 1.3 times the heap, a fork doubles it, and a trace from anywhere may claim any heap. Blocks beyond
    the limit are taken over as observed, and counted as such.
    """
    available = 8 << 30
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) << 10
    return min(max(available // 8, 256 << 20), HEAP_LIMIT_BYTES)


def _start(row: Any, heap_limit: int | None) -> _Walk:
    """The state of a program that has just been started."""
    profile = profile_for(row.libc_version, row.libc_build_id or None)
    environment = {k: v for k, v in row.environment.items() if isinstance(v, str)}
    settings = Settings.from_environment(environment)
    limit = default_heap_limit() if heap_limit is None else heap_limit
    sample_bytes = min(max(int(row.sample_bytes), 0), MAX_SAMPLE_BYTES)
    replay = None
    if not sample_bytes:
        replay = Replay(profile, settings, row.start_break, page_size=_page_size(row), heap_limit=limit)
    return _Walk(replay, Lifetimes(sample_bytes), Mappings(), profile)


def _page_size(row: Any) -> int:
    """4096 unless the file says another power of two that can be."""
    size = int(row.page_size)
    return size if size in (4096, 8192, 16384, 65536) else 4096


def _walk_to(trace: Trace, chain: Sequence[Any], counter: _Counter, heap_limit: int | None) -> _Walk:
    """The state in which the last of a fork chain begins."""
    walk = _start(chain[0], heap_limit)
    for parent, child in itertools.pairwise(chain):
        for events, _ in _cut(trace.events(parent.id, last_seq=child.fork_seq - 1), []):
            if events is not None:
                # Whose sites the parent's blocks have does not matter: the child inherits them.
                walk.feed(events, np.zeros(len(events), np.uint32))
                counter.add(len(events))
        walk.begin(child)
    return walk


def _cut(blocks: Iterable[Events], stops: Sequence[int]) -> Iterable[tuple[Events | None, int]]:
    """Events in runs between stops: (events, -1), or (None, i) where stop i comes: before the first event of its seq.

    `stops` ascend. Those behind the last event come at the end.
    """
    next_stop = 0
    for block in blocks:
        begin = 0
        while next_stop < len(stops):
            at = int(np.searchsorted(block.seq, np.uint64(max(stops[next_stop], 0)), side="left"))
            if at >= len(block):
                break
            if at > begin:
                yield block.take(slice(begin, at)), -1
            yield None, next_stop
            begin, next_stop = max(begin, at), next_stop + 1
        if begin < len(block):
            yield (block.take(slice(begin, None)) if begin else block), -1
    for index in range(next_stop, len(stops)):
        yield None, index


def _pass_tree(
    trace: Trace,
    row: Any,
    chain: list[Any],
    walk: _Walk,
    counter: _Counter,
    children: dict[int, list[Any]],
    needed: set[int],
) -> None:
    """A process and, from the moment of each fork, its children; depth first, so that few states exist at a time."""
    forked = [child for child in children.get(row.id, []) if child.id in needed]

    def at_fork(child: Any) -> None:
        fresh = walk.copy()
        fresh.begin(child)
        _pass_tree(trace, child, [*chain, child], fresh, counter, children, needed)

    _store(trace, row, _pass(trace, row, chain, walk, counter, forked=forked, at_fork=at_fork))


def _pass(
    trace: Trace,
    row: Any,
    chain: Sequence[Any],
    walk: _Walk,
    counter: _Counter,
    *,
    extra: int | None = None,
    forked: Sequence[Any] = (),
    at_fork: Callable[[Any], None] | None = None,
) -> _Results:
    """The pass over one process's own events."""
    snapshots = _chosen(trace.snapshots(row.id), extra)
    stops: list[tuple[int, Any, Any]] = [(s.seq, s, None) for s in snapshots]
    stops += [(child.fork_seq, None, child) for child in forked]
    stops.sort(key=lambda stop: stop[0])
    results, names = _Results(), stored.Names(trace, chain)
    sites = names.sites(0)
    timeline = TimelineBuilder(MODEL_SERIES if walk.replay is not None else SAMPLED_SERIES)
    for events, stop in _cut(trace.events(row.id), [s[0] for s in stops]):
        if events is not None:
            timeline.add(events, walk.feed(events, sites.of(events.stack)))
            counter.add(len(events))
        elif stops[stop][1] is not None:
            _at_snapshot(trace, row, chain, walk, stops[stop][1], names, results)
        elif at_fork is not None:
            at_fork(stops[stop][2])
    _at_end(trace, row, chain, walk, timeline, names, results)
    return results


def _chosen(snapshots: Sequence[Any], extra: int | None) -> list[Any]:
    """The snapshots to look at: all but requested ones, the latest of these, and `extra`.

    "start" is the maps before the first call, without pages: `_maps_at_start` uses it.
    """
    requested = [s for s in snapshots if s.reason == "request"]
    dropped = {s.id for s in requested[:-_REQUESTED_SNAPSHOTS]} - {extra}
    return [s for s in snapshots if s.id not in dropped and s.reason != START]


def _maps_at_start(trace: Trace, chain: Sequence[Any]) -> list[tuple[int, int]] | None:
    """Anonymous memory before the first call of the program (a fork's child: of the one it descends from)."""
    found = trace.snapshot(chain[0].id, START)
    if found is None:
        return None
    return [(vma.start, vma.end) for vma in read_vmas(trace, found.id) if vma.is_anonymous and not vma.path]


def _at_snapshot(
    trace: Trace,
    row: Any,
    chain: Sequence[Any],
    walk: _Walk,
    snapshot: Any,
    names: stored.Names,
    results: _Results,
) -> None:
    """Ledger, holes and maps of one snapshot."""
    vmas = read_vmas(trace, snapshot.id)
    claims = _claims(trace, row, chain, snapshot, walk)
    if walk.replay is None:
        fact = _sampled_books(vmas, claims, walk, _own_since(chain), names)
        results.facts[f"ledger.{snapshot.id}"] = fact
        return
    page_size = claims.page_size
    state = heap_state(walk.replay)
    claims.heap_start, claims.heap_end = state.heap_start, state.heap_end
    claims.arena_blocks = adopted_addresses(state).tolist()
    own_since = _own_since(chain)
    ledger = balance(vmas, state, claims, own_since=own_since, page_size=page_size)
    residency, _ = from_vmas(vmas, page_size=page_size)
    holes: Holes = find_holes(state, residency, walk.lifetimes.released(), page_size=page_size)
    check = maps_check.compare(
        vmas,
        state.mapped,
        heap_start=state.heap_start,
        heap_end=walk.replay.break_address,
        start_break=chain[0].start_break,
        page_size=page_size,
    )
    figures = stored.heap_figures(state)
    results.facts[f"ledger.{snapshot.id}"] = stored.ledger_fact(ledger, figures, check, vmas, names)
    results.facts[f"holes.{snapshot.id}"] = stored.holes_fact(holes, own_since, names)


def _sampled_books(
    vmas: list[Vma], claims: Claims, walk: _Walk, own_since: Sequence[int], names: stored.Names
) -> dict[str, Any]:
    """The ledger of a snapshot of a sampled process: no holes, and no maps to compare."""
    live, sample_bytes = walk.live(), walk.lifetimes.sample_bytes
    claims.sampled = True
    claims.arena_blocks = arena_addresses(vmas, live).tolist()
    ledger = balance_sampled(vmas, live, claims, sample_bytes, own_since=own_since, page_size=claims.page_size)
    figures = stored.sampled_figures(live, sample_bytes)
    return stored.ledger_fact(ledger, figures, maps_check.MapsCheck(0, 0, []), vmas, names)


def _at_end(
    trace: Trace,
    row: Any,
    chain: Sequence[Any],
    walk: _Walk,
    timeline: TimelineBuilder,
    names: stored.Names,
    results: _Results,
) -> None:
    """What holds after the last event."""
    live, own_since = walk.live(), _own_since(chain)
    sample_bytes = walk.lifetimes.sample_bytes
    results.facts["leaks"] = stored.leaks_fact(not_freed(live, own_since, sample_bytes), names)
    # The replay corrects what the events got wrong (lost ones); flows go by the events alone, and so does what is live.
    held = walk.lifetimes.live()
    own = held.take(origins_of(held.time, own_since) == 0)
    results.facts["lifetimes"] = lifetimes_fact(walk.lifetimes, own, names)
    agreement = asdict(walk.agreement())
    reasons = {reason.name: count for reason, count in agreement.pop("reasons").items()}
    agreement["forced_examples"] = [
        {**example, "reason": example["reason"].name} for example in agreement["forced_examples"]
    ]
    results.facts["analysis"] = {
        "agreement": agreement,
        "reasons": reasons,
        "profile": walk.profile.version,
        "confirmed": walk.profile.confirmed,
        "events": timeline.events,
        "peak_live_bytes": timeline.peak_live_bytes,
        "peak_live_ns": timeline.peak_live_ns,
        "peak_live_error": error(walk.lifetimes.peak_variance) if sample_bytes else 0,
        "sample_bytes": sample_bytes,
        "heap": walk.heap_figures(),
        "snapshots": [int(name.partition(".")[2]) for name in results.facts if name.startswith("ledger.")],
        "damaged_events": sum(d.events for d in trace.damaged if d.process_id == row.id),
    }
    results.pyramids = {**timeline.finish(), **sample_pyramids(trace.samples(row.id))}


def _own_since(chain: Sequence[Any]) -> list[int]:
    """Start times for ledger.balance: the process's own first."""
    return [int(p.start_ns) for p in reversed(chain)]


def _claims(trace: Trace, row: Any, chain: Sequence[Any], snapshot: Any, walk: _Walk) -> Claims:
    """What the trace knows of memory beside malloc's at a snapshot; where malloc's is, is left open."""
    seq = snapshot.seq
    modules = [
        ModuleSpan(m.path, m.low, m.high)
        for m in trace.modules(row.id)
        if m.load_seq <= seq and (m.unload_seq is None or m.unload_seq > seq)
    ]
    return Claims(
        modules=modules,
        threads=_threads(trace, chain, snapshot),
        regions=walk.mappings.regions(),
        self_low=row.self_low,
        self_high=row.self_high,
        at_start=_maps_at_start(trace, chain),
        page_size=_page_size(row),
    )


def _threads(trace: Trace, chain: Sequence[Any], snapshot: Any) -> list[ThreadSpan]:
    """Threads that had started, ended ones included: libc keeps their stacks. The parent's come along with a fork."""
    threads = []
    until = [int(child.start_ns) for child in chain[1:]] + [snapshot.time_ns]
    for process, end in zip(chain, until, strict=True):
        threads += [
            ThreadSpan(t.number, t.name, t.thread_pointer, t.stack_low, t.stack_high)
            for t in trace.threads(process.id)
            if t.start_ns is None or t.start_ns <= end
        ]
    return threads


def read_vmas(trace: Trace, snapshot_id: int) -> list[Vma]:
    """The mappings of a snapshot, by ascending address."""
    vmas = []
    for v in trace.vmas(snapshot_id):
        pages, category = v.runs
        vmas.append(
            Vma(
                v.start, v.end, v.perms, v.offset, v.path, v.inode, v.rss_bytes, v.anonymous_bytes, v.swap_bytes,
                pages, category,
            )
        )  # fmt: skip
    return sane(vmas)


def _store(trace: Trace, row: Any, results: _Results) -> None:
    """Keeps the results with the trace: in the file, or in memory where it cannot be written."""
    for series, pyramid in results.pyramids.items():
        trace.save_pyramid(row.id, series, ANALYZER_VERSION, pyramid)
    # The summary goes last: with it the results count as complete.
    for name in sorted(results.facts, key=lambda n: n == "analysis"):
        trace.save_fact(row.id, name, ANALYZER_VERSION, results.facts[name])


def _analysis(trace: Trace, row: Any, results: _Results | None) -> Analysis:
    cache = results.facts if results is not None else {}

    def fact(name: str) -> dict[str, Any] | None:
        if name not in cache:
            value = trace.fact(row.id, name, ANALYZER_VERSION)
            if value is None or not is_sound(name, value):
                return None
            cache[name] = value
        return cache[name]

    def pyramid(series: str) -> Pyramid | None:
        return trace.pyramid(row.id, series, ANALYZER_VERSION)

    return Analysis(row, fact("analysis") or {}, fact, pyramid)
