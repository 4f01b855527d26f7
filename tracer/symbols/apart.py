"""libstdc++'s demangler in a process of its own, for C++ names that may be made to explode.

A substitution stands for a whole earlier part of the name, so a few hundred characters can describe terabytes, and
`__cxa_demangle` has no limit to set: it runs until it is done. Here it gets LIMIT_CPU_S a name and LIMIT_BYTES of
memory; the kernel ends it there (SIGPROF has no handler), and the name stays as it is.

    parent → child    the mangled name, end of line
    child → parent    length in decimal, end of line, the readable name (length 0: it is not mangled)
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

LIMIT_CPU_S = 0.5
LIMIT_BYTES = 64 << 20
#: So many names may end their process; whoever has more of them has made them to.
LIMIT_FAILURES = 3
_CHILD = """\
import ctypes, resource, signal, sys
seconds, memory, output = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
function.restype = ctypes.c_void_p
free = ctypes.CDLL(None).free
free.argtypes = [ctypes.c_void_p]
for line in sys.stdin.buffer:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    place = function(line[:-1], None, None, None)
    text = ctypes.string_at(place) if place else b""
    free(place)
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(b"%d\\n" % len(text) + text if len(text) <= output else b"0\\n")
    sys.stdout.buffer.flush()
"""


class Apart:
    """The process, started for the first name. Not for several threads at once."""

    def __init__(self, limit_output: int) -> None:
        self.limit_output = limit_output  # bytes; what is longer is not given
        self.failures = 0
        self._child: subprocess.Popen[bytes] | None = None

    def demangle(self, name: str) -> str | None:
        """The readable name; None where there is none, or where it took too much."""
        if self.failures >= LIMIT_FAILURES or "\n" in name:
            return None
        try:
            return self._ask(name)
        except (OSError, ValueError):
            self.failures += 1
            self.close()
            return None

    def _ask(self, name: str) -> str | None:
        if self._child is None:
            self._child = self._start()
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(name.encode("utf-8", "surrogateescape") + b"\n")
        self._child.stdin.flush()
        length = int(self._child.stdout.readline())  # ValueError: it has ended
        return self._child.stdout.read(length).decode("utf-8", "backslashreplace") or None

    def _start(self) -> subprocess.Popen[bytes]:
        import subprocess  # few traces have such a name: only those pay for it

        limits = [str(LIMIT_CPU_S), str(LIMIT_BYTES), str(self.limit_output)]
        command = [sys.executable, "-I", "-S", "-c", _CHILD, *limits]
        atexit.register(self.close)
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/"
        )

    def close(self) -> None:
        """Ends the process; the next name starts another one."""
        child, self._child = self._child, None
        if child is None:
            return
        atexit.unregister(self.close)
        child.kill()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        child.wait()
