"""One process image as the collector follows it: rings → encoded blocks → the writer.

Events are decoded, merged and encoded by `_drain` (drain.h says how, and in which order); here blocks are cut and
handed to the writer. A ring's slots go back to the program when the block that holds them is committed, and not
before: what is not in the trace file lies in a ring (or in a file beside the trace), whoever is killed.

Identity: numbers handed out = those of the events seen (entry and exit each) + those of lost events; `lost` says how
many events that leaves, plus those the shim itself could not record.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heapledger.store.blocks import Block
from heapledger.store.writer import TraceWriter
from heapledger.tracer import _nodes, spool
from heapledger.tracer._drain import Drain
from heapledger.tracer.clock import Clock
from heapledger.tracer.perfmap import MARKS, MODULE, NUMBER, PerfMap
from heapledger.tracer.resolve import Addresses
from heapledger.tracer.spill import Spill

#: Events wait at most so long (ns) for their block to become full: a reader of the unfinished trace sees them then.
BLOCK_AGE_NS = 1_000_000_000
#: Where the fullest ring has this share of its slots in use, a block is cut if it holds at least so many events.
CROWDED, CROWDED_EVENTS = 0.5, 8192
#: From this share on slots are spilled.
SPILL = 0.8
#: A process that does nothing, and the shim's log, are looked at this often (ns).
LOOK_NS = 50_000_000
#: Events that may wait for the writer; it would make us wait for it with two blocks more.
WAITING_EVENTS = 6 * 65_536
#: The name of a thread is looked at so long after its start (ns), and again after twice the time each, up to the last.
NAME_FIRST_NS, NAME_LAST_NS = 5_000_000, 2_000_000_000
_FUTEX_WAKE = 1
_SYS_FUTEX = 202
_libc = ctypes.CDLL(None, use_errno=True)
_ENVIRONMENT = ("LD_PRELOAD", "LD_LIBRARY_PATH", "GLIBC_TUNABLES", "MALLOC_")


@dataclass(slots=True)
class _ThreadState:
    """A thread that lives, and when its name is looked at."""

    tid: int
    name: str
    told: str  # what its ring said last
    wait_ns: int
    due_ns: int


@dataclass(slots=True)
class Backlog:
    """Events on their way to the trace file, of all images; each counter belongs to one thread."""

    handed: int = 0
    committed: int = 0

    def is_full(self) -> bool:
        return self.handed - self.committed >= WAITING_EVENTS


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

    def __init__(
        self,
        folder: Path,
        writer: TraceWriter,
        session_ns: int,
        addresses: Addresses,
        backlog: Backlog,
        spill: Spill | None = None,
    ) -> None:
        self.folder = folder
        self.backlog = backlog
        self.spill = spill
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
        self.nodes = spool.Nodes(folder)
        self.log = spool.Log(folder / "log")
        self.module_ids = array("q", (0,))  # by the node's `module` field: 0 is unknown
        self.modules: dict[int, dict[str, Any]] = {}
        self.perf_map = PerfMap(self)
        self.argv: list[str] = []
        self.environment: dict[str, str] = {}
        self.exe = ""
        self.libc_version = ""
        self.notes: list[str] = []
        self.released = False
        self.fill = 0.0  # the largest share of its slots that a ring got between the last two drains
        self._threads: dict[int, _ThreadState] = {}  # by number
        self._names_due_ns = 0
        self._drain: Drain | None = None  # from `register` or `resume` on
        self._seen_seq = 0  # control.seq when all was taken last
        self._look_due_ns = self._log_due_ns = 0
        self._pending_since_ns = 0  # the oldest event of the block that is not full; 0: there is none
        self._written: Written | None = None

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
        """Goes on where another collector was cut off: what the trace file holds is skipped."""
        self._written = written
        self.process_id = written.process_id
        self.notes = list(written.notes)
        self.read_log()
        self._write_modules(list(self.modules))
        return self.process_id

    def open_rings(self, *, live: bool) -> None:
        """Before the first `drain`. OSError: this cannot be.

        Of an image that was left behind by a collector whose trace is gone as well, rings that were never filled up are
        read from their beginning.
        """
        written = self._written.last_seq if self._written else 0
        self._drain = Drain(self.folder, trust_tail=live or self._written is not None, written=written)
        if live:
            with contextlib.suppress(OSError):  # no memory for a thread: every round beats
                self._drain.start_ticking()
        if self.spill is not None and live:
            self._drain.set_spill(self.spill.prefix(self.name))
        elif self.spill is not None:
            for path in self.spill.files_of(self.name):
                self._drain.add_segment(path)

    @property
    def state(self) -> int:
        return self.control.get("state")

    # ---- one round

    def drain(self, now_ns: int, *, final: bool = False) -> int:
        """Moves what is new from the spool to the writer. Returns the number of slots taken. `final`: the process is
        dead, so nothing is waited for.

        Full blocks are taken up to what was there at the beginning and no farther: threads that fill their rings as
        fast as we empty them would keep us for ever, from other processes and from a program that waits at its end.
        """
        drain = self._drain
        if drain is None:
            return 0
        seq = self.control.get("seq")
        if not final and seq == self._seen_seq and now_ns < self._look_due_ns:
            self.fill = 0.0
            return 0  # nothing was done since the last look
        self._look_due_ns = now_ns + LOOK_NS
        before = drain.slots
        self._read_log_if_due(now_ns, final)
        if not self.clock.is_settled or before == 0:
            drain.set_clock(*self.clock.line())
        if not final and not self.foreign:
            drain.reap(self.pid)
        while (final or not self.backlog.is_full()) and drain.run(now_ns, final):
            self._drain_nodes(final)
            last_seq = self._write_block()
            self._make_room(drain, final)
            if last_seq >= seq and not final:
                break
        self._drain_nodes(final)
        self._write_threads(drain.threads(), now_ns)
        for number, reason in drain.bad_rings():
            self.notes.append(f"ring {number} cannot be read: {reason}")
        drain.measure()
        self.fill = drain.fresh
        if self._is_block_due(drain, now_ns, final):
            self._write_block()
        self._make_room(drain, final)
        self._seen_seq = 0 if self.backlog.is_full() else seq
        return drain.slots - before

    def _make_room(self, drain: Drain, final: bool) -> None:
        """Where rings fill up although all is done that can be done now."""
        if final or self.spill is None or drain.most_used() < SPILL:
            return
        drain.spill(SPILL, self.spill.left(self.name, drain.totals()["spilling_bytes"]))

    def _is_block_due(self, drain: Drain, now_ns: int, final: bool) -> bool:
        if drain.pending == 0:
            return False
        self._pending_since_ns = self._pending_since_ns or now_ns
        if final or now_ns - self._pending_since_ns >= BLOCK_AGE_NS:
            return True
        return drain.used > CROWDED and drain.pending >= CROWDED_EVENTS and not self.backlog.is_full()

    def _write_block(self) -> int:
        """Returns the number of its last event."""
        assert self._drain is not None
        self._pending_since_ns = 0
        count, first_seq, last_seq, first_ns, last_ns, streams, token = self._drain.finish()
        block = Block(count, first_seq, last_seq, first_ns, last_ns, streams)

        def committed() -> None:
            token.commit()
            self.backlog.committed += block.count

        self.backlog.handed += block.count
        self.writer.append_block(self.process_id, block, then=committed)
        return last_seq

    # ---- threads

    def _write_threads(self, rows: list[dict[str, Any]], now_ns: int) -> None:
        for row in rows:
            number, state = row["number"], self._threads.get(row["number"])
            if "tid" in row and "end_ns" not in row and state is None and not self.foreign:
                due = now_ns + NAME_FIRST_NS
                name = row.get("name", "")
                self._threads[number] = _ThreadState(row["tid"], name, name, NAME_FIRST_NS, due)
                self._names_due_ns = min(self._names_due_ns or due, due)
            elif state is not None:
                if row.get("name", state.told) != state.told:  # newer than what /proc said
                    state.told = state.name = row["name"]
                row["name"] = state.name
                if "end_ns" in row:
                    del self._threads[number]
        if self._names_due_ns and now_ns >= self._names_due_ns:
            rows = rows + self._look_at_names(now_ns)
        if rows:
            self.writer.add_threads(self.process_id, rows)

    def _look_at_names(self, now_ns: int) -> list[dict[str, Any]]:
        """Names may change after the first event; rings of threads that ended without a word go back to the shim."""
        assert self._drain is not None
        rows: list[dict[str, Any]] = []
        for number, state in list(self._threads.items()):
            if state.due_ns > now_ns:
                continue
            state.wait_ns = min(state.wait_ns * 2, NAME_LAST_NS)
            state.due_ns = now_ns + state.wait_ns
            name = _comm(self.pid, state.tid)
            if name is None:
                if Path(f"/proc/{self.pid}").exists():
                    self._drain.reap_silent(number)
            elif name != state.name:
                state.name = name
                rows.append({"number": number, "name": name})
        self._names_due_ns = min((state.due_ns for state in self._threads.values()), default=0)
        return rows

    # ---- the log

    def _read_log_if_due(self, now_ns: int, final: bool) -> None:
        if final or now_ns >= self._log_due_ns:
            self._log_due_ns = now_ns + LOOK_NS
            self.read_log()

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
                self.module_ids.extend(bytes(number + 64))
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
        """New nodes may lie in modules that the log has just told of: read after their number, and before them."""
        made = self.control.get("nodes")
        if made != self.nodes.taken:
            self.read_log()
        while (batch := self.nodes.read(made, final=final)) is not None:
            if batch.highest_outside > MARKS and self.perf_map.meet():
                self.modules[NUMBER] = MODULE
                self._write_modules([NUMBER])
            module_ids = _nodes.look_up(batch.module, self.module_ids)
            self.writer.add_nodes(self.process_id, batch.node, batch.parent, batch.address, module_ids)
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

    def totals(self) -> tuple[int, int, int, int]:
        """(events, those that returned, damaged slots, time of the last event), what the file held included."""
        found = self._drain.totals() if self._drain is not None else {}
        before = self._written or Written(0, 0, 0, 0, 0, [])
        return (
            before.events + found.get("events", 0),
            before.returned + found.get("returned", 0),
            found.get("damaged", 0),
            max(before.last_ns, found.get("last_ns", 0)),
        )

    @property
    def events(self) -> int:
        return self.totals()[0]

    def _unmade(self) -> int:
        return self._drain.totals()["unmade"] if self._drain is not None else 0

    def spilled_bytes(self) -> int:
        """Ever copied to files beside the trace."""
        return self._drain.totals()["spilled_bytes"] if self._drain is not None else 0

    def lost(self) -> int:
        """Events known to be missing, after the last drain."""
        handed_out = max(0, self.control.get("seq") - 1)
        # A call that never returned had no exit number, or one that nobody wrote down. One that the end cut off as it
        # began was not made: its number stands for nothing. What was damaged is missing.
        missing = max(0, handed_out - 2 * self.events - self._unmade())
        return self.control.get("lost") + (missing + 1) // 2

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
        events, returned, damaged, _ = self.totals()
        if damaged:
            self.notes.append(f"{damaged} slots were damaged")
        if events > returned:
            self.notes.append(f"{events - returned} calls were not seen to return")
        if unmade := self._unmade():
            self.notes.append(f"{unmade} calls were cut off by the end before they were made")
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
        return max(self.totals()[3], self.control.get("start_ns") - self.session_ns, 0)

    def close(self) -> None:
        """Forgets the mappings."""
        if self._drain is not None:
            self._drain.stop_ticking()
            self._drain = None  # blocks on their way to the file keep it until they are committed
        self.control.close()
        self.perf_map.close()
        self.nodes = spool.Nodes(self.folder, self.nodes.taken)

    def remove(self) -> None:
        """The files go, once the trace file holds what was in them; the empty folder stays until the session ends, so
        that its number stays taken."""
        if self.spill is not None:
            self.spill.forget(self.name)
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                path.unlink() if not path.is_dir() else shutil.rmtree(path)


def _comm(pid: int, tid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/task/{tid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return None
