"""One process image as the collector follows it: rings → events in order → the writer.

Order: sequence numbers come from one counter of the process, events lie in per-thread rings. When `control.seq` is read
before the heads of the rings, every event with a smaller number lies below a head, so all that is smaller than that
(and than the slot a ring is stalled at) can be merged and written; the rest waits (`_pending`).

Identity: numbers handed out = those of the events seen (entry and exit each) + those of lost events; `lost` says how
many events that leaves, plus those the shim itself could not record.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from heapledger.errors import SpoolError
from heapledger.store.events import Events, Kind
from heapledger.store.writer import TraceWriter
from heapledger.tracer import spool
from heapledger.tracer.clock import Clock
from heapledger.tracer.perfmap import MARKS, MODULE, NUMBER, PerfMap
from heapledger.tracer.resolve import Addresses

#: Events kept back for a ring that is stalled; beyond it the stalled call is taken as it stands (73 bytes each).
MAX_PENDING = 400_000
#: Rings of dead threads that are emptied in one round, and slots taken from them at once (32 bytes each).
MAX_RESTS, MAX_REST_SLOTS = 1000, 2 * spool.MAX_READ
#: The name of a thread that records is looked at this often (ns).
NAME_NS = 5_000_000
_FUTEX_WAKE = 1
_SYS_FUTEX = 202
_libc = ctypes.CDLL(None, use_errno=True)
_ENVIRONMENT = ("LD_PRELOAD", "LD_LIBRARY_PATH", "GLIBC_TUNABLES", "MALLOC_")


@dataclass(slots=True)
class _ThreadState:
    """What was last written about a thread."""

    number: int
    tid: int
    ring: spool.Ring
    named_ns: int = 0
    row: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Rest:
    """The last slots of a thread that has ended; its ring may be somebody else's by now."""

    row: dict[str, Any]
    slots: spool.U64
    carry: spool.Carry


@dataclass(slots=True)
class Written:
    """What a trace file already holds of an image (recover)."""

    process_id: int
    last_seq: int
    last_ns: int
    events: int
    returned: int
    notes: list[str]


class Image:
    """The spool folder PID.N of one process image."""

    def __init__(self, folder: Path, writer: TraceWriter, session_ns: int, addresses: Addresses) -> None:
        self.folder = folder
        self.name = folder.name
        pid, _, number = folder.name.partition(".")
        self.pid, self.number = int(pid), int(number)  # 0: it calls itself so, but nobody whom we see is meant
        self.namespace = ""  # of its pids, as /proc/self/ns/pid has it
        self.foreign = False  # its pids are not ours: `pid` was found otherwise, and its threads are not looked at
        self.control = spool.Control(folder)
        self.writer = writer
        self.addresses = addresses
        self.session_ns = session_ns
        self.clock = Clock(
            start_ns=self.control.get("start_ns"),
            start_tsc=self.control.get("start_tsc"),
            tick_shift=min(self.control.get("tick_shift"), 32),
            session_ns=session_ns,
        )
        self.process_id = 0
        self.rings: dict[int, spool.Ring] = {}
        self.threads: dict[int, _ThreadState] = {}  # those that own a ring, by number
        self._changed_threads: dict[int, dict[str, Any]] = {}  # rows to be written
        self.nodes = spool.Nodes(folder)
        self.log = spool.Log(folder / "log")
        self.module_ids = np.zeros(1, np.int64)  # by the node's `module` field: 0 is unknown
        self.modules: dict[int, dict[str, Any]] = {}
        self.perf_map = PerfMap(self)
        self.argv: list[str] = []
        self.environment: dict[str, str] = {}
        self.exe = ""
        self.libc_version = ""
        self.notes: list[str] = []
        self.events = 0
        self.numbers_seen = 0  # sequence numbers that belong to events seen
        self.open_calls = 0
        self.damaged = 0
        self.last_seq = 0
        self.written_before = 0  # events up to this number were written by a collector before us
        self.last_ns = 0
        self.released = False
        self.fill = 0.0  # share of the fullest ring's slots that the last drain took
        self._bad_rings: set[int] = set()
        self._pending: list[Events] = []

    # ---- the process row

    def register(self, *, start: str, parent_id: int | None) -> int:
        """Adds the process row; what the log says comes with `update`."""
        get = self.control.get
        self.read_log()
        self.process_id = self.writer.add_process(
            pid=self.pid or get("pid"),
            image=self.number,
            parent_id=parent_id,
            start=start,
            fork_seq=get("fork_seq") if start == "fork" else None,
            exe=self.exe,
            argv=self.argv,
            environment=self.environment,
            libc_version=self.libc_version,
            start_break=get("start_break"),
            start_ns=max(0, get("start_ns") - self.session_ns),
            self_low=get("self_low"),
            self_high=get("self_high"),
            page_size=os.sysconf("SC_PAGE_SIZE"),
            sample_bytes=get("sample_bytes"),
        )
        self._write_modules(list(self.modules))
        return self.process_id

    def resume(self, written: Written) -> int:
        """Goes on where another collector was cut off; its rings are read again as far as they still hold anything."""
        self.process_id = written.process_id
        self.last_seq, self.last_ns = written.last_seq, written.last_ns
        self.written_before = written.last_seq
        self.events = written.events
        self.numbers_seen = written.events + written.returned
        self.open_calls = written.events - written.returned
        self.notes = list(written.notes)
        self.read_log()
        self._write_modules(list(self.modules))
        return self.process_id

    def rewind(self) -> None:
        """Reads rings from their beginning, where they were never filled up: what another collector had taken and not
        written is still there. Other rings go on behind what was taken, with the time of its last heartbeat."""
        self._find_rings()
        beat = self.control.get("heartbeat_ns") or self.control.get("start_ns")
        for ring in self.rings.values():
            if ring.get("head") <= ring.capacity and ring.get("generation") <= 1:
                ring.position = 0
            elif ring.position:
                ring.carry.tick = self.clock.tick_at(beat)
                ring.carry.seq = max(1, self.control.get("seq"))

    @property
    def state(self) -> int:
        return self.control.get("state")

    # ---- one round

    def drain(self, now_ns: int, *, final: bool = False) -> int:
        """Moves what is new from the spool to the writer. Returns the number of slots taken. `final`: the process is
        dead, so nothing is waited for."""
        total = 0
        self.fill = 0.0
        while True:
            taken = self._drain_once(now_ns, final)
            total += taken
            if not final or taken == 0:
                return total

    def _drain_once(self, now_ns: int, final: bool) -> int:
        limit = self.control.get("seq")
        self._find_rings()
        taken = 0
        fresh: list[Events] = []
        floors: list[int] = []
        crowded = sum(map(len, self._pending)) > MAX_PENDING
        patience = 0 if crowded else 100_000_000
        left = [] if final else self._take_left_rings()
        for ring in self.rings.values():
            if not final and ring.get("state") == spool.RING_FREE:
                ring.floor = None
                continue  # whoever takes it from now on gets numbers from `limit` on
            before = ring.position
            decoded = ring.read(now_ns, final=final, patience_ns=patience)
            if decoded is not None and len(decoded):
                fresh.append(self._events_of(ring, decoded))
                self.damaged += decoded.damaged
            if ring.position != before:
                taken += ring.position - before
                self.fill = max(self.fill, (ring.position - before) / ring.capacity)
                ring.release()
            if ring.floor is not None:
                floors.append(ring.floor)
        for done, rest in enumerate(left):  # it grows
            taken += len(rest.slots)
            self._decode_rest(rest, fresh)
            if done % 32 == 31 and len(left) < MAX_RESTS:
                left += self._take_left_rings()
        self._write_threads()
        self.read_log()
        self._drain_nodes(final)
        # All of a dead process is there: only rings that were not read to their end hold something back.
        self._emit(fresh, min(floors, default=None) if final else min([limit, *floors]))
        return taken

    def _find_rings(self) -> None:
        count = min(self.control.get("rings"), spool.MAX_RINGS)
        for index in range(len(self.rings) + len(self._bad_rings), count):
            if index in self.rings or index in self._bad_rings:
                continue
            try:
                self.rings[index] = spool.Ring(self.folder / f"ring.{index}")
            except (OSError, SpoolError, ValueError) as error:
                self._bad_rings.add(index)
                self.notes.append(f"ring {index} cannot be read: {error}")

    def _events_of(self, ring: spool.Ring, decoded: spool.Decoded) -> Events:
        """The decoded slots as events of the ring's thread. The header was written before the slots."""
        number = ring.get("thread")
        events = self._as_events(number, decoded)
        self._note_thread(ring, number, events)
        return events

    def _as_events(self, number: int, decoded: spool.Decoded) -> Events:
        count = len(decoded)
        return Events(
            kind=decoded.kind,
            thread=np.full(count, number, np.uint32),
            time=self.clock.times(decoded.tick),
            seq=decoded.seq,
            seq_exit=decoded.seq_exit,
            addr=decoded.addr,
            size=decoded.size,
            arg=decoded.arg,
            arg2=decoded.arg2,
            word=decoded.word,
            stack=decoded.stack,
        )

    # ---- rings of threads that have ended

    def _take_left_rings(self) -> list[_Rest]:
        """What is left in rings whose owners said goodbye and are dead now. The rings go back at once, before anything
        is decoded: a program may start a thread every 50 µs, and each would make a ring of its own."""
        alive: set[str] | None = None
        found: list[_Rest] = []
        slots_taken = 0
        for ring in self.rings.values() if not self.foreign else ():
            if ring.get("state") != spool.RING_LEFT or slots_taken > MAX_REST_SLOTS:
                continue
            if alive is None:
                try:
                    alive = set(os.listdir(f"/proc/{self.pid}/task"))
                except OSError:
                    break
            if str(ring.get("tid")) in alive or (slots := ring.take_rest()) is None:
                continue
            slots_taken += len(slots)
            found.append(_Rest(_header(ring), slots, replace(ring.carry)))
            ring.give_back()
        return found

    def _decode_rest(self, rest: _Rest, fresh: list[Events]) -> None:
        number = rest.row["number"]
        state = self.threads.pop(number, None)
        row = rest.row if state is None else state.row
        if len(rest.slots):
            decoded = spool.decode(rest.slots, rest.carry)
            self.damaged += decoded.damaged
            if len(decoded):
                events = self._as_events(number, decoded)
                fresh.append(events)
                _note_times(row, events)
        if row["start_ns"] is not None:
            row["end_ns"] = row["end_ns"] or max(self.last_ns, row["start_ns"])
            self._changed_threads[number] = row

    def _emit(self, fresh: list[Events], limit: int | None) -> None:
        """Writes the events below `limit` (None: all) in order of seq; the others wait."""
        parts = self._pending + fresh
        self._pending = []
        if not parts:
            return
        events = parts[0] if len(parts) == 1 else Events.concat(parts)
        seq = events.seq
        if not bool(np.all(seq[1:] > seq[:-1])):
            events = events.take(np.argsort(seq, kind="stable"))
        if limit is not None and int(events.seq[-1]) >= limit:
            ready = int(np.searchsorted(events.seq, np.uint64(limit)))
            self._pending = [events.take(slice(ready, None))]
            events = events.take(slice(0, ready))
        if len(events):
            self._write(self._checked(events))

    def _checked(self, events: Events) -> Events:
        """Without the events that cannot be: numbers seen before or not yet handed out, stacks that do not exist."""
        seq = events.seq
        if int(seq[0]) <= self.last_seq or int(seq[-1]) >= self.control.get("seq") or not np.all(seq[1:] > seq[:-1]):
            good = (seq > self.last_seq) & (seq < self.control.get("seq"))
            good[1:] &= seq[1:] != seq[:-1]
            self.damaged += int((~good & (seq > self.written_before)).sum())
            events = events.take(good)
        if len(events) and int(events.stack.max()) >= max(1, self.nodes.taken):
            beyond = events.stack >= self.nodes.taken
            self.damaged += int(beyond.sum())
            events.stack[beyond] = 0
        return events

    def _write(self, events: Events) -> None:
        if not len(events):
            return
        returned = int(np.count_nonzero(events.seq_exit))
        self.events += len(events)
        self.numbers_seen += len(events) + returned
        self.open_calls += len(events) - returned
        self.last_seq = int(events.seq[-1])
        self.last_ns = max(self.last_ns, int(events.time[-1]))
        self.writer.append_events(self.process_id, events)

    # ---- threads

    def _note_thread(self, ring: spool.Ring, number: int, events: Events) -> None:
        state = self.threads.get(number)
        if state is None:
            state = _ThreadState(number, ring.get("tid"), ring, row=_header(ring))
            self.threads[number] = state
            self._changed_threads[number] = state.row
        elif ring.get("state") == spool.RING_OWNED and time.monotonic_ns() - state.named_ns > NAME_NS:
            self._refresh_thread(state)
        if _note_times(state.row, events):
            self._changed_threads[number] = state.row

    def _write_threads(self) -> None:
        if self._changed_threads and self.process_id:
            self.writer.add_threads(self.process_id, self._changed_threads.values())
            self._changed_threads = {}

    def refresh_threads(self) -> None:
        """Names may change after the first event; rings of threads that ended without a word go back to the shim."""
        for state in list(self.threads.values()):
            self._refresh_thread(state)
        self._write_threads()

    def _refresh_thread(self, state: _ThreadState) -> None:
        if self.foreign:
            return
        state.named_ns = time.monotonic_ns()
        name = _comm(self.pid, state.tid)
        if name is None:
            if Path(f"/proc/{self.pid}").exists():
                self._free_ring(state)
        elif name != state.row["name"]:
            state.row["name"] = name
            self._changed_threads[state.number] = state.row

    def _free_ring(self, state: _ThreadState) -> None:
        """Gives the ring of a dead thread back, once it is drained. A dead owner cannot write any more."""
        ring = state.ring
        if ring.backlog():
            return
        if state.row["end_ns"] is None:
            state.row["end_ns"] = max(self.last_ns, state.row["start_ns"])
            self._changed_threads[state.number] = state.row
        ring.give_back()
        del self.threads[state.number]

    # ---- the log

    def read_log(self) -> None:
        fresh: list[int] = []
        for tag, *fields in self.log.read():
            try:
                self._log_line(tag, fields, fresh)
            except (ValueError, IndexError):
                self.notes.append(f"a line of the shim's log is not understood: {tag} {' '.join(fields)[:80]}")
        if fresh and self.process_id:
            self._write_modules(fresh)

    def _log_line(self, tag: str, fields: list[str], fresh: list[int]) -> None:
        if tag == "P":
            self.exe = fields[0]
            self.libc_version = fields[2] if len(fields) > 2 else ""
        elif tag == "A":
            self.argv.append(fields[0] if fields else "")
        elif tag == "E":
            name, _, value = fields[0].partition("=")
            if name.startswith(_ENVIRONMENT):
                self.environment[name] = value
        elif tag == "M":
            number, seq = int(fields[0]), int(fields[1])
            bias, low, high = (int(field, 16) for field in fields[2:5])
            self.modules[number] = {
                "number": number,
                "path": fields[6],
                "build_id": fields[5],
                "bias": bias,
                "low": low,
                "high": high,
                "load_seq": seq,
                "unload_seq": None,
            }
            fresh.append(number)
        elif tag == "U":
            number, seq = int(fields[0]), int(fields[1])
            if number in self.modules:
                self.modules[number]["unload_seq"] = seq
                if self.process_id and number not in fresh:
                    self.writer.set_module_unload(self.process_id, number, seq)
        elif tag == "N":
            self.namespace = fields[0]
        elif tag == "S":
            self.notes.append(fields[0])

    def _write_modules(self, numbers: list[int]) -> None:
        if not numbers:
            return
        rows = [self.modules[number] for number in numbers]
        for number, module_id in self.writer.add_modules(self.process_id, rows).items():
            if number + 1 >= len(self.module_ids):
                self.module_ids = np.concatenate((self.module_ids, np.zeros(number + 64, np.int64)))
            self.module_ids[number + 1] = module_id
            self.addresses.add_module(module_id, self.modules[number])

    def libc(self) -> dict[str, Any]:
        """The module that is the C library; {} if none was seen."""
        for module in self.modules.values():
            name = os.path.basename(module["path"])
            if name == "libc.so.6" or (name.startswith("libc-2.") and name.endswith(".so")):
                return module
        return {}

    # ---- call stacks

    def _drain_nodes(self, final: bool) -> None:
        while (batch := self.nodes.read(self.control.get("nodes"), final=final)) is not None:
            if (outside := batch.address[batch.module == 0]).size and outside.max() > MARKS and self.perf_map.meet():
                self.modules[NUMBER] = MODULE
                self._write_modules([NUMBER])
            modules = np.minimum(batch.module, len(self.module_ids) - 1)
            module_ids = self.module_ids[modules]
            ids = np.arange(batch.first, batch.first + len(batch.address))
            self.writer.add_nodes(self.process_id, ids, batch.parent, batch.address, module_ids)
            self.addresses.add(module_ids, batch.address)

    # ---- the end

    def release(self) -> None:
        """Lets a held process go on."""
        self.released = True
        self.control.set("release", 1)
        word = ctypes.c_void_p(self.control.address("release"))
        _libc.syscall(_SYS_FUTEX, word, _FUTEX_WAKE, 2**31 - 1, None, None, 0)

    def stop(self) -> None:
        """Tells the shim to stop recording; the program runs on."""
        self.control.set("told", 1)
        self.release()

    def lost(self) -> int:
        """Events known to be missing, after the last drain."""
        handed_out = max(0, self.control.get("seq") - 1)
        # A call that never returned had no exit number, or one that nobody wrote down.
        missing = max(0, handed_out - self.numbers_seen - self.open_calls)
        return (
            self.control.get("lost") + (missing + 1) // 2 + self.damaged + sum(r.damaged for r in self.rings.values())
        )

    def finish(self, **fields: Any) -> None:
        """The last word on this image: drains what is left and completes its row."""
        get = self.control.get
        if get("end_ns"):
            self.clock.set_end(get("end_ns"), get("end_tsc"))
        self.drain(time.monotonic_ns(), final=True)
        if fields.get("end") != "exec":
            self.perf_map.write_frames()
        if reason := get("stop_reason"):
            text = spool.STOP_REASONS[reason] if reason < len(spool.STOP_REASONS) else f"reason {reason}"
            error = f" ({os.strerror(get('stop_errno'))})" if get("stop_errno") > 0 else ""
            self.notes.append(f"recording stopped before the program ended: {text}{error}")
        if damaged := self.damaged + sum(ring.damaged for ring in self.rings.values()):
            self.notes.append(f"{damaged} slots were damaged")
        if self.open_calls:
            self.notes.append(f"{self.open_calls} calls were not seen to return")
        if unlogged := get("unlogged"):
            self.notes.append(f"lines of the shim's log that could not be written: {unlogged}")
        if unseen := get("unseen"):
            self.notes.append(f"children that could not be recorded (no access to the spool): {unseen}")
        libc = self.libc()
        self.writer.update_process(
            self.process_id,
            exe=self.exe,
            argv=self.argv,
            environment=self.environment,
            libc_version=self.libc_version,
            libc_path=libc.get("path", ""),
            libc_build_id=libc.get("build_id", ""),
            end_ns=self.end_ns(),
            lost=self.lost(),
            notes=list(dict.fromkeys(self.notes)),
            **fields,
        )

    def end_ns(self) -> int:
        """ns since the session began: the shim's own time of the end, else that of the last event."""
        if end := self.control.get("end_ns"):
            return max(0, end - self.session_ns)
        return max(self.last_ns, self.control.get("start_ns") - self.session_ns, 0)

    def close(self) -> None:
        """Forgets the mappings."""
        for ring in self.rings.values():
            ring.close()
        self.control.close()
        self.perf_map.close()
        self.nodes = spool.Nodes(self.folder, self.nodes.taken)

    def remove(self) -> None:
        """The files go, once the trace file holds what was in them; the empty folder stays until the session ends, so
        that its number stays taken."""
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                path.unlink() if not path.is_dir() else shutil.rmtree(path)


def _header(ring: spool.Ring) -> dict[str, Any]:
    """The row of the thread that owns a ring, as far as the ring says it."""
    return {
        "number": ring.get("thread"),
        "tid": ring.get("tid"),
        "name": ring.name,
        "thread_pointer": ring.get("thread_pointer"),
        "stack_low": ring.get("stack_low"),
        "stack_high": ring.get("stack_high"),
        "start_ns": None,
        "end_ns": None,
    }


def _note_times(row: dict[str, Any], events: Events) -> bool:
    """A thread's first event, and its end. Returns whether the row has changed."""
    before = row["start_ns"], row["end_ns"]
    if row["start_ns"] is None:
        row["start_ns"] = int(events.time[0])
    ended = events.kind == Kind.THREAD_END
    if ended.any():
        row["end_ns"] = int(events.time[np.flatnonzero(ended)[-1]])
    return (row["start_ns"], row["end_ns"]) != before


def _comm(pid: int, tid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/task/{tid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return None
