"""Counters of a live process: /proc/PID/statm (6 µs), status and stat (50 µs), smaps_rollup (can take 80 ms a GiB).

RSS of statm and status is exact on kernels before 6.2 without threads and from 6.16 on; between them it may be off by a
batch per CPU (specs/kernel-memory.md, "Self-check identities"); snapshots trust smaps.
"""

from __future__ import annotations

import os
import time

from heapledger.tracer.proc import memory_folder

PAGE = os.sysconf("SC_PAGE_SIZE")
#: Fields of /proc/PID/status in kB → column of `sample`
_STATUS = {
    "RssAnon": "rss_anon",
    "RssFile": "rss_file",
    "RssShmem": "rss_shmem",
    "VmSwap": "swap",
    "VmSize": "vm_size",
    "VmHWM": "vm_hwm",
    "VmPTE": "vm_pte",
}
#: smaps_rollup may take this share of the wall time of a run.
ROLLUP_SHARE = 0.01
_MAX_READ = 1 << 16


class Sampler:
    """Reads the counters of one process; keeps /proc/PID/statm open (the file survives pid reuse: it then reads 0)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._folder = f"/proc/{pid}"
        self._statm = os.open(f"{self._folder}/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._born_ns = time.monotonic_ns()
        self._rollup_spent_ns = 0
        self._rollup_last_ns = 0

    def close(self) -> None:
        if self._statm >= 0:
            os.close(self._statm)
            self._statm = -1

    def rss(self) -> int:
        """Resident bytes now; 0 when the process is gone."""
        return self._rss() or (self._rss() if self._moved() else 0)

    def _rss(self) -> int:
        try:
            fields = os.pread(self._statm, 256, 0).split()
        except OSError:
            return 0
        return int(fields[1]) * PAGE if len(fields) > 1 else 0

    def _moved(self) -> bool:
        """Whether another thread shows the memory that the first one, which has ended, does not show any more."""
        folder = memory_folder(self.pid)
        if folder == self._folder:
            return False
        try:
            fd = os.open(f"{folder}/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        os.close(self._statm)
        self._folder, self._statm = folder, fd
        return True

    def sample(self, *, full: bool = False) -> dict[str, int | None] | None:
        """One row of `sample` without its time; None when the process is gone. `full`: with Pss whatever it costs."""
        row: dict[str, int | None] = {}
        rss = self.rss()
        if rss == 0:
            return None
        row.update(self._status())
        row.update(self._faults())
        row["rss"] = rss
        now = time.monotonic_ns()
        if full or self._rollup_affordable(now):
            row["pss"] = self._pss(now)
        return row

    def _read(self, name: str) -> bytes:
        # A thread's `stat` has that thread's faults only.
        folder = f"/proc/{self.pid}" if name == "stat" else self._folder
        try:
            fd = os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            return os.read(fd, _MAX_READ)
        except OSError:
            return b""
        finally:
            os.close(fd)

    def _status(self) -> dict[str, int | None]:
        row: dict[str, int | None] = {}
        for line in self._read("status").decode(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name in _STATUS:
                row[_STATUS[name]] = int(value.split()[0]) * 1024
            elif name == "Threads":
                row["threads"] = int(value)
        return row

    def _faults(self) -> dict[str, int | None]:
        # The name in parentheses may hold spaces and parentheses: fields are counted from the last ")".
        fields = self._read("stat").rpartition(b")")[2].split()
        if len(fields) < 10:
            return {}
        return {"minor_faults": int(fields[7]), "major_faults": int(fields[9])}

    def _rollup_affordable(self, now_ns: int) -> bool:
        if now_ns - self._rollup_last_ns < 1_000_000_000:
            return False
        return self._rollup_spent_ns <= (now_ns - self._born_ns) * ROLLUP_SHARE

    def _pss(self, now_ns: int) -> int | None:
        text = self._read("smaps_rollup")
        self._rollup_last_ns = now_ns
        self._rollup_spent_ns += time.monotonic_ns() - now_ns
        for line in text.splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
        return None
