"""Where events go when encoding falls behind: a folder beside the trace file, on disk.

What happens to events, in this order:

1. They are encoded and written to the trace file; a ring's slots go back to the program when that is committed.
2. Rings are getting full and the encoder, or the disk, is behind: slots are copied as they are to files here (32 bytes
   each, one write; tracer/drain_spill.c), which are as safe as the rings. They are encoded later, in their order: when
   there is time, at the end, or by `heapledger recover`.
3. The limit is reached or the disk is full: the program waits for room in its rings, 3 s at most at a time; then events
   are lost, and counted.
4. The collector is gone: the shim stops recording within 2 s, and the program runs on.

How much was spilled and how long the program waited is in `session.collector`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

#: Of the free space beside the trace file the spill takes at most this share, and at most so much.
FREE_SHARE, MAX_BYTES = 0.5, 64 << 30


def folder_of(output: Path, spool: Path) -> Path:
    """The folder for the trace file `output` of the run whose spool this is."""
    return output.with_name(f"{output.name}.spill-{spool.name}")


class Spill:
    """The spill of one session; its folder is made when it is needed first."""

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.folder = folder
        self._limit = limit_bytes
        self._used: dict[str, int] = {}
        self._failed = False

    def prefix(self, image: str) -> Path:
        """What the names of an image's files begin with."""
        return self.folder / image

    def left(self, image: str, used: int) -> int:
        """How many bytes the image may have here, which has `used` now. 0: nothing may be spilled."""
        self._used[image] = used
        if self._failed:
            return 0
        if not self._used.keys() - {image} and not used and not self.folder.is_dir():
            try:
                self.folder.mkdir(mode=0o700)
            except OSError:
                self._failed = True
                return 0
        if self._limit is None:
            space = os.statvfs(self.folder)
            self._limit = min(int(space.f_bavail * space.f_frsize * FREE_SHARE), MAX_BYTES)
        return max(0, self._limit - sum(self._used.values()) + used)

    def files_of(self, image: str) -> list[Path]:
        """The image's files, those of a ring in their order."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                name, _, rest = path.name.rpartition(".")
                base, _, ring = name.rpartition(".")
                if base == image:
                    with contextlib.suppress(ValueError):
                        found.append((int(ring, 16), int(rest, 16), path))
        return [path for _, _, path in sorted(found)]

    def forget(self, image: str) -> None:
        """All of the image is in the trace file."""
        self._used.pop(image, None)
        for path in self.files_of(image):
            path.unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """The session was given up: what is here is still wanted (recover)."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def remove(self) -> None:
        """The session is over."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)
