"""The compiled drain: made-up programs, packed into rings as spool.h draws them, come out event by event."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import ring_reader as rings
from test_spool import plain, slot

from heapledger.store.blocks import Block
from heapledger.store.events import COLUMNS, Events, Kind
from heapledger.store.reader import Trace
from heapledger.store.writer import TraceWriter
from heapledger.tracer import spool
from heapledger.tracer._drain import Drain, Token

MASK40 = (1 << 40) - 1


def page(fields: dict[str, tuple[int, int, bool]], magic: bytes, **values: int) -> bytearray:
    data = bytearray(spool.PAGE)
    data[:8] = magic
    for name, value in values.items():
        offset, size, _ = fields[name]
        data[offset : offset + size] = value.to_bytes(size, "little")
    return data


class Rings:
    """An image's folder made by hand: a control page, and rings that slots are appended to as their owners do."""

    def __init__(self, folder: Path, capacities: list[int]) -> None:
        self.folder = folder
        folder.mkdir()
        control = page(
            spool.CONTROL_FIELDS, spool.MAGIC_CONTROL, version=1, rings=len(capacities), seq=1, nodes=1000, state=1
        )
        (folder / "control").write_bytes(control)
        for index, capacity in enumerate(capacities):
            head = page(
                spool.RING_FIELDS,
                spool.MAGIC_RING,
                index=index,
                capacity=capacity,
                generation=1,
                state=1,
                thread=index,
                tid=100 + index,
            )
            (folder / f"ring.{index}").write_bytes(head + bytes(capacity * spool.SLOT_BYTES))
        self.control = spool.Control(folder)
        self.rings = [rings.Ring(folder / f"ring.{index}") for index in range(len(capacities))]

    def room(self, index: int) -> int:
        ring = self.rings[index]
        return ring.capacity - (ring.get("head") - ring.get("tail"))

    def append(self, index: int, words: list[bytes]) -> int:
        """Slots with the lap that their place wants; returns the position of the first."""
        ring = self.rings[index]
        first = ring.get("head")
        assert len(words) <= self.room(index)
        for position, data in enumerate(words, first):
            w = np.frombuffer(data, "<u8").copy()
            odd = position // ring.capacity & 1
            w[0] = (w[0] & ~np.uint64(0x80)) | np.uint64(0 if odd else 0x80)
            ring.slots[position % ring.capacity] = w
        ring.set("head", first + len(words))
        return first

    def write(self, index: int, position: int, data: bytes) -> None:
        """A slot that was reserved before."""
        ring = self.rings[index]
        w = np.frombuffer(data, "<u8").copy()
        odd = position // ring.capacity & 1
        w[0] = (w[0] & ~np.uint64(0x80)) | np.uint64(0 if odd else 0x80)
        ring.slots[position % ring.capacity] = w


@dataclass
class Drained:
    """A drain and the trace that its blocks go to."""

    rings: Rings
    path: Path
    blocks: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer = TraceWriter(self.path, source="test", command=[])
        self.process_id = self.writer.add_process(pid=1)
        self.drain = Drain(self.rings.folder)
        self.drain.set_clock(0, 0, 1.0, 0.0)

    def finish(self, *, commit: bool = True) -> None:
        if self.drain.pending:
            *fields, token = self.drain.finish()
            self.blocks.append(fields[0])
            self.writer.append_block(self.process_id, Block(*fields))
            if commit:
                token.commit()
            else:
                self.tokens.append(token)

    def run(self, now_ns: int = 0, *, final: bool = False, cut: bool = True, commit: bool = True) -> None:
        while self.drain.run(now_ns, final):
            self.finish(commit=commit)
        if cut:
            self.finish(commit=commit)

    def events(self) -> Events:
        self.writer.close(0)
        with Trace(self.path) as trace:
            return Events.concat(list(trace.events(self.process_id)))


def rows(events: Events) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(events, name).tolist() for name in COLUMNS), strict=True))


@dataclass
class Program:
    """Threads that call, nest calls in handlers, return in any order; what each call was is kept as the oracle."""

    rings: Rings
    rng: random.Random
    seq: int = 1
    tick: int = 1 << 40
    known: dict[int, list[int]] = field(default_factory=dict)

    def number(self) -> int:
        self.seq += 1
        self.rings.control.set("seq", self.seq)
        return self.seq - 1

    def begin(self, thread: int) -> None:
        self.rings.append(thread, [plain(spool.KIND_TIME, self.tick, self.seq, thread)])

    def call(self, thread: int, depth: int = 0) -> None:
        """A call, perhaps with a handler's calls between the reservation of its slots and its number, and inside."""
        rng = self.rng
        self.tick += rng.choice([0, 0, 1, 5, 1000])
        kind = rng.choice([Kind.MALLOC] * 6 + [Kind.FREE] * 6 + [Kind.REALLOC, Kind.CALLOC, Kind.MMAP, Kind.DLOPEN])
        exts = {Kind.REALLOC: 1, Kind.MMAP: 2, Kind.DLOPEN: 1}.get(kind, 0)
        # Reserved, not written: the lap bit of what was there before, so that nobody takes it for written.
        ring = self.rings.rings[thread]
        first = ring.get("head")
        ring.set("head", first + 1 + exts)
        tick = self.tick
        if depth < 2 and rng.random() < 0.05:
            self.call(thread, depth + 1)
        seq = self.number()
        address, size, stack = rng.randrange(1 << 47) & ~15, rng.choice([24, 100, (1 << 50) + 3]), rng.randrange(900)
        size = size if exts else size & 0xFFFF
        arg, arg2 = (rng.randrange(1 << 64), rng.randrange(1 << 64)) if exts else (0, 0)
        word = rng.randrange(1 << 40) if exts == 2 else 0
        if depth < 2 and rng.random() < 0.05:
            self.call(thread, depth + 1)
        span = self.number() - seq
        late = kind == Kind.MALLOC and rng.random() < 0.05
        if late:
            word = rng.randrange(1 << 60)
            self.rings.append(thread, [plain(spool.KIND_LATE, word, seq + span, seq)])
        elif kind in (Kind.MALLOC, Kind.REALLOC, Kind.CALLOC):
            word = max(32, (size + 23) & ~15) + 1
        if kind == Kind.CALLOC:
            arg = 7
        for i in range(exts):
            data = plain(spool.KIND_EXT, *((arg, arg2, size) if i == 0 else (word, 0, 0)), more=i + 1 < exts)
            self.rings.write(thread, first + 1 + i, data)
        if kind == Kind.FREE:
            size, shown, word = 0, 0x61, 0x61
        else:
            shown = size if size < spool.SIZE_EXT else spool.SIZE_EXT
        own = slot(
            kind,
            more=exts > 0,
            span=span,
            stack=stack,
            addr=address,
            excess=spool.EXCESS_LATE if late else int(kind in (Kind.MALLOC, Kind.REALLOC, Kind.CALLOC)),
            size=shown,
            aux=arg if kind == Kind.CALLOC else 0,
            seq=seq & MASK40,
            tick=tick,
        )
        self.rings.write(thread, first, own)
        row = {
            "kind": int(kind),
            "thread": thread,
            "time": tick,
            "seq": seq,
            "seq_exit": seq + span,
            "addr": address,
            "size": size,
            "arg": arg,
            "arg2": arg2,
            "word": word,
            "stack": stack,
        }
        self.known[seq] = [row[name] for name in COLUMNS]


@pytest.mark.parametrize("seed", range(8))
def test_what_threads_and_handlers_did_comes_out_in_order(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    threads = rng.choice([1, 1, 2, 3, 8])
    rings = Rings(tmp_path / "1.0", [rng.choice([64, 256]) for _ in range(threads)])
    program, drained = Program(rings, rng), Drained(rings, tmp_path / "trace")
    for thread in range(threads):
        program.begin(thread)
    for _ in range(1500):
        thread = rng.randrange(threads)
        if rings.room(thread) > 40:
            program.call(thread)
        if rng.random() < 0.02 or any(rings.room(i) <= 40 for i in range(threads)):
            drained.run()
    drained.run(final=True)
    totals = drained.drain.totals()
    assert (totals["damaged"], totals["events"]) == (0, len(program.known))
    assert rows(drained.events()) == [tuple(program.known[seq]) for seq in sorted(program.known)]


def one_ring(tmp_path: Path, capacity: int = 64) -> tuple[Rings, Drained]:
    rings = Rings(tmp_path / "1.0", [capacity])
    rings.append(0, [plain(spool.KIND_TIME, 1 << 30, 1, 0)])
    return rings, Drained(rings, tmp_path / "trace")


def frees(first: int, count: int) -> list[bytes]:
    return [slot(Kind.FREE, addr=16 * seq, seq=seq, tick=1 << 30) for seq in range(first, first + 2 * count, 2)]


def test_slots_go_back_when_their_block_is_committed_and_not_before(tmp_path: Path) -> None:
    rings, drained = one_ring(tmp_path)
    rings.append(0, frees(1, 10))
    rings.control.set("seq", 21)
    drained.run(commit=False)
    assert drained.blocks == [10]
    assert rings.rings[0].get("tail") == 0
    drained.tokens[0].commit()
    assert rings.rings[0].get("tail") == 11


def test_another_drain_goes_on_at_the_tail(tmp_path: Path) -> None:
    """Numbers and ticks beyond their short fields, and the thread, are known from the ring's mark."""
    rings, drained = one_ring(tmp_path)
    base = 5 << 40
    rings.append(0, [plain(spool.KIND_TIME, 7 << 40, base, 9)])
    rings.append(0, [slot(Kind.FREE, addr=16, seq=1, tick=3), slot(Kind.FREE, addr=32, seq=3, tick=4)])
    rings.control.set("seq", base + 5)
    drained.run()
    rings.append(0, [slot(Kind.FREE, addr=48, seq=5, tick=6)])
    rings.control.set("seq", base + 7)
    drained.drain = Drain(rings.folder, written=base + 3)
    drained.drain.set_clock(0, 0, 1.0, 0.0)
    drained.run(final=True)
    events = drained.events()
    assert events.seq.tolist() == [base + 1, base + 3, base + 5]
    assert events.time.tolist() == [(7 << 40) + 3, (7 << 40) + 4, (7 << 40) + 6]
    assert events.thread.tolist() == [9, 9, 9]


def test_events_that_are_in_the_file_already_are_skipped(tmp_path: Path) -> None:
    rings, drained = one_ring(tmp_path)
    rings.append(0, frees(1, 10))
    rings.control.set("seq", 21)
    drained.drain = Drain(rings.folder, written=9)
    drained.drain.set_clock(0, 0, 1.0, 0.0)
    drained.run(final=True)
    assert drained.events().seq.tolist() == [11, 13, 15, 17, 19]
    assert drained.drain.totals()["damaged"] == 0


def test_a_number_that_is_not_handed_out_yet_waits(tmp_path: Path) -> None:
    """control.seq is the barrier: another ring may still bring a smaller number."""
    rings, drained = one_ring(tmp_path)
    rings.append(0, frees(1, 3))
    rings.control.set("seq", 4)
    drained.run()
    assert drained.blocks == [2]
    rings.control.set("seq", 7)
    drained.run()
    assert drained.events().seq.tolist() == [1, 3, 5]


def test_a_call_in_progress_holds_back_what_other_threads_did_later(tmp_path: Path) -> None:
    rings = Rings(tmp_path / "1.0", [64, 64])
    drained = Drained(rings, tmp_path / "trace")
    for index in range(2):
        rings.append(index, [plain(spool.KIND_TIME, 1 << 30, 1, index)])
    rings.append(0, [slot(Kind.MALLOC, done=False, span=0, size=64, seq=3, tick=1 << 30)])
    rings.append(1, frees(1, 1) + frees(5, 2))
    rings.control.set("seq", 9)
    drained.run()
    assert drained.blocks == [1]
    drained.run(10**12)
    assert drained.blocks == [1], "nothing is behind it: it may wait for ever"
    rings.write(0, 1, slot(Kind.MALLOC, addr=0x1000, size=64, excess=1, seq=3, span=1, tick=1 << 30))
    drained.run(10**12)
    events = drained.events()
    assert events.seq.tolist() == [1, 3, 5, 7]
    assert (events.seq_exit[1], events.addr[1], events.word[1]) == (4, 0x1000, 0x51)


def test_a_call_in_progress_is_taken_open_after_a_while_and_its_slot_is_kept(tmp_path: Path) -> None:
    rings, drained = one_ring(tmp_path)
    rings.append(0, [slot(Kind.MALLOC, done=False, span=0, size=64, seq=1, stack=3, tick=1 << 30), *frees(3, 2)])
    rings.control.set("seq", 7)
    drained.run(0)
    drained.run(50_000_000)
    assert drained.blocks == []
    drained.run(200_000_000)
    assert drained.blocks == [3]
    assert rings.rings[0].get("tail") == 1, "its owner will still write to the slot"
    rings.rings[0].slots[1, 0] |= np.uint64(1 << 8)
    drained.run(300_000_000)
    assert rings.rings[0].get("tail") == 4
    events = drained.events()
    assert (events.seq_exit.tolist(), events.stack.tolist(), events.addr[0]) == ([0, 4, 6], [3, 0, 0], 0)


def test_a_crowded_ring_does_not_wait_for_another_ones_call(tmp_path: Path) -> None:
    """Nothing lies behind the call; but a ring that fills up meanwhile must be emptied."""
    rings = Rings(tmp_path / "1.0", [64, 64])
    drained = Drained(rings, tmp_path / "trace")
    for index in range(2):
        rings.append(index, [plain(spool.KIND_TIME, 1 << 30, 1, index)])
    rings.append(0, [slot(Kind.MALLOC, done=False, span=0, size=64, seq=1, tick=1 << 30)])
    rings.append(1, frees(3, 40))
    rings.control.set("seq", 83)
    drained.run(0)
    drained.run(50_000_000)
    assert drained.events().seq.tolist() == [1, *range(3, 83, 2)]


def test_a_dead_process_leaves_nothing_behind(tmp_path: Path) -> None:
    rings, drained = one_ring(tmp_path)
    opened = slot(Kind.REALLOC, done=False, more=True, span=0, size=64, seq=7, tick=1 << 30)
    rings.append(0, [opened, plain(spool.KIND_EXT, 0xAA0, 0x31, 0)])
    rings.rings[0].set("head", 4)  # slot 3 was reserved and never written
    rings.append(0, [slot(Kind.FREE, addr=16, seq=9, tick=1 << 30)])
    rings.control.set("seq", 11)
    drained.run(final=True)
    assert drained.drain.totals()["damaged"] == 1
    events = drained.events()
    assert events.seq.tolist() == [7, 9]
    assert (events.seq_exit[0], events.arg[0], events.addr[0]) == (0, 0xAA0, 0)


@pytest.mark.parametrize("arguments", [[], [plain(spool.KIND_EXT, 0xAA0, 0x31, 0)]])
def test_a_call_that_the_end_cut_off_before_it_was_made_is_no_damage(tmp_path: Path, arguments: list[bytes]) -> None:
    """Its slots are reserved, its number is taken, perhaps its HL_EXT slot is written: its own never was."""
    rings, drained = one_ring(tmp_path)
    rings.append(0, frees(1, 2))
    rings.rings[0].set("head", 4)
    rings.append(0, arguments)
    rings.control.set("seq", 6)
    drained.run(10**12)
    assert drained.events().seq.tolist() == [1, 3], "while it lives it may still be written"
    drained.run(final=True)
    totals = drained.drain.totals()
    assert (totals["events"], totals["damaged"], totals["unmade"]) == (2, 0, 1)


def test_a_ring_holds_several_threads_one_after_another(tmp_path: Path) -> None:
    rings, drained = one_ring(tmp_path)
    rings.append(0, frees(1, 2))
    rings.append(0, [plain(spool.KIND_TIME, 1 << 30, 5, 3), *frees(5, 2)])
    rings.rings[0].set("thread", 3)
    rings.rings[0].set("generation", 2)
    rings.control.set("seq", 9)
    drained.run()
    assert drained.events().thread.tolist() == [0, 0, 3, 3]


def test_full_blocks_are_cut_where_they_are_full(tmp_path: Path) -> None:
    rings, drained = one_ring(tmp_path, 1 << 18)
    count = 70_000
    body = np.zeros((count, 4), np.uint64)
    body[:, 0] = 1 << 9 | 1 << 8 | 1 << 7 | Kind.FREE
    body[:, 1] = 16
    body[:, 3] = (np.uint64(1 << 30 & 0xFFFFFF) << np.uint64(40)) + np.arange(1, 2 * count, 2, dtype=np.uint64)
    rings.rings[0].slots[1 : count + 1] = body
    rings.rings[0].set("head", count + 1)
    rings.control.set("seq", 2 * count + 1)
    drained.run(commit=False)
    assert drained.blocks == [65536, count - 65536]
    drained.tokens[0].commit()
    assert rings.rings[0].get("tail") == 65537
    assert np.array_equal(drained.events().seq, np.arange(1, 2 * count, 2))


@pytest.mark.parametrize("seed", range(15))
def test_noise_ends_in_figures(tmp_path: Path, seed: int) -> None:
    rings = Rings(tmp_path / "1.0", [64, 64])
    drained = Drained(rings, tmp_path / "trace")
    rng = np.random.default_rng(seed)
    for ring in rings.rings:
        ring.slots[:] = rng.integers(0, 1 << 63, (64, 4), np.uint64)
        ring.slots[:, 0] |= np.uint64(0x180)
        ring.slots[:, 3] &= np.uint64(0xFFFF_FF00_0000_00FF)
        ring.set("head", int(rng.integers(1 << 62)) if seed % 3 == 0 else 64)
        ring.set("tail", int(rng.integers(1 << 62)) if seed % 5 == 0 else 0)
    rings.control.set("seq", 300)
    drained.run(final=True)
    events = drained.events()
    assert np.all(events.seq[1:] > events.seq[:-1])
    assert not len(events) or int(events.seq[-1]) < 300
    assert int(events.stack.max(initial=0)) < 1000


@pytest.mark.parametrize("capacity", [0, 24, 1 << 30])
def test_a_ring_that_claims_an_impossible_size_is_named(tmp_path: Path, capacity: int) -> None:
    rings = Rings(tmp_path / "1.0", [64])
    rings.rings[0].set("capacity", capacity)
    drained = Drained(rings, tmp_path / "trace")
    drained.run(final=True)
    assert drained.drain.bad_rings() == [(0, "it claims an impossible number of slots")]
