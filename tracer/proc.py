"""Which process is meant, and where /proc shows its memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def memory_folder(pid: int) -> str:
    """The folder of /proc with the memory of a process: its own, or that of a thread that still runs.

    When the first thread has ended and others go on (pthread_exit in main) it is a zombie, which has no memory to show.
    """
    own = f"/proc/{pid}"
    if not _has_memory(own):
        with contextlib.suppress(OSError):
            for tid in os.listdir(f"{own}/task"):
                if _has_memory(f"{own}/task/{tid}"):
                    return f"{own}/task/{tid}"
    return own


def _has_memory(folder: str) -> bool:
    try:
        return not Path(folder, "statm").read_bytes().startswith(b"0 ")
    except OSError:
        return False


def is_dead(pid: int, tid: int) -> bool:
    """Whether the thread has ended (a first thread stays as a zombie as long as there are others)."""
    try:
        return Path(f"/proc/{pid}/task/{tid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def pid_namespace() -> str:
    """The namespace that our pids belong to; "" if it cannot be told."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def maps(pid: int) -> bytes:
    """/proc/PID/maps; nothing if the process is gone or may not be looked at."""
    try:
        return Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return b""


def parent(pid: int) -> int:
    """The parent's pid; 0 if the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def find_mapping(path: bytes) -> int | None:
    """The pid of another process that has a file with this ending of its path mapped. Looks at all: 0.1 ms each."""
    ours = str(os.getpid())
    for name in os.listdir("/proc"):
        if name.isdecimal() and name != ours and path in maps(int(name)):
            return int(name)
    return None


def runs_unseen(pid: int, ours: bytes) -> bool:
    """Whether the process runs a program that the shim is not part of, after one that had `ours` mapped.

    False as long as it cannot be told: the loader maps the shim before anything else, but may not have come that far
    (the machine is busy, or a debugger holds the process at its start).
    """
    text = maps(pid)
    if ours in text or b"libheapledger" in text:
        return False
    files = {line.split(None, 5)[5] for line in text.splitlines() if line.count(b"/")}
    only_loader = len(files) <= 2 and any(b"/ld-linux" in file for file in files)
    return bool(files) and not only_loader
