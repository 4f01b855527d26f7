"""Stop all threads of a process for a moment, unnoticed: PTRACE_SEIZE and PTRACE_INTERRUPT, then PTRACE_DETACH.

A stop like this makes some blocking system calls return EINTR that never would in an undisturbed run (epoll_wait,
sigtimedwait, semop ...: man 7 signal, "Interruption of system calls and library functions by stop signals"). So a
thread that sleeps in one of those is left alone: asleep it changes nothing, and whether it slept through is checked
afterwards. One that enters such a call just then is interrupted; its EINTR is turned into a restart before it goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from heapledger.errors import ProcessGoneError
from heapledger.tracer.proc import is_dead

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

_CONT, _GETREGS, _SETREGS, _DETACH = 7, 12, 13, 17
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_WALL = 0x40000000
_EVENT_STOP = 128
_EINTR = 4
#: The kernel's own code for "restart, unless a handler runs first".
_ERESTARTNOHAND = 514
#: System calls that give EINTR after a stop, by number on x86-64: semop, semtimedop, msgsnd, msgrcv, rt_sigtimedwait,
#: io_getevents, epoll_wait, epoll_pwait, io_pgetevents, epoll_pwait2.
_RESTARTED = frozenset({65, 220, 69, 70, 128, 208, 232, 281, 333, 441})
#: struct user_regs_struct: 27 words; the two that matter here.
_REGS_WORDS, _RAX, _ORIG_RAX = 27, 10, 15

#: What to do with a child's exit status that turned up while we waited for a stop: (pid, status).
OnStatus = Callable[[int, int], None]


def _ptrace(request: int, tid: int, data: int = 0) -> int:
    """The errno, 0 for success."""
    ctypes.set_errno(0)
    result = _libc.ptrace(request, tid, None, data)
    return ctypes.get_errno() if result == -1 else 0


def _undo_eintr(tid: int) -> None:
    regs = (ctypes.c_ulonglong * _REGS_WORDS)()
    if _ptrace(_GETREGS, tid, ctypes.addressof(regs)):
        return
    if regs[_RAX] == 2**64 - _EINTR and regs[_ORIG_RAX] in _RESTARTED:
        regs[_RAX] = 2**64 - _ERESTARTNOHAND
        _ptrace(_SETREGS, tid, ctypes.addressof(regs))


def _sleeps_in(pid: int, tid: int) -> str:
    """What tells one sleep from another, of a thread that sleeps in a call that must not be disturbed; else ""."""
    try:
        call = Path(f"/proc/{pid}/task/{tid}/syscall").read_text()
        number = call.split()[0]
        if not number.isdecimal() or int(number) not in _RESTARTED:
            return ""
        status = Path(f"/proc/{pid}/task/{tid}/status").read_text()
        return call + status[status.find("voluntary_ctxt_switches") :]
    except (OSError, IndexError):
        return ""


def _threads(pid: int) -> set[int]:
    try:
        return {int(name) for name in os.listdir(f"/proc/{pid}/task")}
    except OSError:
        return set()


class _Stop:
    def __init__(self, pid: int, on_status: OnStatus, deadline: float) -> None:
        self.pid = pid
        self.on_status = on_status
        self.deadline = deadline
        self.seized: set[int] = set()
        self.stopped: set[int] = set()
        self.ended: set[int] = set()
        self.asleep: dict[int, str] = {}

    def kept_still(self) -> bool:
        """Whether the threads that were left asleep have slept on until now."""
        return all(_sleeps_in(self.pid, tid) == sleep for tid, sleep in self.asleep.items())

    def all_threads(self) -> None:
        """Stops every thread, also those made meanwhile."""
        while fresh := _threads(self.pid) - self.seized - self.ended - self.asleep.keys():
            for tid in fresh:
                if sleep := _sleeps_in(self.pid, tid):
                    self.asleep[tid] = sleep
                else:
                    self._seize(tid)
            for tid in list(self.seized - self.stopped):
                self._wait(tid)
        if not self.stopped and not self.asleep:
            raise ProcessGoneError(f"process {self.pid} has no thread left to stop")

    def _seize(self, tid: int) -> None:
        error = _ptrace(_SEIZE, tid)
        if error in (0,):
            self.seized.add(tid)
            _ptrace(_INTERRUPT, tid)
        elif error == 3 or is_dead(self.pid, tid):  # ESRCH: it ended meanwhile; EPERM: long ago, and is a zombie
            self.ended.add(tid)
        else:
            raise PermissionError(error, f"ptrace of thread {tid}: {os.strerror(error)}")

    def _wait(self, tid: int) -> None:
        """Until `tid` is stopped or gone. Signals that arrive on the way are delivered."""
        while True:
            try:
                got, status = os.waitpid(tid, _WALL | os.WNOHANG)
            except ChildProcessError:
                self.seized.discard(tid)
                # It is on its way out; do not come back to it.
                self.stopped.discard(tid)
                if tid in _threads(self.pid):
                    raise ProcessGoneError(f"process {self.pid} is ending") from None
                return
            if got == 0:
                if time.monotonic() > self.deadline:
                    raise ProcessGoneError(f"thread {tid} did not stop in time")
                time.sleep(0.0002)
                continue
            if not os.WIFSTOPPED(status):
                self.on_status(tid, status)
                self.seized.discard(tid)
                return
            if status >> 16 == _EVENT_STOP:
                self.stopped.add(tid)
                return
            _ptrace(_CONT, tid, os.WSTOPSIG(status))

    def detach(self) -> None:
        for tid in self.seized:
            if tid in self.stopped:
                _undo_eintr(tid)
                _ptrace(_DETACH, tid)
            else:
                self._detach_running(tid)

    def _detach_running(self, tid: int) -> None:
        """A thread that was seized and never seen stopped: it has to stop before it can be let go."""
        limit = time.monotonic() + 1.0
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < limit:
                got, status = os.waitpid(tid, _WALL | os.WNOHANG)
                if got == 0:
                    time.sleep(0.0005)
                    continue
                if not os.WIFSTOPPED(status):
                    self.on_status(tid, status)
                    return
                number = 0 if status >> 16 == _EVENT_STOP else os.WSTOPSIG(status)
                if number == 0:
                    _undo_eintr(tid)
                _ptrace(_DETACH, tid, number)
                return


@contextlib.contextmanager
def stopped(pid: int, *, on_status: OnStatus, timeout_s: float = 1.0) -> Iterator[_Stop]:
    """All threads of `pid` are stopped inside the `with` (or asleep: ask `kept_still` before it ends), and go on after
    it whatever happens.

    PermissionError where ptrace is denied, ProcessGoneError where the process ended. A SIGINT that comes meanwhile is
    kept for later: a Python exception between seize and detach would leave a thread behind.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    stop = _Stop(pid, on_status, time.monotonic() + timeout_s)
    try:
        stop.all_threads()
        yield stop
    finally:
        stop.detach()
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
