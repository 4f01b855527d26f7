"""The malloc model against real libcs: every address, the final break, and the system calls that strace saw."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from glibc_oracle import ENGINES, SYSTEM, Log, command, read_log, run_randops, system_version

from heapledger.analyzer.glibc import ChunkState, Settings, profile_for
from heapledger.analyzer.replay import Replay, Syscall
from heapledger.store.events import Kind

VERSIONS = (SYSTEM, "2.27", "2.31", "2.41")
MALLOPT, SBRK, TRIM, MANY, NASTY = 1, 2, 4, 8, 16


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("glibc")


def assert_exact(log: Log, settings: Settings, compiled: bool) -> Replay:
    """Replays a log: nothing forced, every word right, the break where it was."""
    replay = Replay(profile_for(log.version), settings, log.start_break, compiled=compiled)
    replay.feed(log.events)
    agreement = replay.agreement
    assert agreement.forced_examples == []
    assert agreement.exact == agreement.predicted
    assert agreement.word_mismatches == agreement.unknown_frees == agreement.forced == 0
    assert replay.break_address == log.end_break
    replay.check()
    assert_live(log, replay)
    return replay


def assert_live(log: Log, replay: Replay) -> None:
    """What is live at the end, reckoned from the log alone."""
    live: dict[int, int] = {}
    events = log.events
    for kind, addr, size, arg in zip(
        events.kind.tolist(), events.addr.tolist(), events.size.tolist(), events.arg.tolist(), strict=True
    ):
        if kind == Kind.FREE:
            live.pop(addr, None)
        elif kind in (Kind.MALLOC_TRIM, Kind.MALLOPT, Kind.SBRK):
            continue
        else:
            if kind == Kind.REALLOC and (addr or size == 0):
                live.pop(arg, None)
            if addr:
                live[addr] = size
    found = replay.live()
    assert dict(zip(found.address.tolist(), found.requested.tolist(), strict=True)) == live


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("seed", "flags"), [(1, 0), (2, SBRK | TRIM | NASTY)])
def test_a_million_random_calls_are_all_exact(version: str, seed: int, flags: int, folder: Path) -> None:
    # Half of the calls that are counted fill slots that must be freed first: 2 million steps are a million results.
    log = run_randops(version, folder, seed, 1_000_000 if flags else 2_000_000, flags)
    replay = assert_exact(log, Settings(), ENGINES[-1])
    assert replay.agreement.predicted >= (1_000_000 if not flags else 450_000)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("compiled", ENGINES)
@pytest.mark.parametrize("flags", [MALLOPT | TRIM | NASTY, MALLOPT | SBRK | TRIM, MANY | SBRK])
def test_random_calls_are_exact_in_both_engines(version: str, compiled: bool, flags: int, folder: Path) -> None:
    assert_exact(run_randops(version, folder, 40 + flags, 20_000, flags), Settings(), compiled)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "env",
    [
        {"MALLOC_TOP_PAD_": "0", "MALLOC_TRIM_THRESHOLD_": "65536"},
        {"MALLOC_MMAP_THRESHOLD_": "20000", "MALLOC_MMAP_MAX_": "20"},
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"},
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=100:glibc.malloc.tcache_max=200"},
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_unsorted_limit=3:glibc.malloc.mxfast=0"},
        {"GLIBC_TUNABLES": "glibc.malloc.mxfast=160:glibc.malloc.perturb=5"},
    ],
    ids=lambda env: ",".join(env.values()),
)
def test_tunables_are_followed(version: str, env: dict[str, str], folder: Path) -> None:
    log = run_randops(version, folder, 5, 20_000, TRIM, env)
    assert_exact(log, Settings.from_environment(env), ENGINES[-1])


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_first_break_costs_one_adopted_base(version: str, folder: Path) -> None:
    log = run_randops(version, folder, 9, 5_000, 0)
    known = Replay(profile_for(log.version), Settings(), log.start_break, compiled=ENGINES[-1])
    blind = Replay(profile_for(log.version), Settings(), 0, compiled=ENGINES[-1])
    # Alignments beyond a page depend on the address, and are the one thing a wrong first guess may spoil.
    known.feed(log.events)
    blind.feed(log.events)
    assert blind.agreement.forced == 0
    assert blind.agreement.adopted_bases == known.agreement.adopted_bases + 1
    assert blind.chunks().start.tolist() == known.chunks().start.tolist()


@pytest.mark.parametrize("version", VERSIONS)
def test_sums_of_the_series_are_those_of_the_tables(version: str, folder: Path) -> None:
    log = run_randops(version, folder, 11, 20_000, SBRK)
    replay = Replay(profile_for(log.version), Settings(), log.start_break, compiled=ENGINES[-1])
    for part in range(0, len(log.events), 3_001):
        series = replay.feed(log.events.take(slice(part, part + 3_001)))
        table, live, mapped = replay.chunks(), replay.live(), replay.mmapped()
        size = {state: int(table.size[table.state == state].sum()) for state in ChunkState}
        assert series.live_bytes[-1] == live.requested.sum()
        assert series.live_blocks[-1] == len(live)
        assert series.hole_bytes[-1] == size[ChunkState.FREE]
        assert series.cached_bytes[-1] == size[ChunkState.TCACHE] + size[ChunkState.FASTBIN]
        assert series.top_bytes[-1] == size[ChunkState.TOP]
        assert series.heap_bytes[-1] == sum(size.values()) - size[ChunkState.FOREIGN]
        assert series.mmapped_bytes[-1] == mapped.size.sum()
        assert np.array_equal(table.start[1:], (table.start + table.size)[:-1])
        assert int(table.start[0]) == replay.heap_start


_CALL = re.compile(r"^(brk|mmap|munmap|mremap|madvise)\((.*)\)\s+= (\S+)")


def calls_seen(trace: str) -> list[tuple[Syscall, int]]:
    """malloc's system calls out of strace's output: what succeeded after the program first looked at the break."""
    found: list[tuple[Syscall, int]] = []
    break_now = 0
    for line in trace.splitlines():
        match = _CALL.match(line)
        if not match or match[3] == "-1":
            continue
        name, arguments, result = match[1], [a.strip() for a in match[2].split(",")], int(match[3], 16)
        if name == "brk":
            if arguments[0] == "NULL":
                # The loader's own calls come before the program's.
                found.clear()
            elif int(arguments[0], 16) == result:
                found.append((Syscall.BRK, result - break_now))
            break_now = result
        elif name == "mremap":
            found.append((Syscall.MREMAP, int(arguments[2])))
        else:
            found.append((Syscall[name.upper()], int(arguments[1])))
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("flags", [0, TRIM | NASTY, MALLOPT | TRIM])
def test_system_calls_are_those_that_strace_saw(version: str, flags: int, folder: Path, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace")
    trace = tmp_path / "trace"
    target = command(version, folder, 21, 8_000, flags)
    done = subprocess.run(
        ["strace", "-o", str(trace), "-e", "trace=brk,mmap,munmap,mremap,madvise", *target],
        capture_output=True,
    )
    if done.returncode != 0:
        pytest.skip(f"strace cannot trace here: {done.stderr.decode(errors='replace')[:100]}")
    log = read_log(done.stdout, system_version() if version == SYSTEM else version)
    replay = Replay(profile_for(log.version), Settings(), log.start_break, compiled=ENGINES[-1])
    replay.keep_syscalls()
    replay.feed(log.events)
    predicted = [call for call in replay.syscalls() if call[0] != Syscall.BRK_QUERY]
    seen = calls_seen(trace.read_text())
    assert len(seen) > 50
    assert predicted == seen
