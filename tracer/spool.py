"""The spool as the collector sees it: preload/spool.h, in Python.

Drawings of every file and slot are in that header; the numbers here repeat it, and a test compares the two.
`Control` is the control page, `Nodes` reads the trie of call stacks, `Log` the text log. Rings are read by
tracer/drain.c, and by `rings`, which says the same in Python.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

from heapledger.errors import SpoolError
from heapledger.tracer import _nodes

MAGIC_CONTROL = b"HLCTRL01"
MAGIC_RING = b"HLRING01"
VERSION = 1
PAGE = 4096
SEGMENT_NODES = 65536
SPAN_LATE = 0x7FFFFF
EXCESS_LATE = 0xFFFF
AUX_EXT = 0xFFFF
SIZE_EXT = 0xFFFFFFFFFFFF

KIND_TIME, KIND_LATE, KIND_EXT = 61, 62, 63

STARTING, RUNNING, HOLDING, ENDED, STOPPED = range(5)
STOP_REASONS = (
    "",
    "no space left for the spool",
    "no memory left",
    "the collector was gone",
    "told to stop",
    "the program forbade itself (seccomp) the system calls of recording",
    "the spool was out of reach: the program had changed its user or its root, or forbade itself files",
)
RING_FREE, RING_OWNED, RING_LEFT = range(3)
IP_CUT, IP_LOST = 1, 2
EXIT_HOW = ("exit", "_exit", "quick_exit", "exec")
NO_PARENT = 0xFFFFFFFF

#: What a ring or a control page may at most claim: a damaged header must not make us take memory.
MAX_SLOTS = 1 << 24
MAX_RINGS = 1 << 16
#: Slots taken from a ring at once: bounds the memory of a round (about 150 bytes a slot).
MAX_READ = 1 << 16
SLOT_BYTES = 32

#: struct hl_control: field → (offset, bytes, signed)
CONTROL_FIELDS: dict[str, tuple[int, int, bool]] = {
    "version": (8, 4, False),
    "pid": (12, 4, False),
    "ppid": (16, 4, False),
    "parent_image": (20, 4, False),
    "fork_seq": (24, 8, False),
    "start_break": (32, 8, False),
    "start_ns": (40, 8, False),
    "start_tsc": (48, 8, False),
    "end_ns": (56, 8, False),
    "end_tsc": (64, 8, False),
    "tick_shift": (72, 4, False),
    "hold_ms": (76, 4, False),
    "ring_slots": (80, 4, False),
    "stop_reason": (84, 4, False),
    "stop_errno": (88, 4, True),
    "exit_how": (92, 4, False),
    "exit_status": (96, 4, True),
    "main_tid": (100, 4, False),
    "self_low": (104, 8, False),
    "self_high": (112, 8, False),
    "sample_bytes": (120, 8, False),
    "state": (128, 4, False),
    "rings": (132, 4, False),
    "nodes": (136, 4, False),
    "unlogged": (140, 4, False),
    "lost": (144, 8, False),
    "unseen": (152, 4, False),
    "waits": (156, 4, False),
    "waited_ns": (160, 8, False),
    "release": (256, 4, False),
    "told": (260, 4, False),
    "heartbeat_ns": (264, 8, False),
    "seq": (384, 8, False),
    "coarse": (512, 4, False),
}

#: struct hl_ring, likewise
RING_FIELDS: dict[str, tuple[int, int, bool]] = {
    "index": (8, 4, False),
    "tid": (12, 4, False),
    "state": (16, 4, False),
    "capacity": (20, 4, False),
    "generation": (24, 4, False),
    "thread": (28, 4, False),
    "thread_pointer": (32, 8, False),
    "stack_low": (40, 8, False),
    "stack_high": (48, 8, False),
    "head": (128, 8, False),
    "tail": (256, 8, False),
}

_TYPES = {(4, False): "I", (4, True): "i", (8, False): "Q"}


class Page:
    """Named fields over a mapped file. Each is an item of a view of words: one aligned load or store."""

    def __init__(self, path: Path, magic: bytes, fields: dict[str, tuple[int, int, bool]]) -> None:
        self.path = path
        with open(path, "r+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size < PAGE:
                raise SpoolError(f"{path.name} is cut short ({size} bytes)", hint="this part of the spool is skipped")
            self.map = mmap.mmap(file.fileno(), size)
        if self.map[:8] != magic:
            raise SpoolError(f"{path.name} does not begin with {magic.decode()}", hint="is this a heapledger spool?")
        page = memoryview(self.map)[:PAGE]
        words = {kind: page.cast(kind) for kind in ("I", "i", "Q")}
        self._fields: dict[str, tuple[memoryview, int]] = {
            name: (words[_TYPES[size, signed]], offset // size) for name, (offset, size, signed) in fields.items()
        }

    def get(self, name: str) -> int:
        words, at = self._fields[name]
        return int(words[at])

    def set(self, name: str, value: int) -> None:
        words, at = self._fields[name]
        words[at] = value

    def address(self, name: str) -> int:
        """Where a field is mapped."""
        words, at = self._fields[name]
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map, at * words.itemsize))

    def close(self) -> None:
        """Forgets the mapping; it goes away with the last view of it."""
        self._fields = {}


class Control(Page):
    """The control page of one process image."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "control", MAGIC_CONTROL, CONTROL_FIELDS)
        if (version := self.get("version")) != VERSION:
            raise SpoolError(
                f"{folder.name}/control has version {version}, this heapledger reads {VERSION}",
                hint="use the heapledger that made this spool",
            )


@dataclass(slots=True)
class NodeBatch:
    """New nodes of the trie, an array of 64-bit integers each; parent < node; module: the number of the M line + 1."""

    node: array[int]
    parent: array[int]
    address: array[int]
    module: array[int]
    highest_outside: int  # of the addresses that lie in no module

    @property
    def first(self) -> int:
        return self.node[0]


class Nodes:
    """Reads the trie of call stacks, from stacks.0, stacks.1, ..."""

    def __init__(self, folder: Path, taken: int = 1) -> None:
        self.folder = folder
        self.taken = taken
        self._segments: dict[int, mmap.mmap] = {}

    def read(self, handed_out: int, *, final: bool = False) -> NodeBatch | None:
        """Nodes up to `handed_out` (control.nodes) that are written; stops at a gap unless `final`.

        At most one segment at a time.
        """
        if self.taken >= handed_out:
            return None
        number, offset = divmod(self.taken, SEGMENT_NODES)
        segment = self._segment(number)
        if segment is None:
            return None
        high = min(SEGMENT_NODES, offset + handed_out - self.taken)
        batch = NodeBatch(*_nodes.columns(segment, offset, high, self.taken, final))
        if not batch.node:
            return None
        self.taken += len(batch.node)
        if self.taken % SEGMENT_NODES == 0:
            self._segments.pop(number, None)
        return batch

    def _segment(self, number: int) -> mmap.mmap | None:
        if number not in self._segments:
            path = self.folder / f"stacks.{number}"
            try:
                with open(path, "rb") as file:
                    self._segments[number] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            except (OSError, ValueError):
                return None
        return self._segments[number]


def unescape(text: str) -> str:
    """Undoes the log's \\t, \\n and \\\\."""
    if "\\" not in text:
        return text
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\t", "\t").replace("\\n", "\n") for part in parts)


class Log:
    """New whole lines of the log, split into fields."""

    MAX_LINE = 1 << 20

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> list[list[str]]:
        try:
            if self.path.stat().st_size <= self._offset:
                return []
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                data = file.read(16 << 20)
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        if end == 0:
            if len(data) > self.MAX_LINE:
                self._offset += len(data)
            return []
        self._offset += end
        lines = data[:end].decode(errors="surrogateescape").split("\n")[:-1]
        return [[unescape(field) for field in line.split("\t")] for line in lines if line]
