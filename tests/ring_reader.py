"""One thread's ring file, and slots as columns of events: what tracer/drain.c does, in Python. The oracle of its tests,
and what tests of the shim read with. The drawings are in preload/spool.h."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from heapledger.errors import SpoolError
from heapledger.store.events import Kind
from heapledger.tracer.spool import (
    EXCESS_LATE,
    KIND_EXT,
    KIND_LATE,
    KIND_TIME,
    MAGIC_RING,
    MAX_READ,
    MAX_SLOTS,
    PAGE,
    RING_FIELDS,
    RING_FREE,
    SIZE_EXT,
    SLOT_BYTES,
    SPAN_LATE,
    Page,
)

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Decoded:
    """Events of one ring in slot order; `tick` in units of 2**tick_shift TSC cycles. All arrays have equal length."""

    kind: npt.NDArray[np.uint8]
    tick: U64
    seq: U64
    seq_exit: U64
    addr: U64
    size: U64
    arg: U64
    arg2: U64
    word: U64
    stack: U32
    damaged: int = 0

    def __len__(self) -> int:
        return len(self.kind)


def _kind_table(kinds: set[int]) -> Bools:
    table = np.zeros(64, bool)
    table[list(kinds)] = True
    return table


_KNOWN = _kind_table({int(kind) for kind in Kind})
#: Kinds whose `excess` bits say the word at addr - 8.
_HAS_WORD = _kind_table({1, 2, 3, 5, 6, 7})

_LAP, _DONE, _MORE = 0x80, 0x100, 0x40


def _signed(values: U64, bits: int) -> npt.NDArray[np.int64]:
    """The low `bits` of each value as a signed number."""
    shift = np.uint64(64 - bits)
    return (values << shift).view(np.int64) >> np.int64(64 - bits)


@dataclass(slots=True)
class Carry:
    """What a ring's short fields are widened against: the last full tick and sequence number seen in it."""

    tick: int
    seq: int


def _widen_ticks(rows: U64, kinds: npt.NDArray[np.uint8], full: U64, carry: Carry) -> U64:
    """Full ticks of event and HL_TIME rows, from w3 (events) and w1 (`full`, HL_TIME): each step is below 2**23 ticks,
    and an HL_TIME row says the whole number."""
    is_time = kinds == KIND_TIME
    has_time = bool(is_time.any())
    short = rows >> np.uint64(40)
    if has_time:
        short = np.where(is_time, full & np.uint64(0xFFFFFF), short)
    before = np.empty_like(short)
    before[0] = carry.tick & 0xFFFFFF
    before[1:] = short[:-1]
    ticks = np.cumsum(_signed(short - before, 24)).view(np.uint64) + np.uint64(carry.tick)
    if has_time:
        for at in np.flatnonzero(is_time):
            ticks[at:] += np.uint64((int(full[at]) - int(ticks[at])) & 0xFFFFFFFFFFFFFFFF)
    return ticks


def decode(slots: U64, carry: Carry, open_slots: Bools | None = None) -> Decoded:
    """The events in `slots` ((n, 4) u64, a private copy; whole events, see Ring.read). Updates `carry`.

    `open_slots` marks calls that were never seen to return: they get seq_exit 0 and no result.
    """
    w0 = slots[:, 0]
    kinds = (w0 & np.uint64(63)).astype(np.uint8)
    if len(kinds) and int(kinds.max()) < KIND_TIME:
        w0, w1, w2, w3 = (np.ascontiguousarray(slots[:, i]) for i in range(4))
        main: npt.NDArray[np.intp] | None = None
        ticks = _widen_ticks(w3, kinds, w1, carry)
        carry.tick = int(ticks[-1])
    else:
        timed = np.flatnonzero(kinds <= KIND_TIME)
        is_main = kinds[timed] != KIND_TIME
        _carry_from_time(slots, kinds, carry)
        ticks = np.empty(0, np.uint64)
        if len(timed):
            ticks = _widen_ticks(slots[timed, 3], kinds[timed], slots[timed, 1], carry)
            carry.tick = int(ticks[-1])
            ticks = ticks[is_main]
        main = timed[is_main]
        if len(main) == 0:
            return _nothing()
        w0, w1, w2, w3 = (np.ascontiguousarray(slots[main, i]) for i in range(4))
        kinds = kinds[main]
    seq = _signed(w3 - np.uint64(carry.seq & 0xFFFFFFFFFFFFFFFF), 40).view(np.uint64) + np.uint64(carry.seq)
    carry.seq = int(seq[-1])
    events = _plain(kinds, ticks, seq, w0, w1, w2)
    if main is not None:
        _join_ext(events, slots, main, w0, w2)
        _join_late(events, slots, w0, w1)
    if open_slots is not None and open_slots.any():
        _blank_open(events, open_slots if main is None else open_slots[main])
    known = _KNOWN[events.kind]
    if not known.all():
        events = _select(events, known)
        events.damaged = int(len(known) - known.sum())
    return events


def _nothing() -> Decoded:
    wide = np.empty(0, np.uint64)
    return Decoded(np.empty(0, np.uint8), wide, wide, wide, wide, wide, wide, wide, wide, np.empty(0, np.uint32))


def _carry_from_time(slots: U64, kinds: npt.NDArray[np.uint8], carry: Carry) -> None:
    """A ring's first HL_TIME says the full numbers that a new reader does not know yet."""
    if carry.seq == 0 and len(at := np.flatnonzero(kinds == KIND_TIME)):
        carry.seq = int(slots[at[0], 2])
        carry.tick = int(slots[at[0], 1])


def _plain(kinds: npt.NDArray[np.uint8], ticks: U64, seq: U64, w0: U64, w1: U64, w2: U64) -> Decoded:
    """Everything the four words of an event's own slot say."""
    span = (w0 >> np.uint64(9)) & np.uint64(SPAN_LATE)
    stack = (w0 >> np.uint64(32)).astype(np.uint32)
    addr = ((w1 << np.uint64(16)).view(np.int64) >> np.int64(16)).view(np.uint64)
    excess = w1 >> np.uint64(48)
    size = w2 & np.uint64(SIZE_EXT)
    chunk = np.maximum((size + np.uint64(23)) & np.uint64(0xFFFFFFFFFFFFFFF0), np.uint64(32))
    chunk += excess
    chunk *= _HAS_WORD[kinds] & (addr != 0)
    is_free = kinds == Kind.FREE
    word = np.where(is_free, size, chunk)
    size *= ~is_free
    aux = w2 >> np.uint64(48)
    arg = np.where(kinds == Kind.CALLOC, aux, np.uint64(0))
    arg2 = np.zeros(len(kinds), np.uint64)
    if (aligned := kinds == Kind.MEMALIGN).any():
        arg[aligned] = np.uint64(1) << (aux[aligned] & np.uint64(63))
        arg2[aligned] = aux[aligned] >> np.uint64(8)
    # A call that never returned (its frame was left by longjmp) is closed with span 0.
    seq_exit = (seq + span) * (span != 0)
    return Decoded(kinds, ticks, seq, seq_exit, addr, size, arg, arg2, word, stack)


def _join_ext(events: Decoded, slots: U64, main: npt.NDArray[np.intp], w0: U64, w2: U64) -> None:
    """Takes arg, arg2, size and word from the HL_EXT slots behind events that have `more`."""
    more = np.flatnonzero(w0 & np.uint64(_MORE))
    if len(more) == 0:
        return
    first = main[more] + 1
    ok = first < len(slots)
    ok[ok] = (slots[first[ok], 0] & np.uint64(63)) == KIND_EXT
    more, first = more[ok], first[ok]
    events.arg[more] = slots[first, 1]
    events.arg2[more] = slots[first, 2]
    large = (w2[more] & np.uint64(SIZE_EXT)) == SIZE_EXT
    events.size[more[large]] = slots[first[large], 3]
    again = (slots[first, 0] & np.uint64(_MORE)) != 0
    again[again] = first[again] + 1 < len(slots)
    events.word[more[again]] = slots[first[again] + 1, 1]


def _late_events(kinds: npt.NDArray[np.uint8], w0: U64, w1: U64) -> Bools:
    """Events whose exit number or word is in an HL_LATE slot."""
    late: Bools = ((w0 >> np.uint64(9)) & np.uint64(SPAN_LATE)) == SPAN_LATE
    late |= ((w1 >> np.uint64(48)) == EXCESS_LATE) & _HAS_WORD[kinds] & ((w1 << np.uint64(16)) != 0)
    return late


def _join_late(events: Decoded, slots: U64, w0: U64, w1: U64) -> None:
    """Takes the word and the exit number from HL_LATE slots; an event without its slot keeps seq_exit 0, word 0."""
    late = np.flatnonzero(_late_events(events.kind, w0, w1))
    if len(late) == 0:
        return
    found = slots[(slots[:, 0] & np.uint64(63)) == KIND_LATE]
    by_seq = {int(row[3]): row for row in found}
    for at in late:
        row = by_seq.get(int(events.seq[at]))
        events.seq_exit[at] = row[2] if row is not None else 0
        if _HAS_WORD[events.kind[at]]:
            events.word[at] = row[1] if row is not None else 0


def _blank_open(events: Decoded, is_open: Bools) -> None:
    events.seq_exit[is_open] = 0
    no_result = is_open & (events.kind != Kind.FREE)
    events.addr[no_result & _HAS_WORD[events.kind]] = 0
    events.word[no_result] = 0


def _select(events: Decoded, keep: Bools) -> Decoded:
    columns = {name: getattr(events, name)[keep] for name in Decoded.__slots__ if name != "damaged"}
    return Decoded(**columns, damaged=events.damaged)


class Ring(Page):
    """One ring file. `position` counts the slots this reader has taken since the ring was made.

    Reading order matters: w0 of every slot first, then the bodies of those that were found done (x86-64 keeps loads
    and stores in order, so a body read after its `done` bit is final).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, MAGIC_RING, RING_FIELDS)
        self.capacity = self.get("capacity")
        if not 0 < self.capacity <= MAX_SLOTS or self.capacity & (self.capacity - 1):
            raise SpoolError(f"{path.name} claims {self.capacity} slots", hint="this ring is skipped")
        if len(self.map) < PAGE + self.capacity * SLOT_BYTES:
            raise SpoolError(f"{path.name} is cut short", hint="this ring is skipped")
        self.slots: U64 = np.frombuffer(self.map, "<u8", self.capacity * 4, PAGE).reshape(-1, 4)
        self.position = self.get("tail")
        self.carry = Carry(0, 0)
        #: (position, since when in ns) of the slot that reading waits at
        self.stalled: tuple[int, int] | None = None
        #: no event still to come from this ring has a smaller seq; None: nothing is waited for
        self.floor: int | None = None
        self.damaged = 0
        self._left_open: list[int] = []

    def close(self) -> None:
        self.slots = np.empty((0, 4), np.uint64)
        super().close()

    def _states(self, start: int, count: int) -> tuple[U64, Bools]:
        """w0 of `count` slots from `start`, and whether each was written in its lap."""
        first = start & (self.capacity - 1)
        head = min(count, self.capacity - first)
        w0 = np.empty(count, np.uint64)
        w0[:head] = self.slots[first : first + head, 0]
        w0[head:] = self.slots[: count - head, 0]
        lap = (w0 & np.uint64(_LAP)) != 0
        odd = (start // self.capacity) & 1
        written = np.empty(count, bool)
        written[:head] = lap[:head] if not odd else ~lap[:head]
        written[head:] = ~lap[head:] if not odd else lap[head:]
        return w0, written

    def _bodies(self, start: int, count: int) -> U64:
        first = start & (self.capacity - 1)
        head = min(count, self.capacity - first)
        if head == count:
            return self.slots[first : first + count].copy()
        return np.concatenate((self.slots[first:], self.slots[: count - head]))

    def backlog(self) -> int:
        """Slots reserved and not yet taken."""
        return max(0, self.get("head") - self.position)

    def read(self, now_ns: int, *, final: bool = False, patience_ns: int = 100_000_000) -> Decoded | None:
        """The events that are complete, in slot order; None if there is nothing new. Does not move `tail`.

        A call in progress stops the reading, unless the process is dead (`final`) or it has held up written slots
        behind it for `patience_ns`: then it is taken as it stands, with seq_exit 0.
        """
        waiting = min(self.get("head") - self.position, self.capacity)
        self.floor = None
        if waiting <= 0:
            self.stalled = None
            return None
        count = min(waiting, MAX_READ)
        w0, written = self._states(self.position, count)
        good = written & ((w0 & np.uint64(_DONE)) != 0)
        take = count if good.all() else int(np.argmin(good))
        patient = self._is_patient(now_ns, patience_ns) and not final
        if final and count == waiting:
            take = count
        elif final:
            take = self._whole_events(w0, count, patient=True) or count
        elif not patient and take < count and written[take + 1 :].any():
            rest = np.flatnonzero(~good[take + 1 :])
            take = take + 1 + int(rest[0]) if len(rest) else count
        if not final:
            take = self._whole_events(w0, take, patient)
        events = None
        if take:
            events = self._decode_taken(self._bodies(self.position, take), written[:take], good[:take])
            self.position += take
        if take < count and not final:
            self._stall(bool(written[take]), now_ns)
        else:
            self.stalled = None
        if count < waiting:
            self.floor = self.carry.seq + 1
        return events

    def _decode_taken(self, bodies: U64, written: Bools, good: Bools) -> Decoded:
        if good.all():
            return decode(bodies, self.carry)
        self.damaged += int((~written).sum())
        self._left_open += (np.flatnonzero(written & ~good) + self.position).tolist()
        # A slot that was reserved and never written holds another lap's event: it is lost, and counted.
        return decode(bodies[written], self.carry, ~good[written])

    def _is_patient(self, now_ns: int, patience_ns: int) -> bool:
        """Whether the slot that reading waits at has not yet waited for too long."""
        if self.stalled is None or self.stalled[0] != self.position:
            return True
        return now_ns - self.stalled[1] < patience_ns

    def _whole_events(self, w0: U64, take: int, patient: bool) -> int:
        """`take`, or less: an event goes with its HL_EXT slots, and waits for its HL_LATE slot."""
        if take and int(w0[take - 1]) & _MORE:
            while take and int(w0[take - 1]) & 63 == KIND_EXT:
                take -= 1
            take -= 1
        if not patient or take <= 0:
            return max(take, 0)
        kinds = (w0[:take] & np.uint64(63)).astype(np.uint8)
        first = self.position & (self.capacity - 1)
        head = min(take, self.capacity - first)
        w1 = np.concatenate((self.slots[first : first + head, 1], self.slots[: take - head, 1]))
        late = _late_events(kinds, w0[:take], w1) & (kinds < KIND_TIME)
        if not late.any():
            return take
        bodies = self._bodies(self.position, take)
        seqs = set((bodies[kinds == KIND_LATE, 3] & np.uint64(0xFFFFFFFFFF)).tolist())
        for at in np.flatnonzero(late):
            if int(bodies[at, 3]) & 0xFFFFFFFFFF not in seqs:
                return int(at)
        return take

    def _stall(self, written: bool, now_ns: int) -> None:
        """Notes the slot that reading waits at, and the least seq that may still come from this ring."""
        if self.stalled is None or self.stalled[0] != self.position:
            self.stalled = (self.position, now_ns)
        self.floor = self.carry.seq + 1
        if written and self.carry.seq:
            short = int(self.slots[self.position & (self.capacity - 1), 3])
            step = (short - self.carry.seq) & 0xFFFFFFFFFF
            if step < 1 << 39:
                self.floor = self.carry.seq + step

    def release(self) -> None:
        """Tells the owner that the slots read so far may be used again.

        Slots of calls that were taken before they returned are kept back, because their owner will still write to
        them; but never more than three quarters of the ring, or the owner would wait for room while we wait for it.
        """
        self._left_open = [at for at in self._left_open if self._is_open(at)]
        self.set("tail", self._left_open[0] if self._left_open else self.position)

    def give_back(self) -> None:
        """The owner is dead and everything was taken: another thread may have the ring. (The state is stored last.)"""
        self._left_open = []
        self.set("tail", self.position)
        self.set("tid", 0)
        self.set("state", RING_FREE)

    def _is_open(self, at: int) -> bool:
        if self.get("head") - at > self.capacity * 3 // 4:
            return False
        return not int(self.slots[at & (self.capacity - 1), 0]) & _DONE

    @property
    def name(self) -> str:
        return self.map[56:72].split(b"\0")[0].decode(errors="replace")
