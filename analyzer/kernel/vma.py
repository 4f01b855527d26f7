"""One line of /proc/PID/smaps, as the ledger sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Paths of mappings that are not files although they have a name with a slash.
_SHM_PREFIXES = ("/dev/shm/", "/memfd:", "memfd:", "/SYSV", "/dev/zero", "/run/shm/")


@dataclass(frozen=True, slots=True)
class Vma:
    """A mapping [start, end) and the residency of its pages.

    `run_pages[i]` pages of `run_category[i]` (store.residency.Category) follow one another from `start`; what the runs
    do not reach is absent. Empty runs with rss_bytes > 0: the kernel gave counts but no page map.
    """

    start: int
    end: int
    perms: str
    offset: int
    path: str
    inode: int
    rss_bytes: int
    anonymous_bytes: int
    swap_bytes: int
    run_pages: npt.NDArray[np.uint32]
    run_category: npt.NDArray[np.uint8]

    @property
    def is_shared(self) -> bool:
        return self.perms[3:4] == "s"

    @property
    def is_executable(self) -> bool:
        return self.perms[2:3] == "x"

    @property
    def is_writable(self) -> bool:
        return self.perms[1:2] == "w"

    @property
    def is_accessible(self) -> bool:
        return self.perms[:3] != "---"

    @property
    def is_shm(self) -> bool:
        """Shared memory of any make, mapped shared or privately."""
        return self.path.startswith(_SHM_PREFIXES) or (self.is_shared and not self.path)

    @property
    def is_file(self) -> bool:
        return self.path.startswith("/") and not self.is_shm

    @property
    def is_anonymous(self) -> bool:
        """Private memory without a file: no name, or one the kernel or the program gave it."""
        return not self.is_file and not self.is_shm and not self.is_kernel

    @property
    def is_kernel(self) -> bool:
        return self.path.startswith(("[vdso", "[vvar", "[vsyscall", "[uprobes"))


def sane(vmas: Iterable[Vma]) -> list[Vma]:
    """By ascending address, without [vsyscall], and mappings that are empty or on top of another (in damaged files).

    [vsyscall] lies in the kernel's half of the address space, and in no process's Rss.
    """
    kept: list[Vma] = []
    for vma in sorted(vmas, key=lambda v: v.start):
        if vma.start < vma.end < 1 << 63 and (not kept or vma.start >= kept[-1].end):
            kept.append(vma)
    return kept
