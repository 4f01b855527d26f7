"""Blocks from allocation to release: the compiled table against the plain one, the malloc model and heaptrack."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heapledger.analyzer.facts import Names
from heapledger.analyzer.lifetimes import BLOCKS, BYTES, Lifetimes, Released, plain_newest
from heapledger.analyzer.replay import LiveTable
from heapledger.analyzer.session import _start, analyse
from heapledger.analyzer.site_table import SiteTable
from heapledger.analyzer.sites import site_name, site_of
from heapledger.store.events import COLUMNS, Events, Kind
from heapledger.store.reader import Trace

pytest.importorskip("heapledger.analyzer._lifetimes")

#: (kind, thread, address, size, old address, stack): few addresses, so that they meet again.
ADDRESS = st.sampled_from([0, 16, 32, 48, 64, 0x7000_0000_1010, 2**64 - 16])
EVENT = st.tuples(
    st.sampled_from([int(kind) for kind in Kind]), st.integers(0, 2), ADDRESS,
    st.sampled_from([0, 1, 24, 1000, 10**6, 2**64 - 1]), ADDRESS | st.sampled_from([1, 2]), st.integers(0, 3),
    st.integers(0, 1),
)  # fmt: skip


def events_of(*rows: tuple[int, ...]) -> Events:
    """Events of (kind, thread, address, size, arg, stack, returned); what is left out is 0, and they returned."""
    found = Events.empty(len(rows))
    for i, row in enumerate(rows):
        kind, thread, addr, size, arg, stack, returned = (*row, *(0, 0, 0, 0, 0, 0, 1)[len(row) :])
        for name, value in {"kind": kind, "thread": thread, "addr": addr, "size": size, "arg": arg}.items():
            getattr(found, name)[i] = COLUMNS[name].type(value)
        found.stack[i], found.time[i], found.seq_exit[i] = stack, i * 10, returned * (i + 1)
        found.word[i] = 0x21 if addr < 2**32 else 0x1002
    return found


def fed(events: Events, sample_bytes: int = 0, *, compiled: bool = True, since: int = 0) -> Lifetimes:
    lifetimes = Lifetimes(sample_bytes, compiled=compiled)
    half = len(events) // 2
    lifetimes.feed(events.take(slice(0, half)), events.stack[:half])
    if since:
        lifetimes = lifetimes.copy()
        lifetimes.begin(since)
    lifetimes.feed(events.take(slice(half, None)), events.stack[half:])
    return lifetimes


def flows_of(lifetimes: Lifetimes) -> dict[tuple[int, int], list[float]]:
    flows = lifetimes.flows()
    rows = np.concatenate((flows.amounts, flows.temporary), axis=1)
    keys = zip(flows.allocated_by.tolist(), flows.released_by.tolist(), strict=True)
    return dict(zip(keys, rows.tolist(), strict=True))


def table(live: LiveTable) -> list[Any]:
    return [getattr(live, name).tolist() for name in ("address", "requested", "stack", "time", "chunk_size", "mmapped")]


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENT, max_size=60), st.sampled_from([0, 512, 10**6]), st.sampled_from([0, 100]))
def test_the_compiled_table_does_what_the_plain_one_says(
    rows: list[tuple[int, ...]], sample_bytes: int, since: int
) -> None:
    events = events_of(*rows)
    one, other = (fed(events, sample_bytes, compiled=which, since=since) for which in (True, False))
    assert table(one.live()) == table(other.live())
    for name in ("address", "chunk_size", "number", "released_by"):
        assert getattr(one.released(), name).tolist() == getattr(other.released(), name).tolist()
    assert one.allocated() == pytest.approx(other.allocated(), rel=1e-9)
    assert one.knows_temporary == other.knows_temporary
    ours, theirs = flows_of(one), flows_of(other)
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert row == pytest.approx(theirs[key], rel=1e-9), key


@settings(max_examples=100, deadline=None)
@given(st.lists(EVENT, max_size=60), st.sampled_from([0, 10**6]))
def test_what_was_allocated_is_live_or_was_released(rows: list[tuple[int, ...]], sample_bytes: int) -> None:
    lifetimes = fed(events_of(*rows), sample_bytes)
    live, released = lifetimes.live(), lifetimes.flows().amounts.sum(axis=0)
    if not sample_bytes:
        assert released[BLOCKS] + len(live) == lifetimes.allocated()[BLOCKS]
        assert released[BYTES] + float(live.requested.sum()) == lifetimes.allocated()[BYTES]
    series = Lifetimes(sample_bytes).feed_estimating(events_of(*rows), np.zeros(len(rows), np.uint32))
    if rows and not sample_bytes:
        assert int(series.live_blocks[-1]) == 0, "weights are of sampled traces"


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENT, min_size=1, max_size=40))
def test_estimates_over_time_end_at_what_is_live(rows: list[tuple[int, ...]]) -> None:
    events = events_of(*rows)
    compiled, plain = Lifetimes(4096, compiled=True), Lifetimes(4096, compiled=False)
    ours = compiled.feed_estimating(events, events.stack)
    theirs = plain.feed_estimating(events, events.stack)
    assert np.abs(ours.live_bytes - theirs.live_bytes).max() <= 1
    assert np.abs(ours.live_blocks - theirs.live_blocks).max() <= 1
    assert compiled.peak_variance == pytest.approx(plain.peak_variance, rel=1e-6, abs=1e-3)


INTERVAL = st.tuples(st.integers(0, 30), st.integers(1, 12))


@given(st.lists(INTERVAL, max_size=20, unique_by=lambda i: i[0]).flatmap(st.permutations))
def test_of_blocks_that_overlap_the_last_one_is_kept(rows: list[tuple[int, int]]) -> None:
    rank = {row: age for age, row in enumerate(rows)}
    ordered = sorted(rows)
    start, length, number = (
        np.array(column, np.uint64)
        for column in ([r[0] for r in ordered], [r[1] for r in ordered], [rank[r] for r in ordered])
    )
    released = Released(start, length, number, number.astype(np.uint32))

    def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] < b[0] + b[1] and b[0] < a[0] + a[1]

    expected = [row for row in ordered if not any(overlap(row, o) and rank[o] > rank[row] for o in rows)]
    kept = released.newest()
    assert list(zip(kept.address.tolist(), kept.chunk_size.tolist(), strict=True)) == expected
    plain = plain_newest(start, start + length, number).astype(bool)
    assert start[plain].tolist() == kept.address.tolist()


def test_a_block_freed_before_the_thread_allocates_again_is_temporary() -> None:
    m, f = Kind.MALLOC, Kind.FREE
    lifetimes = fed(
        events_of(
            (m, 0, 16, 100, 0, 1), (f, 0, 16, 0, 0, 2),  # temporary
            (m, 0, 16, 100, 0, 1), (m, 0, 32, 7, 0, 1), (f, 0, 16, 0, 0, 2),  # another came between
            (f, 0, 32, 0, 0, 3),  # released before another came, if not at once
            (m, 0, 48, 9, 0, 1), (m, 1, 64, 9, 0, 1), (f, 0, 48, 0, 0, 2), (f, 0, 64, 0, 0, 2),  # threads by themselves
        )
    )  # fmt: skip
    flows = flows_of(lifetimes)
    assert flows[1, 2][:2] == [4, 218]
    assert flows[1, 2][4:6] == [2, 109]
    assert flows[1, 3][4:6] == [1, 7]


def test_realloc_releases_the_old_block_where_it_was_called() -> None:
    r = Kind.REALLOC
    lifetimes = fed(events_of((r, 0, 16, 10, 0, 1), (r, 0, 32, 20, 16, 2), (r, 0, 0, 99, 32, 3), (r, 0, 0, 0, 32, 4)))
    assert {key: row[:2] for key, row in flows_of(lifetimes).items()} == {(1, 2): [1, 10], (2, 4): [1, 20]}


def test_a_block_on_top_of_a_live_one_ends_it_at_no_known_place() -> None:
    lifetimes = fed(events_of((Kind.MALLOC, 0, 16, 10, 0, 1), (Kind.MALLOC, 0, 16, 20, 0, 2)))
    assert {key: row[:2] for key, row in flows_of(lifetimes).items()} == {(1, 0): [1, 10]}
    assert lifetimes.live().requested.tolist() == [20]


def test_a_forks_child_counts_only_what_it_allocated_itself() -> None:
    rows = [(Kind.MALLOC, 0, 16, 10, 0, 1), (Kind.MALLOC, 0, 32, 20, 0, 1)]
    after = [(Kind.FREE, 0, 16, 0, 0, 2), (Kind.FREE, 0, 32, 0, 0, 2)]
    lifetimes = fed(events_of(*rows, *after), since=15)
    assert (len(lifetimes.flows()), len(lifetimes.live()), lifetimes.allocated()[BLOCKS]) == (0, 0, 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forks_child_does_not_tell_who_released_what_before_the_fork(compiled: bool) -> None:
    """The call sites of its parent have other numbers."""
    before = [(Kind.MALLOC, 0, 16, 10, 0, 1), (Kind.FREE, 0, 16, 0, 0, 99), (Kind.MALLOC, 0, 32, 20, 0, 1)]
    after = [(Kind.MALLOC, 0, 64, 20, 0, 1), (Kind.FREE, 0, 32, 0, 0, 2), (Kind.FREE, 0, 64, 0, 0, 3)]
    released = fed(events_of(*before, *after), since=25, compiled=compiled).released()
    assert (released.address.tolist(), released.released_by.tolist()) == ([32, 64], [2, 3])


@pytest.fixture(scope="module")
def recorded(
    native: Callable[..., Path], heapledger: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A program of a few call sites, with stacks on frees."""
    path = tmp_path_factory.mktemp("lifetimes") / "sites.heapledger"
    program = native("sites.c", "-O1", "-fno-builtin")
    done = heapledger("run", "-q", "-o", path, "--", program, "20000")
    assert done.returncode == 0, done.stderr
    return path


def test_live_blocks_are_those_of_the_malloc_model(recorded: Path) -> None:
    with Trace(recorded) as trace:
        row = trace.process()
        lifetimes, replay = Lifetimes(), _start(row, None).replay
        assert replay is not None
        for events in trace.events(row.id):
            lifetimes.feed(events, events.stack)
            replay.feed(events)
        assert table(lifetimes.live())[:4] == table(replay.live())[:4]
        assert len(lifetimes.live()) > 100


def test_the_site_table_names_each_stack_as_the_frames_do(recorded: Path) -> None:
    with Trace(recorded) as trace:
        row = trace.process()
        names = Names(trace, [row])
        biases = {m.path: m.bias for m in trace.modules(row.id)}
        stacks = np.unique(np.concatenate([events.stack for events in trace.events(row.id)]))
        sites = SiteTable(trace, row.id, biases)
        assert len(stacks) > 8
        for stack, number in zip(stacks.tolist(), sites.of(stacks).tolist(), strict=True):
            frame = site_of(names.each_frame(0, stack))
            assert (sites.frames[number] is None) == (frame is None)
            assert frame is None or sites.frames[number] is not None
            found = sites.frames[number]
            assert site_name([found] if found else []) == site_name([frame] if frame else [])
            assert number == 0 or sites.of(np.array([sites.example(number)], np.uint32))[0] == number
        assert sites.of(np.array([0, 2**32 - 1], np.uint32)).tolist() == [0, 0], "no such stack"


def test_stored_sites_sum_to_what_was_allocated(recorded: Path) -> None:
    with Trace(recorded) as trace:
        fact = analyse(trace, fresh=True).lifetimes()
    assert fact["count"] == len(fact["sites"])
    for what in ("allocated", "released", "temporary", "live"):
        assert [sum(s[what][i] for s in fact["sites"]) for i in range(4)] == fact[what]
    assert fact["allocated"][0] == fact["released"][0] + fact["live"][0]
    for site in fact["sites"]:
        if site["freed_at_count"] <= 5:
            assert sum(place["released"][1] for place in site["freed_at"]) == site["released"][1]


def test_the_program_says_where_its_blocks_are_freed(recorded: Path) -> None:
    with Trace(recorded) as trace:
        sites = {site["function"]: site for site in analyse(trace).lifetimes()["sites"]}
    assert sites["scratch"]["temporary"][:2] == [100_000, 2_400_000]
    assert sites["make_small"]["allocated"][0] == 80_000
    assert [place["function"] for place in sites["make_small"]["freed_at"]] == ["drop_small"]
    assert [place["function"] for place in sites["make_large"]["freed_at"]] == ["drop_other"]
    for name in ("make_small", "make_medium", "make_large"):
        assert sites[name]["live"][0] > 0
    # The very last block that was made may be dropped at the end before anything else is made.
    assert sum(sites[name]["temporary"][0] for name in ("make_small", "make_medium", "make_large")) <= 1


@pytest.mark.slow
def test_heaptrack_counts_as_many_temporary_allocations(
    native: Callable[..., Path], heapledger: Callable[..., Any], tmp_path: Path
) -> None:
    if not shutil.which("heaptrack") or not shutil.which("heaptrack_print"):
        pytest.skip("heaptrack is not installed")
    program = native("sites.c", "-O1", "-fno-builtin")
    path = tmp_path / "x.heapledger"
    assert heapledger("run", "-q", "-o", path, "--", program, "300").returncode == 0
    subprocess.run(["heaptrack", "-o", tmp_path / "ht", program, "300"], check=True, capture_output=True)
    log = next(tmp_path.glob("ht*"))
    printed = subprocess.run(["heaptrack_print", log], check=True, capture_output=True, text=True).stdout
    found = re.search(r"temporary memory allocations: ([\d,.]+)", printed)
    assert found, printed[-2000:]
    with Trace(path) as trace:
        fact = analyse(trace).lifetimes()
    assert fact["temporary"][0] == int(re.sub(r"\D", "", found[1]))
