"""Slots that are copied to files beside the trace when encoding is behind: room is made, order and count stay."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from test_drain import Drained, Program, Rings, frees, one_ring, rows
from test_spool import plain, slot

from heapledger.store.events import Kind
from heapledger.tracer import spool
from heapledger.tracer._drain import Drain
from heapledger.tracer.spill import Spill, folder_of

NO_LIMIT = 1 << 40


def segments(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "spill").iterdir())


@pytest.fixture
def ring(tmp_path: Path) -> tuple[Rings, Drained]:
    rings, drained = one_ring(tmp_path)
    (tmp_path / "spill").mkdir()
    drained.drain.set_spill(tmp_path / "spill" / "1.0")
    return rings, drained


def test_a_copy_makes_room_and_nothing_is_missing_or_out_of_order(ring: tuple[Rings, Drained], tmp_path: Path) -> None:
    rings, drained = ring
    seq = 1
    for _ in range(4):
        rings.append(0, frees(seq, 50))
        seq += 100
        rings.control.set("seq", seq)
        assert drained.drain.spill(0.5, NO_LIMIT)
        assert rings.room(0) == 64
    assert len(segments(tmp_path)) == 4
    drained.run()
    assert drained.drain.totals()["spilled_bytes"] == 201 * spool.SLOT_BYTES
    assert drained.events().seq.tolist() == list(range(1, 401, 2))


def test_a_file_goes_when_all_of_it_is_committed(ring: tuple[Rings, Drained], tmp_path: Path) -> None:
    rings, drained = ring
    rings.append(0, frees(1, 50))
    rings.control.set("seq", 101)
    drained.drain.spill(0.5, NO_LIMIT)
    drained.run(commit=False)
    drained.run(commit=False)
    assert len(segments(tmp_path)) == 1
    drained.tokens[0].commit()
    drained.run()
    assert segments(tmp_path) == []
    rings.append(0, frees(101, 50))
    rings.control.set("seq", 201)
    drained.run()
    assert rings.rings[0].get("tail") == 101
    assert drained.events().seq.tolist() == list(range(1, 201, 2))


def test_a_block_that_began_before_the_copy_is_not_read_again(ring: tuple[Rings, Drained]) -> None:
    rings, drained = ring
    rings.append(0, frees(1, 50))
    rings.control.set("seq", 101)
    drained.run(cut=False)
    drained.drain.spill(0.5, NO_LIMIT)
    rings.append(0, frees(101, 50))
    rings.control.set("seq", 201)
    drained.run()
    assert drained.events().seq.tolist() == list(range(1, 201, 2))


def test_a_call_in_progress_is_not_copied(ring: tuple[Rings, Drained]) -> None:
    """Its owner will write to the ring."""
    rings, drained = ring
    rings.append(0, frees(1, 40))
    at = rings.append(0, [slot(Kind.MALLOC, done=False, span=0, size=64, seq=81, tick=1 << 30)])
    rings.append(0, frees(83, 5))
    rings.control.set("seq", 93)
    assert drained.drain.spill(0.5, NO_LIMIT)
    assert rings.rings[0].get("tail") == at
    rings.write(0, at, slot(Kind.MALLOC, addr=0x1000, size=64, excess=1, seq=81, span=1, tick=1 << 30))
    drained.run()
    events = drained.events()
    assert (events.seq[40], events.addr[40]) == (81, 0x1000)
    assert len(events) == 46


def test_an_event_and_its_extension_stay_together(ring: tuple[Rings, Drained]) -> None:
    rings, drained = ring
    rings.append(0, frees(1, 40))
    rings.append(0, [slot(Kind.REALLOC, more=True, addr=0x1000, size=100, excess=1, seq=81, tick=1 << 30)])
    rings.rings[0].set("head", rings.rings[0].get("head") + 1)  # its extension is not written yet
    rings.control.set("seq", 83)
    drained.drain.spill(0.5, NO_LIMIT)
    assert rings.rings[0].get("tail") == 41
    rings.write(0, 42, plain(spool.KIND_EXT, 0xDEAD0, 0x41, 0))
    drained.run()
    assert drained.events().arg.tolist()[-1] == 0xDEAD0


def test_the_limit_holds(ring: tuple[Rings, Drained], tmp_path: Path) -> None:
    rings, drained = ring
    rings.append(0, frees(1, 50))
    rings.control.set("seq", 101)
    assert not drained.drain.spill(0.5, 2000)
    assert (segments(tmp_path), rings.rings[0].get("tail")) == ([], 0)
    assert not drained.drain.spill(0.9, NO_LIMIT), "it is not as full as that"


def test_a_place_that_cannot_be_written_to_is_no_harm(ring: tuple[Rings, Drained], tmp_path: Path) -> None:
    rings, drained = ring
    shutil.rmtree(tmp_path / "spill")
    rings.append(0, frees(1, 50))
    rings.control.set("seq", 101)
    assert not drained.drain.spill(0.5, NO_LIMIT)
    drained.run()
    assert len(drained.events()) == 50


def test_what_a_collector_left_is_read_by_the_next(ring: tuple[Rings, Drained], tmp_path: Path) -> None:
    """Some of the copied slots are in the trace file already, some are not, more lie in the ring."""
    rings, drained = ring
    rings.append(0, frees(1, 20))
    rings.control.set("seq", 41)
    drained.run()
    for first in (41, 141):
        rings.append(0, frees(first, 50))
        rings.control.set("seq", first + 100)
        drained.drain.spill(0.5, NO_LIMIT)
    rings.append(0, frees(241, 10))
    rings.control.set("seq", 261)
    drained.drain = Drain(rings.folder, written=39)
    drained.drain.set_clock(0, 0, 1.0, 0.0)
    kept = Spill(tmp_path / "spill").files_of("1.0")
    assert [path.name for path in kept] == ["1.0.0.15", "1.0.0.47"]
    assert all(drained.drain.add_segment(path) for path in kept)
    drained.run(final=True)
    assert drained.events().seq.tolist() == list(range(1, 261, 2))
    assert drained.drain.totals()["damaged"] == 0


@pytest.mark.parametrize("cut", [0, 5000, 4100])
def test_a_damaged_file_is_left_out(ring: tuple[Rings, Drained], tmp_path: Path, cut: int) -> None:
    rings, drained = ring
    rings.append(0, frees(1, 50))
    rings.control.set("seq", 101)
    drained.drain.spill(0.5, NO_LIMIT)
    (path,) = segments(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:cut] if cut else b"x" * len(data))
    rings.append(0, frees(101, 50))  # over what was copied
    rings.control.set("seq", 201)
    drained.drain = Drain(rings.folder)
    drained.drain.set_clock(0, 0, 1.0, 0.0)
    assert not drained.drain.add_segment(path)
    drained.run(final=True)
    assert drained.events().seq.tolist() == list(range(101, 201, 2))


@pytest.mark.parametrize("seed", range(6))
def test_threads_and_handlers_come_out_in_order_however_slots_are_copied(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    threads = rng.choice([1, 2, 4])
    rings = Rings(tmp_path / "1.0", [rng.choice([64, 256]) for _ in range(threads)])
    program, drained = Program(rings, rng), Drained(rings, tmp_path / "trace")
    (tmp_path / "spill").mkdir()
    drained.drain.set_spill(tmp_path / "spill" / "1.0")
    for thread in range(threads):
        program.begin(thread)
    for _ in range(1500):
        thread = rng.randrange(threads)
        if rings.room(thread) > 40:
            program.call(thread)
        if rng.random() < 0.05:
            drained.drain.spill(rng.choice([0.2, 0.5]), NO_LIMIT)
        if rng.random() < 0.01 or all(rings.room(i) <= 40 for i in range(threads)):
            drained.run(cut=rng.random() < 0.5, commit=True)
        if any(rings.room(i) <= 40 for i in range(threads)):
            drained.drain.spill(0.2, NO_LIMIT)
            drained.run()
    drained.run(final=True)
    totals = drained.drain.totals()
    assert (totals["damaged"], totals["events"]) == (0, len(program.known))
    assert totals["spilled_bytes"] > 0
    assert rows(drained.events()) == [tuple(program.known[seq]) for seq in sorted(program.known)]


def test_the_folder_is_beside_the_trace_and_goes_with_the_session(tmp_path: Path) -> None:
    spill = Spill(folder_of(tmp_path / "t.heapledger", Path("/dev/shm/heapledger-abc")), 1000)
    assert spill.left("1.0", 0) == 1000
    assert spill.folder == tmp_path / "t.heapledger.spill-heapledger-abc"
    assert (spill.left("2.0", 300), spill.left("1.0", 200)) == (1000, 700)
    assert spill.left("2.0", 300) == 800
    (spill.folder / "1.0.0.a").touch()
    (spill.folder / "1.0.0.b.new").touch()
    spill.forget("1.0")
    spill.remove()
    assert not spill.folder.exists()
