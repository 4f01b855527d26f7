"""The collector: follows every process image of a session, from the spool and from /proc, into one trace file."""

from __future__ import annotations

import contextlib
import os
import select
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heapledger.errors import SpoolError
from heapledger.store.writer import TraceWriter
from heapledger.tracer import proc, spool
from heapledger.tracer.image import Backlog, Image, Written
from heapledger.tracer.resolve import Addresses
from heapledger.tracer.spill import Spill
from heapledger.tracer.watch import Watch, WatchOptions

#: Everything seen so far is safe in the trace file this often (ns).
FLUSH_NS = 2_000_000_000
#: After an exec was let go: how long until we look whether another program (without the shim) took its place.
EXEC_LOOK_NS = 50_000_000
UNSEEN = "it became a program that the shim is not part of, which is not followed"
#: File systems of older kernels take times from a clock that moves every 1 to 10 ms.
TICK_NS = 20_000_000
#: So long after an image came or went others are expected to.
LIVELY_NS = 20_000_000


@dataclass(slots=True)
class Exit:
    """How our own child ended, as waitpid says it. None: it runs."""

    pid: int = 0
    status: int | None = None

    def note(self, pid: int, status: int) -> None:
        if pid == self.pid and (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            self.status = status


@dataclass(slots=True)
class _Followed:
    image: Image
    watch: Watch | None  # None: the process was gone when its image was found
    released_ns: int = 0


@dataclass(slots=True)
class Totals:
    """What was collected, for the last line and for session.collector."""

    processes: int = 0
    events: int = 0
    lost: int = 0
    rounds: int = 0
    spool_bytes: int = 0
    spilled_bytes: int = 0
    waits: int = 0
    waited_ns: int = 0
    notes: list[str] = field(default_factory=list)


class Collector:
    """Drains a spool folder into a writer until it is told to stop.

    The heartbeat that the shim looks at comes from a thread of `_drain`'s: a long snapshot or a slow disk must not look
    like our death.
    """

    def __init__(
        self,
        folder: Path,
        writer: TraceWriter,
        *,
        session_ns: int,
        options: WatchOptions,
        main: Exit,
        live: bool = True,
        keep_spool: bool = False,
        written: dict[str, Written] | None = None,
        spill: Spill | None = None,
    ) -> None:
        self.folder = folder
        self._folder_name = str(folder)
        self.writer = writer
        self.session_ns = session_ns
        self.options = options
        self.main = main
        self.live = live
        self.keep_spool = keep_spool
        self.written = written or {}
        self.spill = spill
        self.backlog = Backlog()
        self.addresses = Addresses()
        self.totals = Totals()
        self._followed: dict[str, _Followed] = {}
        self._ids: dict[str, int] = {}  # folder name → process id, also of images that have ended
        self._latest: dict[int, str] = {}  # pid → folder name of its newest image
        self._over: set[str] = set()  # images that ended otherwise than by exec: their pid may come again
        self._seen: set[str] = set()
        self._spool_mtime = -1
        self._poll = select.poll()
        self._by_fd: dict[int, str] = {}
        self._namespace = proc.pid_namespace()
        self._flush_due_ns = time.monotonic_ns() + FLUSH_NS // 10
        self._changed_ns = 0  # when an image came or went last

    # ---- a round

    def round(self) -> int:
        """One look at everything. Returns how many slots were taken (0: nothing is going on)."""
        now = time.monotonic_ns()
        self.totals.rounds += 1
        self._discover()
        gone = self._gone()
        taken = 0
        for name, followed in list(self._followed.items()):
            taken += self._look_at(followed, now)
            if name in gone or (followed.watch is None and self.live):
                self._end(followed)
        if now >= self._flush_due_ns:
            self.writer.flush_soon()
            self._flush_due_ns = time.monotonic_ns() + FLUSH_NS
        return taken

    def is_lively(self) -> bool:
        """Whether processes come and go: the next one may soon wait at its end to be looked at."""
        return time.monotonic_ns() - self._changed_ns < LIVELY_NS

    def fill(self) -> float:
        """How full the fullest ring was at the last round, as a share of its slots."""
        return max((followed.image.fill for followed in self._followed.values()), default=0.0)

    def _look_at(self, followed: _Followed, now: int) -> int:
        image = followed.image
        if not self.live:
            return 0
        image.control.set("heartbeat_ns", now)
        taken = image.drain(now)
        if followed.watch is None:
            return taken
        if self._latest.get(image.pid) != image.name:
            self._end(followed)  # another image has taken its place, announced or not
            return taken
        if image.released and (image.state == spool.RUNNING or not image.control.get("release")):
            image.released = False  # the exec failed: the program goes on, or waits at its end already
        if image.state == spool.HOLDING and not image.released:
            self._hold(followed, now)
        elif image.released:
            self._look_after_exec(followed, now)
        elif image.state in (spool.RUNNING, spool.STOPPED):
            followed.watch.tick(now)
        return taken

    def _hold(self, followed: _Followed, now: int) -> None:
        """The process waits at its end (or before an exec): the last look, and on it goes."""
        image, watch = followed.image, followed.watch
        assert watch is not None
        taken = None
        try:
            image.drain(now)
            is_exec = image.control.get("exit_how") == 3
            taken = watch.take("exec" if is_exec else "exit")
            watch.sample(now, full=True)
            image.perf_map.hold(is_exec)
        finally:
            image.release()
            followed.released_ns = time.monotonic_ns()
        if taken is not None:
            watch.keep(taken)

    def _look_after_exec(self, followed: _Followed, now: int) -> None:
        """An exec that was let go: another image, or another program without the shim, has taken the place."""
        image = followed.image
        if image.state != spool.HOLDING or image.control.get("exit_how") != 3:
            return
        if now - followed.released_ns > EXEC_LOOK_NS and proc.runs_unseen(image.pid, _control_name(image)):
            image.notes.append(UNSEEN)
            self._end(followed)

    # ---- images come and go

    def _discover(self) -> None:
        mtime = os.stat(self._folder_name).st_mtime_ns
        if mtime == self._spool_mtime:
            return
        # What comes later in the same tick of the file system's clock does not show in the time: one more look.
        self._spool_mtime = mtime if time.time_ns() - mtime > TICK_NS else -1
        with os.scandir(self.folder) as entries:
            found = [e.name for e in entries if e.name not in self._seen and _is_image_name(e.name)]
        images = [image for name in found if (image := self._open(name)) is not None]
        for image in sorted(images, key=lambda image: image.control.get("start_ns")):
            self._adopt(image)  # parents began before their children

    def _open(self, name: str) -> Image | None:
        """The image in this folder, if its control page is complete; else it is looked at again."""
        if not (self.folder / name / "control").exists():
            if self.live:
                self._spool_mtime = -1
            return None
        try:
            image = Image(self.folder / name, self.writer, self.session_ns, self.addresses, self.backlog, self.spill)
        except (SpoolError, OSError, ValueError) as error:
            self._seen.add(name)
            self.totals.notes.append(f"{name}: {error}")
            return None
        if image.state == spool.STARTING and self.live and Path(f"/proc/{image.pid}").exists():
            self._spool_mtime = -1
            return None
        return image

    def _adopt(self, image: Image) -> None:
        name = image.name
        self._seen.add(name)
        if name in self.written:
            self._ids[name] = image.resume(self.written[name])
        else:
            self._find_process(image)
            start, parent_id = self._origin(image)
            self._ids[name] = image.register(start=start, parent_id=parent_id)
        try:
            image.open_rings(live=self.live)
        except OSError as error:
            image.notes.append(f"its events cannot be read ({error.strerror})")
        self._latest[image.pid] = name
        self._changed_ns = time.monotonic_ns()
        self.totals.processes += 1
        followed = _Followed(image, self._watch(image))
        self._followed[name] = followed
        if self.live:
            image.control.set("heartbeat_ns", time.monotonic_ns())
        if followed.watch is not None:
            followed.watch.start_maps()
            self._poll.register(followed.watch.pidfd, select.POLLIN)
            self._by_fd[followed.watch.pidfd] = name

    def _find_process(self, image: Image) -> None:
        """Who calls itself 7 in a pid namespace of its own is somebody else's 7 to us."""
        image.read_log()
        if not self.live or image.namespace == self._namespace or (not image.namespace and _maps_control(image)):
            return
        image.foreign = True
        image.pid = proc.find_mapping(_control_name(image)) or 0

    def _watch(self, image: Image) -> Watch | None:
        if not self.live or not image.pid:
            return None
        try:
            return Watch(image, self.writer, self.options, self.main.note)
        except OSError:
            return None

    def _origin(self, image: Image) -> tuple[str, int | None]:
        """(how the image came to be, the process row it came from)."""
        parent = image.control.get("parent_image")
        if parent != spool.NO_PARENT:
            return "fork", self._ids.get(f"{image.control.get('ppid')}.{parent}")
        before = self._latest.get(image.pid)
        if before is not None and before not in self._over:
            return "exec", self._ids[before]
        if self.totals.processes == 0 or image.pid == self.main.pid:
            return "start", None
        # Started through vfork or posix_spawn: no image of its own before the exec.
        parent_name = self._latest.get(proc.parent(image.pid) if image.foreign else image.control.get("ppid"))
        return "exec", self._ids.get(parent_name) if parent_name else None

    def _gone(self) -> set[str]:
        if not self._by_fd:
            return set()
        return {self._by_fd[fd] for fd, _ in self._poll.poll(0)}

    def _end(self, followed: _Followed, *, running: bool = False) -> None:
        """The image is over: what is left of it, and its row."""
        image = followed.image
        if image.name not in self._followed:
            return
        del self._followed[image.name]
        self._changed_ns = time.monotonic_ns()
        if followed.watch is not None:
            self._poll.unregister(followed.watch.pidfd)
            del self._by_fd[followed.watch.pidfd]
            followed.watch.close()
        end, status = ("running", None) if running else self._ending(image)
        image.finish(end=end, exit_status=status)
        if end != "exec":
            self._over.add(image.name)
        self.totals.events += image.events
        self.totals.lost += image.lost()
        self.totals.spilled_bytes += image.spilled_bytes()
        self.totals.waits += image.control.get("waits")
        self.totals.waited_ns += image.control.get("waited_ns")
        with contextlib.suppress(OSError):
            self.totals.spool_bytes += sum(p.stat().st_blocks * 512 for p in image.folder.iterdir())
        image.close()
        self.writer.flush_soon(image.remove if not self.keep_spool and not running else None)

    def _ending(self, image: Image) -> tuple[str, int | None]:
        """(how it ended, its status): as waitpid says for our child, else as the shim saw it."""
        get = image.control.get
        how = get("exit_how")
        announced = get("state") in (spool.HOLDING, spool.ENDED)
        replaced = self.live and self._latest.get(image.pid) != image.name
        if (announced and how == 3) or (replaced and not announced):
            self._note_successor(image)
            return "exec", None
        if image.pid == self.main.pid and self._latest.get(image.pid) == image.name and self.live:
            self._await_main()
            if self.main.status is not None:
                code = os.waitstatus_to_exitcode(self.main.status)
                if code < 0:
                    return "signal", code
                how_name = spool.EXIT_HOW[how] if announced and how < 3 else "vanished"
                return how_name, code
        if announced and how < 3:
            return spool.EXIT_HOW[how], get("exit_status") & 0xFF
        return "stopped" if get("state") == spool.STOPPED else "vanished", None

    def _note_successor(self, image: Image) -> None:
        """Says so if no image has taken the place of one that ended in an exec. (It may just have come, and gone.)"""
        if self.live and self._latest.get(image.pid) == image.name:
            self._discover()
            if self._latest.get(image.pid) == image.name:
                image.notes.append(UNSEEN)

    def _await_main(self) -> None:
        """Our child is dead (its pidfd said so): takes its status."""
        if self.main.status is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.main.pid, os.WNOHANG)
                self.main.note(pid, status)

    # ---- the end

    @property
    def following(self) -> int:
        """Images that have not ended."""
        return len(self._followed)

    def snapshot_all(self) -> None:
        """A snapshot of every process now, on request."""
        for followed in self._followed.values():
            if followed.watch is not None and not followed.image.released:
                followed.watch.snapshot("request")

    def finish(self) -> None:
        """No more rounds: images that still run are told to stop recording and end as "running"."""
        for followed in list(self._followed.values()):
            alive = self._is_alive(followed)
            if alive:
                followed.image.stop()
            self._end(followed, running=alive)

    def _is_alive(self, followed: _Followed) -> bool:
        if followed.watch is None:
            return not self.live and _maps_control(followed.image)
        return followed.image.name not in self._gone()

    def abandon(self) -> None:
        """The trace file cannot be written any more: the programs run on without us."""
        for followed in self._followed.values():
            with contextlib.suppress(KeyError):
                followed.image.stop()

    def wave_on(self) -> None:
        """After `abandon`: images that have appeared since are told to stop as well."""
        with os.scandir(self.folder) as entries:
            fresh = [e.name for e in entries if e.name not in self._seen and _is_image_name(e.name)]
        for name in fresh:
            with contextlib.suppress(SpoolError, OSError, ValueError):
                control = spool.Control(self.folder / name)
                control.set("told", 1)
                control.set("release", 1)
                self._seen.add(name)

    def cost(self) -> dict[str, Any]:
        """What collecting took: session.collector."""
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 4),
            "peak_rss_bytes": _peak_rss(),
            "rounds": self.totals.rounds,
            "spool_bytes": self.totals.spool_bytes,
            "spilled_bytes": self.totals.spilled_bytes,
            "waits": self.totals.waits,
            "waited_s": round(self.totals.waited_ns / 1e9, 4),
            "interval_s": self.options.interval_ns / 1e9,
            "notes": self.totals.notes,
        }


def _peak_rss() -> int:
    """VmHWM: ru_maxrss would also tell of what was before our exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _is_image_name(name: str) -> bool:
    pid, dot, number = name.partition(".")
    return bool(dot) and pid.isdecimal() and number.isdecimal()


def _control_name(image: Image) -> bytes:
    """How the image's control page is called in /proc/PID/maps."""
    return os.fsencode(f"{image.folder.parent.name}/{image.name}/control")


def _maps_control(image: Image) -> bool:
    """Whether the process still has the image's control page mapped."""
    return _control_name(image) in proc.maps(image.pid)
