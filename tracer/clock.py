"""Time-stamp counter to nanoseconds of CLOCK_MONOTONIC.

The shim stamps events with the TSC and leaves one (ns, TSC) pair at its start and one at its end. While the program
runs there is no end pair, so the collector reads a pair of its own: eight bytes of machine code in an executable page
(`rdtsc`), as Python has no way to read the counter. Where such a page is not allowed (hardened systems) the rate is
taken from the kernel's own figure of the TSC frequency.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from heapledger.late import np

#: rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
#: From this age on (ns) the rate of a process is kept: the error of a pair (~100 ns) is then below 0.1 ppm.
SETTLED_NS = 2_000_000_000


def _make_reader() -> tuple[Callable[[], int] | None, mmap.mmap | None]:
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except (OSError, ValueError):
        return None, None
    page.write(_RDTSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(ctypes.c_uint64)(address), page


_read_tsc, _page = _make_reader()


def pair() -> tuple[int, int] | None:
    """(CLOCK_MONOTONIC ns, TSC) of one moment: the closest of five tries. None where the TSC cannot be read."""
    if _read_tsc is None:
        return None
    best: tuple[int, int, int] | None = None
    for _ in range(5):
        before = time.monotonic_ns()
        tsc = _read_tsc()
        after = time.monotonic_ns()
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, tsc)
    assert best is not None
    return best[1], best[2]


def _frequency_hz() -> float:
    """A guess at the TSC's frequency, from /proc/cpuinfo."""
    found = re.search(r"^cpu MHz\s*:\s*([0-9.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return float(found[1]) * 1e6 if found else 2.5e9


class Clock:
    """Ticks of one process image → ns since the session began."""

    def __init__(self, *, start_ns: int, start_tsc: int, tick_shift: int, session_ns: int) -> None:
        self.start_ns = start_ns
        self.start_tsc = start_tsc
        self.tick_shift = tick_shift
        self.session_ns = session_ns
        self._rate: float | None = None
        self._settled = False

    def set_end(self, end_ns: int, end_tsc: int) -> None:
        """The pair of the process's end: the best one there is, if far enough from the start."""
        if not self._settled and end_ns > self.start_ns and end_tsc > self.start_tsc:
            self._rate = (end_ns - self.start_ns) / (end_tsc - self.start_tsc)
            self._settled = True

    def _ns_per_cycle(self) -> float:
        if self._settled and self._rate is not None:
            return self._rate
        now = pair()
        if now is not None and now[0] > self.start_ns and now[1] > self.start_tsc:
            self._rate = (now[0] - self.start_ns) / (now[1] - self.start_tsc)
            self._settled = now[0] - self.start_ns > SETTLED_NS
        elif self._rate is None:
            self._rate = 1e9 / _frequency_hz()
        return self._rate or 0.0

    def tick_at(self, ns: int) -> int:
        """The tick at a moment of CLOCK_MONOTONIC."""
        return (self.start_tsc + round((ns - self.start_ns) / self._ns_per_cycle())) >> self.tick_shift

    @property
    def is_settled(self) -> bool:
        """Whether `line` stays as it is from now on."""
        return self._settled

    def line(self) -> tuple[int, int, float, float]:
        """(start_tsc, tick_shift, ns a cycle, ns of the start since the session began): ticks are on this line."""
        return self.start_tsc, self.tick_shift, self._ns_per_cycle(), float(self.start_ns - self.session_ns)

    def times(self, ticks: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """ns since the session began; never before it."""
        cycles = (ticks << np.uint64(self.tick_shift)).view(np.int64) - self.start_tsc
        ns = cycles * self._ns_per_cycle()
        ns += self.start_ns - self.session_ns
        np.maximum(ns, 0, out=ns)
        return ns.astype(np.uint64)
