"""A sampled capture: an allocation of s bytes is recorded with probability 1 - exp(-s/B), and so is its end."""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from preload_spool import Recorded, Run, Shim, plain, shim, shim_library  # noqa: F401

from heapledger.store.events import ALLOCATOR_KINDS, Events, Kind
from heapledger.store.reader import Trace

NODE = np.dtype([("ip", "<u8"), ("parent", "<u4"), ("module", "<u4")])
ALLOCATIONS = (Kind.MALLOC, Kind.CALLOC, Kind.REALLOC, Kind.MEMALIGN, Kind.VALLOC, Kind.PVALLOC)
#: The longest that the last function of sampled.c's sites is, generously.
NEAR = 100


@pytest.fixture
def program(native: Callable[..., Path]) -> Path:
    return native("sampled.c", "-O1", "-lpthread")


def sampled(shim: Shim, *argv: str | Path, sample: int, more: str = "", env: dict[str, str] | None = None) -> Run:  # noqa: F811
    run = shim.run(*argv, options=f"sample={sample},sample_seed=20{more}", env=env)
    assert run.code == 0, run.stderr
    return run


def births(events: Events) -> Events:
    """Blocks that came to be."""
    return events.take(np.isin(events.kind, ALLOCATIONS) & (events.addr != 0))


def weights(sizes: np.ndarray, sample: int) -> np.ndarray:
    """How many blocks each recorded one stands for."""
    return 1 / -np.expm1(-sizes.astype(float) / sample)


# ---- estimates


@pytest.mark.parametrize("sample", [700, 16384, 1 << 19])
def test_estimates_of_each_site_are_within_four_standard_errors(shim: Shim, program: Path, sample: int) -> None:  # noqa: F811
    run = sampled(shim, program, "sites", sample=sample)
    blocks = births(run.first.events)
    assert run.first.get("sample_bytes") == sample
    sites = np.array(
        [
            [int(word, base) for word, base in zip(line.split(), (10, 10, 16), strict=True)]
            for line in run.stdout.splitlines()
        ]
    )
    callers = np.fromfile(run.first.folder / "stacks.0", NODE)["ip"][blocks.stack].astype(np.int64)
    total, total_estimate, total_variance = 0.0, 0.0, 0.0
    for size, count, start in sites.tolist():
        end = min([other for other in sites[:, 2].tolist() if other > start], default=start + NEAR)
        here = (callers > start) & (callers < end)
        assert (blocks.size[here] == size).all()
        p = -math.expm1(-size / sample)
        estimate, variance = here.sum() / p, count * (1 - p) / p
        assert abs(estimate - count) <= 4 * math.sqrt(variance), (size, count, estimate)
        total += count * size
        total_estimate += estimate * size
        total_variance += variance * size**2
    assert abs(total_estimate - total) <= 4 * math.sqrt(total_variance)
    ours = np.isin(run.first.events.addr, blocks.addr[np.isin(blocks.size, sites[:, 0])])
    frees = run.first.events.take(ours & (run.first.events.kind == Kind.FREE))
    (place,) = set(np.fromfile(run.first.folder / "stacks.0", NODE)["ip"][frees.stack].tolist())  # all by one line
    assert abs(place - int(sites[0, 2])) < 0x10000


def test_estimates_of_a_real_program_agree_with_a_full_capture(shim: Shim) -> None:  # noqa: F811
    source = (
        "import json; [json.loads(json.dumps({str(k): list(range(k % 40)) for k in range(1500)})) for _ in range(8)]"
    )
    env = {"PYTHONMALLOC": "malloc", "PYTHONHASHSEED": "0"}
    truth = births(shim.run("/usr/bin/python3", "-c", source, env=env).first.events).size.astype(float)
    sample = 4096
    run = sampled(shim, "/usr/bin/python3", "-c", source, sample=sample, env=env)
    sizes = births(run.first.events).size
    p = -np.expm1(-truth / sample)
    p[truth == 0] = 1
    error = math.sqrt(float(np.sum(truth**2 * (1 - p) / p)))
    assert error < 0.05 * truth.sum()
    assert abs(float(np.sum(sizes * weights(sizes, sample))) - truth.sum()) <= 4 * error


def test_another_seed_is_another_sample_and_the_same_the_same(shim: Shim, program: Path) -> None:  # noqa: F811
    def sizes(seed: int) -> list[int]:
        run = shim.run(program, "sites", options=f"sample=16384,sample_seed={seed}")
        ours = births(run.first.events).size
        return ours[np.isin(ours, (16, 100, 1000, 7000, 30000, 200000))].tolist()  # type: ignore[no-any-return]

    first = sizes(7)
    assert first == sizes(7)
    assert first != sizes(8)


def test_children_of_a_fork_draw_numbers_of_their_own(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "children", options="sample=4096")
    first, second = (births(child.events).size.tolist() for child in run.children)
    assert len(first) > 100
    assert len(second) > 100
    assert first != second


# ---- what becomes of a sampled block


def check_lives(image: Recorded) -> Counter[str]:
    """Each block that is freed or moved was recorded before and is alive. Gives how often what happened."""
    image.check()
    live: set[int] = set()
    seen: Counter[str] = Counter()
    events = image.of(*ALLOCATOR_KINDS)
    for kind, addr, size, arg in zip(
        *(c.tolist() for c in (events.kind, events.addr, events.size, events.arg)), strict=True
    ):
        failed = kind == Kind.REALLOC and not addr and size
        if kind == Kind.FREE:
            assert arg in (0, 1, 2)
            assert size == 0
            live.remove(addr)
        elif kind == Kind.REALLOC and arg and not failed:
            live.remove(arg)
        if kind != Kind.FREE and addr:
            assert addr not in live
            live.add(addr)
        seen[f"{Kind(kind).name}{' failed' if failed else ' old' if kind == Kind.REALLOC and arg else ''}"] += 1
    return seen


def test_a_block_is_followed_from_birth_to_end_or_not_at_all(shim: Shim, program: Path) -> None:  # noqa: F811
    run = sampled(shim, program, "lives", sample=2000)
    seen = check_lives(run.first)
    events = run.first.events
    begun = events.seq[(events.kind == Kind.MUNMAP) & (events.addr == 0x1000)][0]
    events = events.take(np.isin(events.kind, list(ALLOCATOR_KINDS)) & (events.seq > begun))
    rows = list(zip(*(c.tolist() for c in (events.kind, events.addr, events.size, events.arg)), strict=True))
    at = 0
    followed: set[int] = set()
    passed = newest = 0
    for line in run.stdout.decode().splitlines():
        what, *numbers = line.split()
        old, size, result = (int(n, base) for n, base in zip(numbers, (16, 10, 16), strict=True))
        kind, addr, length, arg = rows[at] if at < len(rows) else (0, 0, 0, 0)
        known = old in followed
        followed.discard(old)
        born = kind in ALLOCATIONS and (addr, length) == (result, size)
        if what == "realloc" and not result:  # far too large: always recorded
            assert (kind, addr, length, arg) == (Kind.REALLOC, 0, size, old if known else 0)
            followed |= {old} if known else set()
        elif born:
            assert arg == (old if what == "realloc" and known else arg if kind == Kind.CALLOC else 0)
            followed.add(result)
        elif known:
            # What ended the block, and whether anything was requested since it was given.
            assert (kind, addr, arg) == (Kind.FREE, old, 0 if what == "realloc" else 1 if old == newest else 2)
        else:
            passed += 1
        newest = result if size else newest
        at += born or known or (what == "realloc" and not result)
    assert at == len(rows)
    assert passed > 3000
    assert {row[3] for row in rows if row[0] == Kind.FREE} == {0, 1, 2}
    assert min(seen[name] for name in ("MALLOC", "CALLOC", "FREE", "REALLOC", "REALLOC old", "REALLOC failed")) > 20


def test_where_nearly_all_is_sampled_each_free_is_found_however_many_live(shim: Shim, program: Path) -> None:  # noqa: F811
    image = sampled(shim, program, "many", "100000", sample=1).first
    seen = check_lives(image)
    assert seen["MALLOC"] >= 100000
    freed = image.of(Kind.FREE)
    born = image.of(Kind.MALLOC)
    ours = set(born.addr[born.size == 64].tolist())
    assert ours <= set(freed.addr.tolist())


def test_threads_that_free_each_others_blocks_agree_on_what_is_sampled(shim: Shim, program: Path) -> None:  # noqa: F811
    run = sampled(shim, program, "threads", sample=2000)
    image = run.first
    image.check()
    events = image.of(*ALLOCATOR_KINDS)
    balance: Counter[int] = Counter()
    for kind, addr, arg in zip(events.kind.tolist(), events.addr.tolist(), events.arg.tolist(), strict=True):
        if kind == Kind.FREE:
            balance[addr] -= 1
        else:
            balance[arg if kind == Kind.REALLOC else 0] -= 1
            balance[addr] += 1
    alive = {addr: count for addr, count in balance.items() if addr and count}
    assert set(alive.values()) <= {1}
    assert len(alive) < 20  # the loader's and libc's own
    assert len(events) > 2000
    assert len(image.of(Kind.THREAD_START)) == 5


def test_mappings_and_forks_are_recorded_as_ever(shim: Shim, program: Path) -> None:  # noqa: F811
    run = sampled(shim, program, "many", "1000", sample=1 << 40)
    assert len(run.first.of(*ALLOCATOR_KINDS)) == 0
    assert len(run.first.of(Kind.MMAP, Kind.MUNMAP)) == 2
    run = sampled(shim, program, "children", sample=1 << 40)
    assert len(run.first.of(Kind.FORK)) == 2


def test_a_sampled_real_program_says_the_same(shim: Shim) -> None:  # noqa: F811
    argv = (
        "/usr/bin/python3",
        "-c",
        "import threading, json, sys; print(len(sys.modules), json.dumps(list(range(999))))",
    )
    expected = plain(*argv)
    run = sampled(shim, *argv, sample=1000)
    assert (run.stdout, run.stderr) == (expected.stdout, expected.stderr)
    check_lives(run.first)


# ---- the command


def test_run_takes_sizes_with_a_unit_and_refuses_others(
    heapledger: Callable[..., subprocess.CompletedProcess[str]], program: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "t.heapledger"
    done = heapledger("run", "-q", "-o", trace, "--sample", "16K", "--sample-seed", "5", "--", program, "sites")
    assert done.returncode == 0, done.stderr
    with Trace(trace) as reader:
        (process,) = reader.processes()
        events = Events.concat(list(reader.events(process.id)))
    sizes = births(events).size
    truth = sum(int(line.split()[0]) * int(line.split()[1]) for line in done.stdout.splitlines())
    assert 0.8 * truth < float(np.sum(sizes * weights(sizes, 16384))) < 1.2 * truth
    for wrong in ("0", "-3", "12Q", "1.5K", "2000G", ""):
        refused = heapledger("run", "--sample", wrong, "--", "true")
        assert refused.returncode == 2
        assert "not a number of bytes" in refused.stderr
