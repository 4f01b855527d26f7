"""The malloc model on events that no program could have made, many at a time, from seeds.

Hypothesis (test_glibc_model.py) shrinks well and seldom piles up trouble; this does the reverse. To hunt further:

    HEAPLEDGER_NONSENSE=1000:9000 pytest tests/test_glibc_nonsense.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from glibc_oracle import ENGINES

from heapledger.analyzer.glibc import Settings, profile_for
from heapledger.analyzer.glibc.profile import PROFILES
from heapledger.analyzer.replay import Replay
from heapledger.store.events import Events, Kind

Words = npt.NDArray[np.uint64]

BREAK = 0x555555560000
FIRST, LAST = map(int, os.environ.get("HEAPLEDGER_NONSENSE", "0:600").split(":"))
NUMBERS = np.array(
    [0, 1, 2, 4, 8, 16, 24, 100, 1000, 1032, 1033, 5000, 70000, 131072, 200000, 1 << 20, 1 << 40, 1 << 46, 1 << 63,
     (1 << 64) - 1],
    np.uint64,
)  # fmt: skip
CHUNK_WORDS = np.array([0, 0, 0, 0x20, 0x21, 0x31, 0x75, 0x411, 0x1002, 0x21002], np.uint64)
KINDS = [
    *[Kind.MALLOC] * 3, Kind.CALLOC, *[Kind.REALLOC] * 2, *[Kind.FREE] * 3, Kind.MEMALIGN, Kind.VALLOC, Kind.PVALLOC,
    Kind.MALLOC_TRIM, Kind.MALLOPT, Kind.BRK, Kind.SBRK, Kind.THREAD_END,
]  # fmt: skip
ENVIRONMENT = {
    "MALLOC_TOP_PAD_": ["0", "4096", str(1 << 30)],
    "MALLOC_MMAP_THRESHOLD_": ["0", "20000", str(1 << 24)],
    "MALLOC_MMAP_MAX_": ["0", "2"],
    "MALLOC_TRIM_THRESHOLD_": ["0", "4096", str(1 << 40)],
    "GLIBC_TUNABLES": [
        "glibc.malloc.tcache_count=0",
        "glibc.malloc.tcache_count=2:glibc.malloc.tcache_max=64",
        "glibc.malloc.tcache_unsorted_limit=1",
        "glibc.malloc.mxfast=160",
        "glibc.malloc.mxfast=0:glibc.malloc.tcache_count=100",
    ],
}


@dataclass
class Case:
    """What one seed stands for."""

    version: str
    settings: Settings
    start_break: int
    heap_limit: int
    events: Events


def addresses(random: np.random.Generator, count: int) -> Words:
    """Mostly places in a small heap, so that calls get in one another's way; some mapped blocks, some anything."""
    reach = int(random.choice([8, 64, 9000]))
    near = BREAK + 0x290 + 16 * random.integers(0, reach, count).astype(np.uint64)
    mapped = 0x7F0000000010 + 4096 * random.integers(0, 8, count).astype(np.uint64)
    anything = random.integers(0, 1 << 64, count, dtype=np.uint64)
    which = random.integers(0, 10, count)
    return np.select([which < 6, which < 8, which < 9], [near, mapped, random.choice(NUMBERS, count)], anything)


def events_of(random: np.random.Generator, count: int) -> Events:
    events = Events.empty(count)
    events.kind[:] = random.choice(KINDS, count)
    events.thread[:] = random.choice([0, 0, 0, 0, 1, 2, 5000], count)
    events.addr[:], events.arg[:] = addresses(random, count), addresses(random, count)
    small = random.integers(0, 3000, count).astype(np.uint64)
    events.size[:] = np.where(random.integers(0, 2, count) == 0, small, random.choice(NUMBERS, count))
    events.arg2[:] = random.choice(np.concatenate([NUMBERS, CHUNK_WORDS]), count)
    events.word[:] = random.choice(np.concatenate([NUMBERS, CHUNK_WORDS]), count)
    options = events.kind == Kind.MALLOPT
    events.arg[options] = random.integers(-8, 3, int(options.sum())).astype(np.uint64)
    events.seq[:] = events.time[:] = np.arange(count)
    events.seq_exit[:] = random.integers(0, 8, count) != 0
    events.stack[:] = random.integers(0, 1 << 32, count)
    return events


def case(seed: int) -> Case:
    random = np.random.default_rng(seed)
    events = events_of(random, int(random.integers(1, 120)))
    environment = {name: str(random.choice(values)) for name, values in ENVIRONMENT.items() if random.random() < 0.25}
    return Case(
        version=str(random.choice([profile.version for profile in PROFILES])),
        settings=Settings.from_environment(environment),
        start_break=int(random.choice(np.array([0, BREAK, (1 << 64) - 4096], np.uint64))),
        heap_limit=int(random.choice([1 << 17, 2 << 20])),
        events=events,
    )


def outcome(case: Case, compiled: bool) -> list[object]:
    """Everything that can be seen of a replay, with the invariants checked along the way."""
    replay = Replay(
        profile_for(case.version), case.settings, case.start_break, compiled=compiled, heap_limit=case.heap_limit
    )
    count = len(case.events)
    step = max(1, count // 6)
    seen: list[object] = []
    for first in range(0, count, step):
        series = replay.feed(case.events.take(slice(first, first + step)))
        replay.check()
        columns = [getattr(series, name).tolist() for name in series.__slots__]
        assert all(min(column) >= 0 for column in columns)
        seen += columns
    live = replay.live()
    assert series.live_blocks[-1] == len(live)
    assert sum(replay.agreement.reasons.values()) == replay.agreement.forced
    return [*seen, replay.agreement, live.address.tolist(), live.requested.tolist(), replay.break_address]


@pytest.mark.parametrize("first", range(FIRST, LAST, 100))
def test_seeded_nonsense_breaks_no_invariant_and_both_engines_make_the_same_of_it(first: int) -> None:
    for seed in range(first, min(first + 100, LAST)):
        outcomes = [outcome(case(seed), compiled) for compiled in ENGINES]
        assert all(found == outcomes[0] for found in outcomes), f"seed {seed}"
