"""The malloc model against its own invariants, and the interpreted against the compiled engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from glibc_oracle import ENGINES, Script
from hypothesis import example, given, settings
from hypothesis import strategies as st

from heapledger.analyzer.glibc import ChunkState, Settings, engine, profile_for
from heapledger.analyzer.glibc import constants as numbers
from heapledger.analyzer.glibc.profile import PROFILES
from heapledger.analyzer.replay import ForcedClass, Replay
from heapledger.store.events import COLUMNS, Events, Kind

BREAK = 0x555555560000
VERSIONS = ("2.31", "2.36", "2.41")


def test_numbers_of_states_kinds_and_reasons_are_the_same_everywhere() -> None:
    for state in ChunkState:
        assert getattr(numbers, state.name) == state
    for name in dir(numbers):
        if name.startswith("KIND_"):
            assert getattr(numbers, name) == Kind[name.removeprefix("KIND_")]
    for reason in ForcedClass:
        assert getattr(numbers, f"WHY_{reason.name}") == reason


def test_unknown_version_takes_the_nearest_profile_and_says_so() -> None:
    assert profile_for("2.36-9+deb12u14").confirmed
    assert [profile_for(v).confirmed for v in VERSIONS] == [True] * 3
    newer = profile_for("2.55")
    assert newer.version == "2.55"
    assert not newer.confirmed
    assert newer.tcache_struct_bytes == PROFILES[-1].tcache_struct_bytes
    assert not profile_for("musl").confirmed
    assert profile_for("2.27").confirmed
    assert profile_for("2.28").tcache_struct_bytes == 576
    assert not profile_for("2.28").confirmed


def test_settings_are_read_as_glibc_reads_them() -> None:
    env = {
        "MALLOC_TOP_PAD_": "65536",
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_MAX_": "x",
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0x10:glibc.elision.enable=1:glibc.malloc.mxfast=010:nonsense",
    }
    found = Settings.from_environment(env)
    assert found == Settings(top_pad=65536, arena_max=2, tcache_count=16, mxfast=8)


def test_first_block_lies_behind_the_tcache_heads() -> None:
    for compiled in ENGINES:
        replay = Script("2.36", BREAK, compiled).malloc(24, BREAK + 0x2A0).replay
        assert replay.agreement.exact == 1
        states = [ChunkState(int(s)) for s in replay.chunks().state]
        assert states == [ChunkState.TCACHE_STRUCT, ChunkState.LIVE, ChunkState.TOP]


def test_unknown_break_is_adopted_from_the_first_block() -> None:
    for compiled in ENGINES:
        replay = Script("2.36", 0, compiled).malloc(24, BREAK + 0x2A0).replay
        assert replay.agreement.exact == replay.agreement.adopted_bases == 1
        assert replay.heap_start == BREAK
        assert replay.break_address == BREAK + 0x21000


def test_foreign_break_that_was_not_seen_becomes_a_gap_and_counts_as_forced() -> None:
    # A block that needs more than top has; somebody took 0x5000 bytes of break before.
    for compiled in ENGINES:
        script = Script("2.36", BREAK, compiled).malloc(24, BREAK + 0x2A0).malloc(0x2000, BREAK + 0x2C0)
        replay = script.malloc(0x1F000, BREAK + 0x21000 + 0x5010).replay
        assert [f.reason for f in replay.agreement.forced_examples] == [ForcedClass.FOREIGN_BREAK]
        table = replay.chunks()
        gap = table.state == ChunkState.FOREIGN
        assert table.size[gap].tolist() == [0x5000]
        replay.check()


def test_a_call_that_failed_leaves_the_old_block_as_it_was() -> None:
    for compiled in ENGINES:
        script = Script("2.36", BREAK, compiled).malloc(100, BREAK + 0x2A0, stack=7)
        replay = script.realloc(BREAK + 0x2A0, 1 << 40, 0).replay
        assert replay.agreement.exact == 2
        live = replay.live()
        assert live.requested.tolist() == [100]
        assert live.stack.tolist() == [7]


def test_a_block_of_another_arena_is_live_until_freed() -> None:
    elsewhere = 0x7FFFE8000B70
    for compiled in ENGINES:
        script = Script("2.36", BREAK, compiled).malloc(24, BREAK + 0x2A0)
        script.malloc(100, elsewhere, thread=3, word=0x75)
        live = script.replay.live()
        assert live.address.tolist() == [BREAK + 0x2A0, elsewhere]
        assert script.replay.agreement.forced_examples[0].reason == ForcedClass.OTHER_ARENA
        script.free(elsewhere, thread=3)
        assert script.replay.live().address.tolist() == [BREAK + 0x2A0]
        script.replay.check()


def test_an_address_on_top_of_a_live_block_means_its_release_was_missed() -> None:
    for compiled in ENGINES:
        script = Script("2.36", BREAK, compiled).malloc(24, BREAK + 0x2A0)
        replay = script.malloc(24, BREAK + 0x2A0).replay
        assert replay.agreement.forced_examples[0].reason == ForcedClass.OVERLAP
        assert replay.live().address.tolist() == [BREAK + 0x2A0]
        replay.check()


def test_every_forced_event_is_counted_by_its_reason_not_only_the_examples() -> None:
    for compiled in ENGINES:
        script = Script("2.36", BREAK, compiled).malloc(24, BREAK + 0x2A0)
        for i in range(250):
            script.malloc(100, 0x7FFFE8000B70 + 0x70 * i, thread=3, word=0x75)
        script.malloc(24, BREAK + 0x2A0)
        agreement = script.replay.agreement
        assert agreement.reasons == {ForcedClass.OTHER_ARENA: 250, ForcedClass.OVERLAP: 1}
        assert agreement.forced == 251
        assert len(agreement.forced_examples) == 100
        child = script.replay.copy()
        assert child.agreement.reasons == agreement.reasons
        child.reset_agreement()
        assert child.agreement.reasons == {}
        assert sum(script.replay.agreement.reasons.values()) == 251


def test_a_block_where_tcache_heads_were_thought_to_be_takes_them_from_the_thread() -> None:
    for compiled in ENGINES:
        script = Script("2.36", BREAK, compiled).malloc(24, 0x7F0000001010, thread=1, word=0x21002)
        script.malloc(0x200, BREAK + 0x20, word=0x221).thread_end(thread=1)
        script.replay.check()
        assert script.replay.live().address.tolist() == [BREAK + 0x20, 0x7F0000001010]


def test_agreement_can_be_reset_and_a_copy_goes_its_own_way() -> None:
    for compiled in ENGINES:
        script = Script("2.36", BREAK, compiled).malloc(24, BREAK + 0x2A0)
        child = script.replay.copy()
        child.reset_agreement()
        script.free(BREAK + 0x2A0)
        assert script.replay.agreement.exact == 1
        assert child.agreement.predicted == 0
        assert len(script.replay.live()) == 0
        assert child.live().address.tolist() == [BREAK + 0x2A0]
        child.check()


words = st.sampled_from([0, 1, 8, 16, 24, 1 << 12, 1 << 20, 1 << 40, 1 << 46, 1 << 63, (1 << 64) - 1]) | st.integers(
    0, (1 << 64) - 1
)
addresses = st.integers(0, 64).map(lambda i: BREAK + 0x290 + 16 * i) | words


@st.composite
def hostile_events(draw: st.DrawFn) -> Events:
    """Events that no program could have made."""
    count = draw(st.integers(1, 40))
    events = Events.empty(count)
    for i in range(count):
        events.kind[i] = draw(st.sampled_from(list(Kind)) | st.integers(0, 255))
        events.thread[i] = draw(st.sampled_from([0, 0, 0, 1, 2, 9, 5000, (1 << 32) - 1]))
        events.addr[i] = draw(addresses)
        events.size[i] = draw(words)
        events.arg[i] = draw(addresses)
        events.arg2[i] = draw(words)
        events.word[i] = draw(st.sampled_from([0, 0, 0x21, 0x31, 0x411, 0x21002, 0x75]) | words)
        events.seq[i] = draw(words)
        events.seq_exit[i] = draw(st.sampled_from([0, 1]))
        events.time[i] = draw(words)
        events.stack[i] = draw(st.integers(0, (1 << 32) - 1))
    return events


def one_event(kind: int, **columns: int) -> Events:
    """A single event that returned; columns not named are 0."""
    events = Events.empty(1)
    events.kind[0], events.seq_exit[0] = kind, 1
    for name, value in columns.items():
        getattr(events, name)[0] = COLUMNS[name].type(value)
    return events


# A failed call with a word that says "of another arena": once a block with address 0 was adopted, and lost.
@example(events=one_event(Kind.MALLOC, arg=0x555555560290, word=4), version="2.31", start=0)
@given(events=hostile_events(), version=st.sampled_from(VERSIONS), start=st.sampled_from([0, BREAK, (1 << 64) - 4096]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_nonsense_breaks_no_invariant_and_both_engines_make_the_same_of_it(
    events: Events, version: str, start: int
) -> None:
    outcomes = []
    for compiled in ENGINES:
        replay = Replay(profile_for(version), Settings(), start, compiled=compiled, heap_limit=64 << 20)
        series = replay.feed(events)
        replay.check()
        live = replay.live()
        outcomes.append((replay.agreement, live.address.tolist(), live.requested.tolist(), series.live_bytes.tolist()))
        assert series.live_blocks[-1] == len(live)
    assert all(outcome == outcomes[0] for outcome in outcomes)


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(what, which block, size) of a program that keeps a few blocks."""
    sizes = st.sampled_from([0, 24, 25, 100, 1000, 1032, 1033, 5000, 70000, 131072, 200000, 3 << 20])
    return draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), sizes), min_size=1, max_size=60))


@given(program=programs(), version=st.sampled_from(VERSIONS))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_invariants_hold_after_every_step_and_both_engines_agree(
    program: list[tuple[int, int, int]], version: str
) -> None:
    results = [run_blind(program, version, compiled) for compiled in ENGINES]
    assert all(result == results[0] for result in results)


def run_blind(program: list[tuple[int, int, int]], version: str, compiled: bool) -> list[object]:
    """Feeds a program whose results are the model's own first guess: every step is checked."""
    replay = Replay(profile_for(version), Settings(), BREAK, compiled=compiled)
    blocks: dict[int, int] = {}
    trail: list[object] = []
    for what, which, size in program:
        old = blocks.pop(which, 0)
        if what == 0 or (old and what in (1, 2, 3)):
            feed_one(replay, Kind.FREE, addr=old)
        elif what in (1, 2, 3):
            kind = (Kind.MALLOC, Kind.CALLOC, Kind.MEMALIGN)[what - 1]
            blocks[which] = guess(replay, kind, size=size, arg=64)
        elif what == 4:
            blocks[which] = guess(replay, Kind.REALLOC, size=size or 1, arg=old)
        else:
            feed_one(replay, Kind.MALLOPT, addr=1, arg=1, size=size & 64)
            if old:
                blocks[which] = old
        replay.check()
        trail.append((blocks.get(which), replay.break_address, len(replay.chunks())))
    assert replay.agreement.forced == 0
    return trail


def guess(replay: Replay, kind: Kind, size: int, arg: int) -> int:
    """What the model expects the call to return, learned from a copy that is told nonsense; fed to the replay as
    true."""
    probe = replay.copy()
    probe.reset_agreement()
    feed_one(probe, kind, addr=0x10, size=size, arg=arg)
    if probe.agreement.forced_examples and probe.agreement.forced_examples[0].expected:
        address = probe.agreement.forced_examples[0].expected
    else:
        # A mapping: any page will do, at the offset an aligned block would have.
        lead = 48 if kind == Kind.MEMALIGN else 0
        address = 0x7F0000000000 + len(replay.mmapped()) * (64 << 20) + 16 + lead
        if kind == Kind.REALLOC and arg > 0x7F0000000000:
            address = arg
    feed_one(replay, kind, addr=address, size=size, arg=arg)
    return address


def feed_one(replay: Replay, kind: Kind, **columns: int) -> None:
    replay.feed(one_event(kind, **columns))


def test_twenty_thousand_blocks_of_other_arenas_are_found_again() -> None:
    count = 20000
    events = Events.empty(2 * count)
    where = 0x7F0000000000 + 4096 * np.random.default_rng(1).permutation(count).astype(np.uint64)
    events.kind[:count], events.kind[count:] = Kind.MALLOC, Kind.FREE
    events.addr[:count], events.addr[count:] = where, where[::-1]
    events.thread[:], events.size[:], events.word[:], events.seq_exit[:] = 1, 100, 0x75, 1
    for compiled in ENGINES:
        replay = Replay(profile_for("2.36"), Settings(), BREAK, compiled=compiled)
        series = replay.feed(events)
        assert series.live_blocks[count - 1] == count
        assert series.live_bytes[-1] == 0
        assert replay.agreement.unknown_frees == 0
        replay.check()


OUT_OF_MEMORY = """
import resource, sys
from glibc_oracle import Script
from heapledger.analyzer.glibc import Settings, profile_for
from heapledger.analyzer.replay import ForcedClass, Replay
start, compiled = 0x555555560000, sys.argv[1] == "True"
script = Script("2.36", start, compiled)
script.replay = Replay(profile_for("2.36"), Settings(mmap_max=0), start, compiled=compiled)
script.malloc(24, start + 0x2A0)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
huge = script.malloc(1 << 30, start + 0x2C0).replay
huge.check()
assert huge.agreement.reasons == {ForcedClass.UNBACKED: 1}, huge.agreement
assert huge.live().requested.tolist() == [24, 1 << 30]
"""


@pytest.mark.parametrize("compiled", ENGINES)
def test_no_memory_for_the_shadow_of_a_large_heap_is_a_limit_like_any_other(compiled: bool) -> None:
    subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, str(compiled)], check=True, cwd=Path(__file__).parent)


def test_a_copy_of_a_heap_that_has_grown_and_shrunk_is_the_same_heap() -> None:
    for compiled in ENGINES:
        script = Script("2.36", BREAK, compiled)
        where = [BREAK + 0x2A0 + 0x8010 * i for i in range(200)]
        for address in where:
            script.malloc(0x8000, address)
        for address in where[:0:-1]:
            script.free(address)
        assert script.replay.agreement.forced == 0
        twin = script.replay.copy()
        twin.check()
        for name in ("start", "size", "state", "requested", "seq"):
            assert getattr(twin.chunks(), name).tolist() == getattr(script.replay.chunks(), name).tolist()
        script.replay = twin
        script.malloc(0x8000, where[1]).malloc(0x300000 - 0x100, 0x7F0000001010)
        assert twin.agreement.forced == 0
        twin.check()


@pytest.mark.parametrize("compiled", ENGINES)
def test_the_engine_is_the_one_asked_for(compiled: bool) -> None:
    assert engine(compiled).COMPILED is compiled
