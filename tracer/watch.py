"""A live process beside its spool: is it alive, its counters over time, and snapshots of all its pages.

Snapshots are taken at the end (the shim holds the process), before exec, at the highest RSS seen, and on request. The
ones in mid-run stop the process for about a millisecond (`stopped`). All peak snapshots together may cost 3 % of the
wall time; of those, only the newest is kept.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

from heapledger.errors import ProcessGoneError
from heapledger.store.writer import TraceWriter
from heapledger.tracer import residency
from heapledger.tracer.image import Image
from heapledger.tracer.sample import Sampler
from heapledger.tracer.stopped import OnStatus, stopped

#: A new peak must be this much higher than the last one that has a snapshot.
PEAK_STEP_SHARE, PEAK_STEP_BYTES = 0.02, 256 << 10
#: Peak snapshots may cost this share of the time since the process was found, and this much at once (ns).
PEAK_SHARE, PEAK_GRACE_NS = 0.03, 4_000_000
#: While RSS grows a snapshot waits for the top, at most this long (ns).
PEAK_GROWTH_NS = 100_000_000
#: A process younger than this is not stopped for a peak: nearly every start is one (ns).
PEAK_FIRST_NS = 30_000_000
#: RSS is looked at this often (ns) for a new peak; it costs 6 µs.
PEAK_LOOK_NS = 5_000_000


@dataclass(slots=True)
class WatchOptions:
    """What to look at. Times in ns."""

    interval_ns: int = 50_000_000
    snapshot_every_ns: int = 0
    residency: bool = True
    peaks: bool = True


@dataclass(slots=True)
class Taken:
    """A snapshot that is not written yet."""

    reason: str
    grab: residency.Grab
    seq: int
    still: bool  # nothing moved while it was read
    pause_ns: int


class Watch:
    """The live process of an image. Raises ProcessLookupError when it is gone already."""

    def __init__(self, image: Image, writer: TraceWriter, options: WatchOptions, on_status: OnStatus) -> None:
        self.image = image
        self.writer = writer
        self.options = options
        self.on_status = on_status
        self.pid = image.pid
        self.pidfd = os.pidfd_open(self.pid)
        try:
            self.sampler: Sampler | None = Sampler(self.pid)
        except OSError:
            self.sampler = None
        now = time.monotonic_ns()
        self._born_ns = now
        self._sample_due_ns = 0
        self._snapshot_due_ns = now + options.snapshot_every_ns
        self._look_due_ns = now + PEAK_FIRST_NS
        self._peak_rss = 0
        self._last_rss = 0
        self._growing_since_ns = 0
        self._peak_id = 0
        self._spent_ns = 0
        self._last_cost_ns = 2_000_000
        self._denied = False
        self.snapshots = 0

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        if self.sampler is not None:
            self.sampler.close()

    # ---- counters

    def tick(self, now_ns: int) -> None:
        """What is due now: a sample, a look at the RSS, a snapshot that was asked for."""
        if self.sampler is None:
            return
        if now_ns >= self._sample_due_ns:
            self.sample(now_ns)
        if now_ns >= self._look_due_ns and self.options.peaks and self.options.residency:
            self._look_due_ns = now_ns + PEAK_LOOK_NS
            self._look_for_peak(now_ns)
        if self.options.snapshot_every_ns and now_ns >= self._snapshot_due_ns:
            self._snapshot_due_ns = now_ns + self.options.snapshot_every_ns
            self.snapshot("request")

    def sample(self, now_ns: int, *, full: bool = False) -> None:
        """Writes a row of counters."""
        if self.sampler is None:
            return
        self._sample_due_ns = now_ns + self.options.interval_ns
        try:
            row = self.sampler.sample(full=full)
        except (ValueError, IndexError):
            return  # it ended between two reads
        if row is not None:
            self.writer.add_sample(self.image.process_id, time_ns=max(0, now_ns - self.image.session_ns), **row)

    def _look_for_peak(self, now_ns: int) -> None:
        """Takes a snapshot of a new peak, once it has stopped growing (or has grown for PEAK_GROWTH_NS)."""
        assert self.sampler is not None
        rss, before = self.sampler.rss(), self._last_rss
        self._last_rss = rss
        if rss <= self._peak_rss + max(PEAK_STEP_BYTES, int(self._peak_rss * PEAK_STEP_SHARE)):
            self._growing_since_ns = 0
            return
        self._growing_since_ns = self._growing_since_ns or now_ns
        if rss > before and now_ns - self._growing_since_ns < PEAK_GROWTH_NS:
            return
        if self._spent_ns + self._last_cost_ns > (now_ns - self._born_ns) * PEAK_SHARE + PEAK_GRACE_NS:
            return
        self._growing_since_ns = 0
        self.snapshot("peak")

    # ---- snapshots

    def snapshot(self, reason: str) -> None:
        """Every page of the process now. Nothing is written when it cannot be looked at (that is noted)."""
        begun = time.thread_time_ns()  # on a busy machine the wall clock would count others' work as ours
        if (taken := self.take(reason)) is not None:
            self.keep(taken)
        self._last_cost_ns = time.thread_time_ns() - begun
        if reason == "peak":
            self._spent_ns += self._last_cost_ns

    def take(self, reason: str) -> Taken | None:
        """Reads what has to be read while the process stands still; `keep` does the rest."""
        if not self.options.residency:
            return None
        held = reason in ("exit", "exec")
        try:
            return Taken(reason, *self._grab(alone=held and self._single_threaded()))
        except (ProcessGoneError, ValueError):
            return None

    def keep(self, taken: Taken) -> None:
        """Writes a snapshot."""
        try:
            reading = taken.grab.reading()
        except (ProcessGoneError, ValueError):
            return
        if taken.reason == "peak" and reading.rss <= self._peak_rss:
            return
        snapshot_id = self._write(reading, taken)
        if taken.reason == "peak":
            self._set_peak(snapshot_id, reading.rss)
        elif taken.reason in ("exit", "exec") and reading.rss >= self._peak_rss:
            # The end is the highest point: the peak's books are those of the end.
            self._set_peak(self.writer.copy_snapshot(snapshot_id, reason="peak"), reading.rss)

    def _set_peak(self, snapshot_id: int, rss: int) -> None:
        if self._peak_id:
            self.writer.delete_snapshot(self._peak_id)
        self._peak_id, self._peak_rss = snapshot_id, rss

    def _single_threaded(self) -> bool:
        try:
            return len(os.listdir(f"/proc/{self.pid}/task")) == 1
        except OSError:
            return True

    def _grab(self, *, alone: bool) -> tuple[residency.Grab, int, bool, int]:
        """(what the kernel says, the sequence number then, whether nothing moved, ns the process was stopped)."""
        if alone:
            return residency.grab(self.pid), self.image.control.get("seq"), True, 0
        if not self._denied:
            try:
                return self._grab_stopped()
            except PermissionError as error:
                self._denied = True
                self.image.notes.append(f"snapshots were taken without stopping the program ({error.strerror})")
        first = residency.grab(self.pid)
        seq = self.image.control.get("seq")
        second = residency.grab(self.pid)
        same = seq == self.image.control.get("seq") and first.reading().same_pages(second.reading())
        return second, seq, same, 0

    def _grab_stopped(self) -> tuple[residency.Grab, int, bool, int]:
        begun = time.monotonic_ns()
        with stopped(self.pid, on_status=self.on_status) as stop:
            grab = residency.grab(self.pid)
            seq = self.image.control.get("seq")
            still = stop.kept_still()
        return grab, seq, still, time.monotonic_ns() - begun

    def _write(self, reading: residency.Reading, taken: Taken) -> int:
        self.snapshots += 1
        return self.writer.add_snapshot(
            self.image.process_id,
            [vma.row() for vma in reading.vmas],
            reason=taken.reason,
            time_ns=max(0, reading.time_ns - self.image.session_ns),
            seq=taken.seq,
            rss_bytes=reading.rss,
            pss_bytes=sum(vma.pss for vma in reading.vmas),
            pagemap_bytes=reading.pagemap_bytes,
            page_tables_bytes=reading.page_tables,
            threads=reading.threads,
            method=reading.method,
            consistent=taken.still and reading.agrees(),
            pause_ns=taken.pause_ns,
        )

    def start_maps(self) -> None:
        """The maps at the start, from the shim's copy of smaps: a snapshot "start" without pages."""
        path = self.image.folder / "maps.start"
        with contextlib.suppress(OSError, ValueError, IndexError):
            vmas = residency.parse_smaps(path.read_bytes())
            fields: dict[str, Any] = {"time_ns": max(0, self.image.control.get("start_ns") - self.image.session_ns)}
            rss = sum(vma.rss for vma in vmas)
            self.writer.add_snapshot(
                self.image.process_id,
                [vma.row() for vma in vmas],
                reason="start",
                seq=1,
                rss_bytes=rss,
                pss_bytes=sum(vma.pss for vma in vmas),
                pagemap_bytes=0,
                method="smaps",
                consistent=True,
                pause_ns=0,
                **fields,
            )
