"""Start a program under the shim, collect while it runs, and end as it ended.

The program gets our stdin, stdout, stderr, working directory, process group, signal mask and dispositions, so that a
terminal treats it as if it had been started alone. Signals of the terminal (Ctrl-C) reach it directly, because it is in
our process group; those sent to us by another process are passed on. We stay until the trace is written.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heapledger import _preload
from heapledger.errors import HeapledgerError, TargetError, UsageError
from heapledger.tracer import environment, host
from heapledger.tracer.target import Target, examine

#: A spool in memory (/dev/shm) must leave this much free; else it goes beside the trace file.
SHM_FREE_BYTES = 256 << 20
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR2)
_WAITED = (*_FORWARDED, signal.SIGUSR1, signal.SIGCHLD, signal.SIGCONT)
_JOB_STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_SI_KERNEL = 0x80
#: The main loop sleeps between these (s), so long that the fullest ring will be about so full (share of its slots).
_SLEEP_MIN, _SLEEP_MAX, _FILL = 0.0005, 0.01, 0.25
SESSION_FILE = "session.json"


@dataclass(slots=True)
class RunOptions:
    """What `heapledger run` was asked for. Times in seconds."""

    output: Path | None = None
    interval: float = 0.05
    snapshot_every: float = 0.0
    hold: float = 10.0
    wait_children: float = 5.0
    residency: bool = True
    peaks: bool = True
    symbols: bool = True
    quiet: bool = False
    depth: int = 128
    free_stacks: bool = True
    sample_bytes: int = 0
    sample_seed: int = 0
    ring_slots: int = 131072
    keep_spool: bool = False
    spill_limit: int | None = None  # bytes; None: half of what is free there


@dataclass(slots=True)
class Outcome:
    """How a run ended: the program's wait status, and where its trace is (None: there is none)."""

    status: int
    trace: Path | None
    spool: Path | None = None
    summary: str = ""
    problems: list[str] = field(default_factory=list)


def say(text: str, *, quiet: bool = False) -> None:
    """A line of our own, on stderr. The program shares the terminal: one write, so that lines do not mix."""
    if not quiet:
        with contextlib.suppress(OSError):
            os.write(2, f"heapledger: {text}\n".encode(errors="replace"))


def default_output(command: str, pid: int) -> Path:
    """heapledger.NAME.PID.heapledger in the working directory."""
    name = "".join(c if c.isalnum() or c in "-_+." else "_" for c in os.path.basename(command)) or "program"
    return Path(f"heapledger.{name}.{pid}.heapledger")


def check_output(output: Path | None) -> None:
    """Before the program starts: UsageError where the trace cannot be written."""
    folder = output.parent if output is not None else Path()
    if not folder.is_dir():
        raise UsageError(f"there is no folder {str(folder)!r} to write the trace to", hint="make it, or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {str(folder)!r} is not writable", hint="choose another place with -o")
    if output is None or not output.exists():
        return
    if not output.is_file():
        raise UsageError(f"{str(output)!r} is not a file", hint="name a file with -o")
    with open(output, "rb") as file:
        head = file.read(16)
    if head and head != b"SQLite format 3\0":
        raise UsageError(
            f"{str(output)!r} exists and is not a trace file", hint="it is left alone: choose another name"
        )


def make_spool(output: Path | None) -> Path:
    """A new private folder for the spool: in memory if there is room, else beside the trace."""
    folders = [output.parent if output is not None else Path.cwd()]
    shm = Path("/dev/shm")
    with contextlib.suppress(OSError):
        space = os.statvfs(shm)
        if space.f_bavail * space.f_frsize >= SHM_FREE_BYTES and os.access(shm, os.W_OK | os.X_OK):
            folders.insert(0, shm)
    for folder in folders:
        with contextlib.suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="heapledger-", dir=folder.resolve()))
    raise HeapledgerError("no folder for the spool can be made", hint="free some space in /dev/shm or beside the trace")


def _library_for(spool: Path) -> Path:
    """The shim's path for LD_PRELOAD, which cannot hold spaces or colons: then a link in the spool stands for it."""
    library = _preload.path()
    if not any(c in str(library) for c in " :;\t\n$"):
        return library
    link = spool / "libheapledger.so"
    link.symlink_to(library)
    return link


@dataclass(slots=True)
class Session:
    """What is known before the program runs; kept in the spool so that `recover` finds it."""

    command: list[str]
    cwd: str
    start_ns: int
    start_unix_ns: int
    host: dict[str, Any]
    output: str = ""
    main_pid: int = 0
    collector_pid: int = 0
    symbols: bool = True

    def save(self, folder: Path) -> None:
        text = json.dumps({name: getattr(self, name) for name in self.__slots__})
        partial = folder / (SESSION_FILE + ".new")
        partial.write_text(text)
        partial.replace(folder / SESSION_FILE)

    @classmethod
    def load(cls, folder: Path) -> Session:
        """OSError or ValueError where there is none."""
        data = json.loads((folder / SESSION_FILE).read_text())
        return cls(**{name: data[name] for name in cls.__slots__})


def run(command: list[str], options: RunOptions) -> Outcome:
    """Runs and traces `command`. Errors before the program starts are raised; later ones are told, and it runs on."""
    signals = _Signals()
    spool: Path | None = None
    try:
        target = examine(command[0], os.environ)
        check_output(options.output)
        spool = make_spool(options.output)
        for warning in target.warnings:
            say(f"warning: {warning}", quiet=options.quiet)
        return _Run(target, command, options, spool, signals).run()
    except (HeapledgerError, OSError):
        if spool is not None:
            shutil.rmtree(spool, ignore_errors=True)
        raise
    finally:
        signals.restore()


class _Signals:
    """Signals are taken by sigtimedwait, which says who sent them; those that are ignored stay ignored.

    Blocked before anything starts a thread: one that does not block them would be chosen to receive them.
    """

    def __init__(self) -> None:
        self.waited = {s for s in _WAITED if signal.getsignal(s) is not signal.SIG_IGN or s == signal.SIGCHLD}
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.inherited = {int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, self.waited)}

    def restore(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.inherited)


class _Pace:
    """How long to sleep: rounds of a busy program should each find much to do, but no ring full; idle ones are rare."""

    def __init__(self) -> None:
        self._sleep = _SLEEP_MIN
        self._before = time.monotonic()

    def sleep(self, fill: float, *, lively: bool) -> float:
        """Seconds, after a round that found the fullest ring with this share of its slots in use. `lively`: processes
        come and go, and should not have to wait for us."""
        now = time.monotonic()
        passed, self._before = now - self._before, now
        wanted = passed * _FILL / fill if fill > 0 else _SLEEP_MAX
        wanted = min(wanted, _SLEEP_MIN) if lively else wanted
        # What came in a burst may go on: slower by small steps, faster at once.
        self._sleep = min(wanted, max(self._sleep, _SLEEP_MIN) * 1.25, _SLEEP_MAX)
        return self._sleep if self._sleep >= _SLEEP_MIN else 0.0


class _Run:
    def __init__(self, target: Target, command: list[str], options: RunOptions, spool: Path, signals: _Signals) -> None:
        self.target = target
        self.command = command
        self.options = options
        self.spool = spool
        self.problems: list[str] = []
        self.signals = signals
        self.tracing = True

    # ---- start

    def run(self) -> Outcome:
        session = Session(
            command=self.command,
            cwd=os.getcwd(),
            start_ns=time.monotonic_ns(),
            start_unix_ns=time.time_ns(),
            host=host.facts(),
            collector_pid=os.getpid(),
            symbols=self.options.symbols,
        )
        if self.options.output is not None:  # a default name has the program's pid in it
            session.output = str(self.options.output.absolute())
        session.save(self.spool)
        with contextlib.suppress(Exception):  # told in `_collect`
            _import_collector()
        pid = self._spawn()
        output = self.options.output or default_output(self.command[0], pid)
        session.output, session.main_pid = str(output.absolute()), pid
        with contextlib.suppress(OSError):
            session.save(self.spool)
        return self._collect(session, output, pid)

    def _spawn(self) -> int:
        preload = {"hold_ms": int(self.options.hold * 1000), "ring_slots": self.options.ring_slots}
        stacks = {"depth": self.options.depth, "free_stacks": int(self.options.free_stacks)}
        sample = {"sample": self.options.sample_bytes, "sample_seed": self.options.sample_seed}
        settings = {**preload, **stacks, **sample, "quiet": int(self.options.quiet)}
        variables = environment.for_target(
            environment.of_caller(),
            library=_library_for(self.spool),
            spool=self.spool,
            options={name: str(value) for name, value in settings.items()},
        )
        try:
            return os.posix_spawn(
                self.target.path,
                self.command,
                variables,
                setsigmask=self.signals.inherited,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )
        except OSError as error:
            raise TargetError(f"{self.target.path!r} cannot be started ({error.strerror})") from None

    # ---- collect

    def _collect(self, session: Session, output: Path, pid: int) -> Outcome:
        _raise_open_files()
        _fill_standard_files()
        try:
            from heapledger.store.writer import TraceWriter
            from heapledger.tracer.collect import Collector, Exit
            from heapledger.tracer.spill import Spill, folder_of
            from heapledger.tracer.watch import WatchOptions
        except Exception as error:  # noqa: BLE001  as below: too little memory (ulimit -v) is enough
            self._give_up(error, None, None)
            return Outcome(os.waitpid(pid, 0)[1], None, self.spool, problems=self.problems)

        main = Exit(pid)
        writer: TraceWriter | None = None
        collector: Collector | None = None
        spill = Spill(folder_of(Path(session.output), self.spool), self.options.spill_limit)
        try:
            writer = TraceWriter(
                output,
                source="run",
                command=session.command,
                cwd=session.cwd,
                start_ns=session.start_ns,
                start_unix_ns=session.start_unix_ns,
                host=session.host,
                background=True,
            )
            watch = WatchOptions(
                interval_ns=int(self.options.interval * 1e9),
                snapshot_every_ns=int(self.options.snapshot_every * 1e9),
                residency=self.options.residency,
                peaks=self.options.peaks,
            )
            collector = Collector(
                self.spool,
                writer,
                session_ns=session.start_ns,
                options=watch,
                main=main,
                keep_spool=self.options.keep_spool,
                spill=spill,
            )
            collector.addresses.wanted = self.options.symbols
            self._follow(collector, main)
            collector.finish()
            self._symbols(collector, writer)
            writer.set_collector({**collector.cost(), "options": self._options_kept()})
            writer.close(time.monotonic_ns() - session.start_ns)
        except Exception as error:  # noqa: BLE001  whatever went wrong here, the program must run on and end as it does
            self._give_up(error, collector, writer)
            spill.remove_if_empty()
            self._see_out(main, collector)
            return Outcome(self._status(main), None, self.spool, problems=self.problems)
        if not self.options.keep_spool:
            shutil.rmtree(self.spool, ignore_errors=True)
            spill.remove()
        totals = collector.totals
        if totals.processes == 0:
            self.problems.append("nothing was recorded: the shim was not loaded into the program")
        kept = self.spool if self.options.keep_spool else None
        return Outcome(self._status(main), output, kept, _summary(totals, output), self.problems)

    def _options_kept(self) -> dict[str, Any]:
        kept = {name: getattr(self.options, name) for name in self.options.__slots__}
        return {**kept, "output": None if self.options.output is None else str(self.options.output)}

    def _follow(self, collector: Any, main: Any) -> None:
        """Rounds until the program and its children have ended, or the children's time is over."""
        pace = _Pace()
        deadline = 0.0
        while True:
            collector.round()
            if main.status is not None:
                deadline = deadline or time.monotonic() + self.options.wait_children
                if collector.following == 0 or time.monotonic() > deadline:
                    collector.round()
                    if collector.following == 0 or time.monotonic() > deadline:
                        return
            self._take_signal(pace.sleep(collector.fill(), lively=collector.is_lively()), collector, main)

    def _take_signal(self, sleep: float, collector: Any, main: Any) -> None:
        info = signal.sigtimedwait(self.signals.waited, sleep)
        if info is None:
            return
        if info.si_signo == signal.SIGCHLD:
            self._child_changed(main)
        elif info.si_signo == signal.SIGUSR1:
            if collector is not None and self.tracing:
                collector.snapshot_all()
        elif info.si_signo == signal.SIGCONT:
            self._pass_on(main, signal.SIGCONT)
        elif info.si_code != _SI_KERNEL and info.si_pid != main.pid:
            # From the terminal it has reached the program already: we are in one process group.
            self._pass_on(main, signal.Signals(info.si_signo))

    def _pass_on(self, main: Any, number: signal.Signals) -> None:
        if main.status is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(main.pid, number)

    def _child_changed(self, main: Any) -> None:
        while main.status is None:
            try:
                pid, status = os.waitpid(main.pid, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            main.note(pid, status)
            if os.WIFSTOPPED(status) and os.WSTOPSIG(status) in _JOB_STOPS:
                self._stop_along(main)

    def _stop_along(self, main: Any) -> None:
        """The program stopped for job control: the shell has to see its whole job stop.

        Ctrl-Z stops us as well, and perhaps just now: if we have been stopped and continued, SIGCONT says so.
        """
        if signal.sigtimedwait({signal.SIGCONT}, 0.05) is None and _is_stopped(main.pid):
            os.kill(os.getpid(), signal.SIGSTOP)
            signal.sigtimedwait({signal.SIGCONT}, 0.05)
        self._pass_on(main, signal.SIGCONT)

    # ---- end

    def _symbols(self, collector: Any, writer: Any) -> None:
        if not self.options.symbols:
            return
        from heapledger.tracer.resolve import resolve

        progress = None if self.options.quiet or not os.isatty(2) else draw_progress
        try:
            resolve(collector.addresses, writer, progress)
        except HeapledgerError:
            raise
        except Exception as error:  # noqa: BLE001  a trace without names is better than none
            self.problems.append(f"symbols could not be resolved: {type(error).__name__}: {error}")
        finally:
            if progress is not None:
                clear_progress()

    def _give_up(self, error: Exception, collector: Any, writer: Any) -> None:
        self.tracing = False
        if collector is not None:
            collector.abandon()
        if isinstance(error, HeapledgerError):
            text = error.message + (f"; {error.hint}" if error.hint else "")
        else:
            text = f"collecting failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if os.environ.get("HEAPLEDGER_DEBUG"):
                raise error
        self.problems.append(f"{text}; the program runs on untraced")
        say(self.problems[-1])
        if writer is not None:
            with contextlib.suppress(HeapledgerError):
                writer.close()

    def _see_out(self, main: Any, collector: Any) -> None:
        """Waits for the program after tracing was given up."""
        while main.status is None:
            if collector is not None:
                with contextlib.suppress(OSError):
                    collector.wave_on()
            self._child_changed(main)
            if main.status is None:
                self._take_signal(0.05, None, main)

    def _status(self, main: Any) -> int:
        if main.status is None:
            main.note(*os.waitpid(main.pid, 0))
        return int(main.status)


def _import_collector() -> None:
    """What takes long, before the program starts: it would fill its rings meanwhile, and wait for us at its end."""
    importlib.import_module("heapledger.tracer.collect")
    importlib.import_module("heapledger.tracer.residency").prepare()
    gc.freeze()  # what is there now stays: collections need not look at it


def _raise_open_files() -> None:
    """A few files are open for each process that is followed. (The program was started with the limit as it was.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _fill_standard_files() -> None:
    """A standard stream that was closed (`>&-`) stays closed for the program. Ours goes nowhere: else the next file
    that we open would be taken for stderr, and be written into."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        fd = os.dup(fd)
    os.close(fd)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except OSError:
        return False


def _summary(totals: Any, output: Path) -> str:
    processes = "" if totals.processes == 1 else f" of {totals.processes} processes"
    lost = f", {totals.lost:,} LOST" if totals.lost else ""
    return f"{totals.events:,} events{processes}{lost} → {output}"


def draw_progress(done: int, total: int) -> None:
    """A bar on the terminal, redrawn in place."""
    filled = 30 * done // max(1, total)
    bar = "━" * filled + " " * (30 - filled)
    os.write(2, f"\rheapledger: symbols {bar} {done:,} of {total:,}\x1b[K".encode())


def clear_progress() -> None:
    """Wipes the bar."""
    os.write(2, b"\r\x1b[K")


def end_as(status: int) -> None:
    """Ends this process as the program ended: with its exit status, or by the same signal (without a second core)."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by who started us
            with contextlib.suppress(OSError):
                stream.flush()
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        time.sleep(1)  # the signal is on its way
        os._exit(128 + number)
    os._exit(os.WEXITSTATUS(status))
