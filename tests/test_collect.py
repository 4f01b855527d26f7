"""The collector over spools that real programs recorded: nothing is lost unseen, damage is counted, order holds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ring_reader as rings

from heapledger import _preload
from heapledger.store.events import Events, Kind
from heapledger.store.reader import Trace
from heapledger.store.schema import Process
from heapledger.tracer import spool
from heapledger.tracer.clock import Clock, pair
from heapledger.tracer.recover import recover

Native = Callable[..., Path]


@pytest.fixture
def record(tmp_path: Path, native: Native) -> Callable[..., Path]:
    """`record("blocks", 50)` runs the program of known calls under the shim alone and gives its spool."""
    program = native("run_known.c", "-pthread")
    folder = tmp_path / "spool"

    def run(mode: str, number: int, *, slots: int = 32768) -> Path:
        folder.mkdir()
        options = f"hold_ms=0,quiet=1,ring_slots={slots}"
        variables = {"HEAPLEDGER_SPOOL": str(folder), "HEAPLEDGER_OPTIONS": options, "LD_PRELOAD": str(_preload.path())}
        subprocess.run(
            [program, mode, str(number)], env={**os.environ, **variables}, check=True, stdout=subprocess.DEVNULL
        )
        return folder

    return run


def collected(folder: Path, trace: Path) -> tuple[Process, Events]:
    recover(folder, trace, symbols=False, keep=True)
    with Trace(trace) as opened:
        process = opened.process()
        return process, Events.concat(list(opened.events(process.id)))


def image_of(folder: Path) -> Path:
    (control,) = folder.glob("*/control")
    return control.parent


def first_ring(folder: Path) -> rings.Ring:
    return rings.Ring(image_of(folder) / "ring.0")


def slot_of(ring: rings.Ring, size: int) -> int:
    """Where the malloc of `size` lies."""
    kinds = ring.slots[:, 0] & np.uint64(63)
    sizes = ring.slots[:, 2] & np.uint64(spool.SIZE_EXT)
    return int(np.flatnonzero((kinds == Kind.MALLOC) & (sizes == size))[0])


def test_a_whole_spool_loses_nothing(record: Callable[..., Path], tmp_path: Path) -> None:
    process, events = collected(record("blocks", 200), tmp_path / "t")
    assert (process.lost, process.notes, process.end, process.exit_status) == (0, [], "exit", 0)
    assert np.count_nonzero((events.size >= 1000) & (events.size < 1200) & (events.kind == Kind.MALLOC)) == 200
    assert process.libc_version == os.confstr("CS_GNU_LIBC_VERSION").split()[1]  # type: ignore[union-attr]
    assert os.path.basename(process.libc_path) == "libc.so.6"
    assert len(process.libc_build_id) >= 16
    assert process.start_break > 0
    assert process.self_low < process.self_high


def test_a_slot_that_was_wiped_is_one_lost_event(record: Callable[..., Path], tmp_path: Path) -> None:
    folder = record("blocks", 200)
    ring = first_ring(folder)
    ring.slots[slot_of(ring, 1100)] = 0
    process, events = collected(folder, tmp_path / "t")
    assert 1 <= process.lost <= 2
    assert any("damaged" in note for note in process.notes)
    sizes = set(events.size[events.kind == Kind.MALLOC].tolist())
    assert {1099, 1101} <= sizes
    assert 1100 not in sizes


def test_events_the_shim_could_not_record_are_counted(record: Callable[..., Path], tmp_path: Path) -> None:
    folder = record("blocks", 20)
    control = spool.Control(image_of(folder))
    control.set("lost", 17)
    assert collected(folder, tmp_path / "t")[0].lost == 17


def test_sequence_numbers_that_nobody_wrote_down_are_lost_events(record: Callable[..., Path], tmp_path: Path) -> None:
    folder = record("blocks", 20)
    control = spool.Control(image_of(folder))
    control.set("seq", control.get("seq") + 10)
    assert collected(folder, tmp_path / "t")[0].lost == 5


def test_a_stack_that_does_not_exist_is_dropped_and_counted(record: Callable[..., Path], tmp_path: Path) -> None:
    folder = record("blocks", 200)
    ring = first_ring(folder)
    at = slot_of(ring, 1100)
    ring.slots[at, 0] = (ring.slots[at, 0] & np.uint64(0xFFFFFFFF)) | np.uint64(0x7FFFFFFF << 32)
    process, events = collected(folder, tmp_path / "t")
    assert events.stack[(events.size == 1100) & (events.kind == Kind.MALLOC)].tolist() == [0]
    assert any("damaged" in note for note in process.notes)


def test_a_number_used_twice_is_taken_once(record: Callable[..., Path], tmp_path: Path) -> None:
    folder = record("blocks", 200)
    ring = first_ring(folder)
    ring.slots[slot_of(ring, 1100), 3] = ring.slots[slot_of(ring, 1050), 3]
    process, events = collected(folder, tmp_path / "t")
    assert np.all(events.seq[1:] > events.seq[:-1])
    assert process.lost > 0


def test_rings_of_many_threads_are_one_ordered_stream(
    record: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in small portions: what one ring has must wait for what the others still hold."""
    monkeypatch.setattr(spool, "MAX_READ", 1000)
    process, events = collected(record("threads", 3, slots=1 << 17), tmp_path / "t")
    assert process.lost == 0
    assert len(np.unique(events.thread)) == 7
    live: set[int] = set()
    for kind, address in zip(events.kind.tolist(), events.addr.tolist(), strict=True):
        if kind == Kind.FREE and address:
            live.remove(address)
        elif kind in (Kind.MALLOC, Kind.CALLOC):
            assert address not in live
            live.add(address)


def test_a_spool_full_of_noise_ends_in_figures(record: Callable[..., Path], tmp_path: Path) -> None:
    folder = record("blocks", 500)
    ring = first_ring(folder)
    rng = np.random.default_rng(3)
    for _ in range(200):
        ring.slots[int(rng.integers(ring.get("head"))), int(rng.integers(4))] = rng.integers(1 << 63)
    process, events = collected(folder, tmp_path / "t")
    assert process.lost > 50
    assert len(events) == process.events
    assert np.all(events.seq[1:] > events.seq[:-1])


def test_ticks_become_the_time_of_the_monotonic_clock() -> None:
    first = pair()
    assert first is not None
    clock = Clock(start_ns=first[0], start_tsc=first[1], tick_shift=8, session_ns=first[0] - 1000)
    while (later := pair() or first)[0] - first[0] < 50_000_000:
        pass
    times = clock.times(np.array([first[1] >> 8, later[1] >> 8], np.uint64)).astype(np.int64)
    assert abs(int(times[1]) - (later[0] - first[0] + 1000)) < 20_000
    assert abs(int(times[0]) - 1000) < 2_000
    assert abs((clock.tick_at(later[0]) << 8) - later[1]) < 100_000
