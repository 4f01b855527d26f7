"""The decoder of the spool: against the C header, and against slots packed by hand."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import ring_reader as rings

from heapledger.errors import SpoolError
from heapledger.store.events import Kind
from heapledger.tracer import spool

HEADER = Path(__file__).parent.parent / "preload" / "spool.h"
CAPACITY = 16


def slot(
    kind: int,
    *,
    lap: int = 0,
    done: bool = True,
    more: bool = False,
    span: int = 1,
    stack: int = 0,
    addr: int = 0,
    excess: int = 0,
    size: int = 0,
    aux: int = 0,
    seq: int = 0,
    tick: int = 0,
) -> bytes:
    """A slot as the drawing in spool.h has it. `lap` counts from 0; its bit is 1 in the first."""
    w0 = stack << 32 | span << 9 | done << 8 | (1 - (lap & 1)) << 7 | more << 6 | kind
    return struct.pack("<4Q", w0, excess << 48 | addr & (1 << 48) - 1, aux << 48 | size, (tick & 0xFFFFFF) << 40 | seq)


def plain(kind: int, w1: int = 0, w2: int = 0, w3: int = 0, *, lap: int = 0, more: bool = False) -> bytes:
    """An HL_EXT, HL_LATE or HL_TIME slot."""
    return struct.pack("<4Q", 1 << 8 | (1 - (lap & 1)) << 7 | more << 6 | kind, w1, w2, w3)


def make_ring(folder: Path, slots: dict[int, bytes], head: int, tail: int = 0, capacity: int = CAPACITY) -> rings.Ring:
    """A ring file with slots at the given positions."""
    page = bytearray(spool.PAGE)
    page[:8] = spool.MAGIC_RING
    for name, value in {"capacity": capacity, "head": head, "tail": tail, "generation": 1, "state": 1}.items():
        offset, size, _ = spool.RING_FIELDS[name]
        page[offset : offset + size] = value.to_bytes(size, "little")
    body = bytearray(capacity * spool.SLOT_BYTES)
    for position, data in slots.items():
        at = position % capacity * spool.SLOT_BYTES
        body[at : at + spool.SLOT_BYTES] = data
    path = folder / "ring.0"
    path.write_bytes(page + body)
    return rings.Ring(path)


def time_slot(tick: int = 0x1234567, seq: int = 1, lap: int = 0) -> bytes:
    return plain(spool.KIND_TIME, tick, seq, lap=lap)


def header_numbers(tmp_path: Path) -> dict[str, int]:
    """Every #define, enum value and field offset of the header, as the C compiler sees them."""
    text = HEADER.read_text()
    names = re.findall(r"\b(HL_[A-Z0-9_]+)\b\s*=", text)
    names += [
        "HL_SPAN_LATE",
        "HL_EXCESS_LATE",
        "HL_AUX_EXT",
        "HL_SIZE_EXT",
        "HL_SEGMENT_NODES",
        "HL_PAGE",
        "HL_IP_CUT",
        "HL_IP_LOST",
    ]
    fields = [f"hl_control.{name}" for name in spool.CONTROL_FIELDS] + [f"hl_ring.{name}" for name in spool.RING_FIELDS]
    lines = [f'printf("{name} %llu\\n", (unsigned long long){name});' for name in names]
    for field in fields:
        struct_name, name = field.split(".")
        lines.append(f'printf("{field} %zu\\n", offsetof(struct {struct_name}, {name}));')
        lines.append(f'printf("{field}# %zu\\n", sizeof(((struct {struct_name} *)0)->{name}));')
    source = tmp_path / "numbers.c"
    includes = f'#include <stdio.h>\n#include <stddef.h>\n#include "{HEADER}"\n'
    source.write_text(f"{includes}int main(void) {{ {' '.join(lines)} return 0; }}")
    subprocess.run(["gcc", "-o", tmp_path / "numbers", source], check=True)
    output = subprocess.run([tmp_path / "numbers"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def test_the_numbers_are_those_of_the_c_header(tmp_path: Path) -> None:
    numbers = header_numbers(tmp_path)
    for kind in Kind:
        assert numbers[f"HL_{kind.name}"] == kind
    assert (numbers["HL_TIME"], numbers["HL_LATE"], numbers["HL_EXT"]) == (61, 62, 63)
    states = [numbers[f"HL_{name}"] for name in ("STARTING", "RUNNING", "HOLDING", "ENDED", "STOPPED")]
    assert states == [spool.STARTING, spool.RUNNING, spool.HOLDING, spool.ENDED, spool.STOPPED]
    assert [numbers[f"HL_RING_{n}"] for n in ("FREE", "OWNED", "LEFT")] == [0, 1, 2]
    assert len(spool.STOP_REASONS) == 1 + numbers["HL_STOP_DENIED"]
    for name in ("SPAN_LATE", "EXCESS_LATE", "AUX_EXT", "SIZE_EXT", "SEGMENT_NODES", "PAGE", "IP_CUT", "IP_LOST"):
        assert numbers[f"HL_{name}"] == getattr(spool, name), name
    for struct_name, fields in (("hl_control", spool.CONTROL_FIELDS), ("hl_ring", spool.RING_FIELDS)):
        for name, (offset, size, _) in fields.items():
            assert (numbers[f"{struct_name}.{name}"], numbers[f"{struct_name}.{name}#"]) == (offset, size), name


def test_the_example_of_the_header_decodes_to_what_it_says(tmp_path: Path) -> None:
    drawn = struct.pack("<4Q", 0x0000000700000381, 0x000155D0C0DE02A0, 24, 0x234568 << 40 | 5)
    ring = make_ring(tmp_path, {0: time_slot(), 1: drawn}, head=2)
    events = ring.read(0)
    assert events is not None
    assert (events.kind[0], events.addr[0], events.size[0], events.word[0]) == (1, 0x55D0C0DE02A0, 24, 0x21)
    assert (events.seq[0], events.seq_exit[0], events.stack[0], events.tick[0]) == (5, 6, 7, 0x1234568)
    assert ring.read(0) is None


def test_short_ticks_are_widened_over_wraps_and_time_slots(tmp_path: Path) -> None:
    full = [0x1FFFFF0, 0x2000010, 0x2000010 + 0x7FFFFE, 0x2000010 + 2 * 0x7FFFFE]
    slots = {0: time_slot(full[0] - 3)}
    slots |= {i + 1: slot(Kind.MALLOC, addr=16, seq=2 * i + 1, tick=tick) for i, tick in enumerate(full)}
    far = 0xABCDEF012345
    slots[5] = time_slot(far, seq=20)
    slots[6] = slot(Kind.MALLOC, addr=16, seq=21, tick=far - 2)  # a nested call may carry an earlier tick
    events = make_ring(tmp_path, slots, head=7).read(0)
    assert events is not None
    assert events.tick.tolist() == [*full, far - 2]


def test_sequence_numbers_are_widened_beyond_forty_bits(tmp_path: Path) -> None:
    start = (3 << 40) - 4
    slots = {0: time_slot(seq=start)}
    slots |= {i + 1: slot(Kind.FREE, addr=16, seq=(start + 2 * i) & (1 << 40) - 1) for i in range(5)}
    events = make_ring(tmp_path, slots, head=6).read(0)
    assert events is not None
    assert events.seq.tolist() == [start + 2 * i for i in range(5)]


def test_extended_slots_bring_arguments_sizes_and_words(tmp_path: Path) -> None:
    failed = (1 << 64) - 1
    slots = {
        0: time_slot(),
        1: slot(Kind.REALLOC, more=True, addr=0x1000, size=100, excess=1, seq=1),
        2: plain(spool.KIND_EXT, 0xDEAD0, 0x41, 0),
        3: slot(Kind.MMAP, more=True, addr=failed, size=spool.SIZE_EXT, seq=3),
        4: plain(spool.KIND_EXT, 0x7000, 3 + (0x22 << 16), failed - 1, more=True),
        5: plain(spool.KIND_EXT, 0x5000),
        6: slot(Kind.CALLOC, addr=0x2000, size=80, aux=10, excess=0, seq=5),
        7: slot(Kind.MEMALIGN, addr=0x3000, size=80, aux=2 << 8 | 6, excess=1, seq=7),
        8: slot(Kind.FREE, addr=0x3000, size=0x61, seq=9),
        9: slot(Kind.MALLOC, addr=0, size=1 << 40, seq=11),
    }
    events = make_ring(tmp_path, slots, head=10).read(0)
    assert events is not None
    rows = list(zip(events.kind, events.addr, events.size, events.arg, events.arg2, events.word, strict=True))
    assert rows == [
        (Kind.REALLOC, 0x1000, 100, 0xDEAD0, 0x41, 0x71),
        (Kind.MMAP, failed, failed - 1, 0x7000, 3 + (0x22 << 16), 0x5000),
        (Kind.CALLOC, 0x2000, 80, 10, 0, 0x60),
        (Kind.MEMALIGN, 0x3000, 80, 64, 2, 0x61),
        (Kind.FREE, 0x3000, 0, 0, 0, 0x61),
        (Kind.MALLOC, 0, 1 << 40, 0, 0, 0),
    ]


def test_a_late_slot_brings_the_word_and_the_exit_number(tmp_path: Path) -> None:
    slots = {
        0: time_slot(),
        1: slot(Kind.MALLOC, addr=0x1000, size=24, excess=spool.EXCESS_LATE, span=spool.SPAN_LATE, seq=1),
        2: slot(Kind.MALLOC, addr=0x2000, size=24, excess=1, seq=2),
        3: plain(spool.KIND_LATE, 0x20002, 9_000_000, 1),
    }
    events = make_ring(tmp_path, slots, head=4).read(0)
    assert events is not None
    assert events.seq_exit.tolist() == [9_000_000, 3]
    assert events.word.tolist() == [0x20002, 0x21]


def test_an_event_waits_for_its_late_slot(tmp_path: Path) -> None:
    late = slot(Kind.MALLOC, addr=0x1000, size=24, span=spool.SPAN_LATE, seq=3)
    ring = make_ring(tmp_path, {0: time_slot(), 1: slot(Kind.FREE, addr=16, seq=1), 2: late}, head=3)
    first = ring.read(0)
    assert first is not None
    assert first.seq.tolist() == [1]
    assert ring.floor is not None
    assert ring.floor <= 3
    ring.slots[3] = np.frombuffer(plain(spool.KIND_LATE, 0x21, 99, 3), "<u8")
    ring.set("head", 4)
    second = ring.read(1)
    assert second is not None
    assert (second.seq.tolist(), second.seq_exit.tolist()) == ([3], [99])


def test_a_call_in_progress_stops_the_reading_and_holds_the_watermark(tmp_path: Path) -> None:
    opened = slot(Kind.MALLOC, done=False, span=0, size=64, seq=7, stack=3)
    ring = make_ring(tmp_path, {0: time_slot(), 1: slot(Kind.FREE, addr=16, seq=5), 2: opened}, head=3)
    first = ring.read(0)
    assert first is not None
    assert first.seq.tolist() == [5]
    assert ring.floor == 7
    assert ring.read(10**12) is None, "nothing is behind it: it may wait for ever"
    ring.slots[2] = np.frombuffer(slot(Kind.MALLOC, addr=0x1000, size=64, excess=1, seq=7, span=4, stack=3), "<u8")
    second = ring.read(1)
    assert second is not None
    assert (second.seq_exit[0], second.addr[0], second.word[0]) == (11, 0x1000, 0x51)
    assert ring.floor is None


def test_a_call_in_progress_is_taken_open_after_a_while(tmp_path: Path) -> None:
    opened = slot(Kind.MALLOC, done=False, span=0, size=64, seq=7, stack=3)
    behind = slot(Kind.MALLOC, addr=0x1000, size=64, excess=1, seq=8)
    ring = make_ring(tmp_path, {0: time_slot(), 1: opened, 2: behind}, head=3)
    assert ring.read(0) is not None  # the time slot
    assert ring.read(50_000_000) is None
    events = ring.read(200_000_000)
    assert events is not None
    assert (events.seq.tolist(), events.seq_exit.tolist(), events.stack.tolist()) == ([7, 8], [0, 9], [3, 0])
    ring.release()
    assert ring.get("tail") == 1, "its owner will still write to the slot"
    ring.slots[1, 0] |= np.uint64(1 << 8)
    ring.release()
    assert ring.get("tail") == 3


def test_a_dead_process_leaves_nothing_behind(tmp_path: Path) -> None:
    opened = slot(Kind.REALLOC, done=False, more=True, span=0, size=64, seq=7)
    slots = {0: time_slot(), 1: opened, 2: plain(spool.KIND_EXT, 0xAA0, 0x31, 0), 4: slot(Kind.FREE, addr=16, seq=9)}
    ring = make_ring(tmp_path, slots, head=5)
    events = ring.read(0, final=True)
    assert events is not None
    assert events.seq.tolist() == [7, 9]
    assert (events.seq_exit[0], events.arg[0], events.addr[0]) == (0, 0xAA0, 0)
    assert ring.damaged == 1, "slot 3 was reserved and never written"


def test_a_call_that_longjmp_left_never_returned(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, {0: time_slot(), 1: slot(Kind.MALLOC, span=0, size=64, seq=7)}, head=2)
    events = ring.read(0)
    assert events is not None
    assert (events.seq_exit[0], events.addr[0], events.word[0]) == (0, 0, 0)


def test_a_ring_is_read_around_its_end_for_many_laps(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, {0: time_slot()}, head=1)
    rng = np.random.default_rng(7)
    written, seen, seq = 1, [], 1
    while seq < 2000:
        for _ in range(int(rng.integers(0, CAPACITY - (written - ring.get("tail")) + 1))):
            data = slot(Kind.FREE, lap=written // CAPACITY, addr=seq * 16, seq=seq, tick=0x1234567 + seq)
            ring.slots[written % CAPACITY] = np.frombuffer(data, "<u8")
            written, seq = written + 1, seq + 2
            ring.set("head", written)
        events = ring.read(0)
        seen += events.seq.tolist() if events is not None else []
        ring.release()
    assert seen == list(range(1, seq, 2))


def test_slots_of_an_unknown_kind_are_counted_as_damaged(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, {0: time_slot(), 1: slot(45, seq=1), 2: slot(Kind.FREE, addr=16, seq=3)}, head=3)
    events = ring.read(0)
    assert events is not None
    assert (events.seq.tolist(), events.damaged) == ([3], 1)


@pytest.mark.parametrize("capacity", [0, 24, 1 << 30])
def test_a_ring_that_claims_an_impossible_size_is_refused(tmp_path: Path, capacity: int) -> None:
    path = tmp_path / "ring.0"
    page = bytearray(spool.PAGE + 32)
    page[:8] = spool.MAGIC_RING
    page[20:24] = capacity.to_bytes(4, "little")
    path.write_bytes(page)
    with pytest.raises(SpoolError):
        rings.Ring(path)


NODE = np.dtype([("ip", "<u8"), ("parent", "<u4"), ("module", "<u4")])


def test_nodes_are_read_over_segments_and_stop_at_a_gap(tmp_path: Path) -> None:
    count = spool.SEGMENT_NODES + 10
    nodes = np.zeros(2 * spool.SEGMENT_NODES, NODE)
    nodes["ip"][1:count] = np.arange(1, count) + 0x400000
    nodes["parent"][1:count] = np.arange(count - 1)
    nodes["ip"][count - 3] = 0
    for number in range(2):
        part = nodes[number * spool.SEGMENT_NODES : (number + 1) * spool.SEGMENT_NODES]
        (tmp_path / f"stacks.{number}").write_bytes(part.tobytes())
    reader = spool.Nodes(tmp_path)
    batches = []
    while (batch := reader.read(count)) is not None:
        batches.append(batch)
    assert [b.first for b in batches] == [1, spool.SEGMENT_NODES]
    assert sum(len(b.address) for b in batches) == count - 4
    last = reader.read(count, final=True)
    assert last is not None
    assert last.address.tolist() == [0, 0x400000 + count - 2, 0x400000 + count - 1]


def test_the_log_is_read_line_by_line_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = spool.Log(path)
    assert log.read() == []
    path.write_bytes(b"P\t/bin/a\\tb\\\\t\t1\nA\thal")
    assert log.read() == [["P", "/bin/a\tb\\t", "1"]]
    with path.open("ab") as file:
        file.write(b"f\\nway\n")
    assert log.read() == [["A", "half\nway"]]
    assert log.read() == []
