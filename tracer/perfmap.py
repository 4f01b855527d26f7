"""Names for code that no file holds: the perf map that a JIT compiler writes about what it has made.

`/tmp/perf-PID.map`, one line a piece of code: start, bytes (hex, Java puts 0x before them), name to the end of line.

    7fdabc007040 3bc JS:*outer file:///app/shop.mjs:3:15        node --perf-basic-prof
    7f3a5c1d0010 b py::Shop.sell:/app/shop.py                   python -X perf (3.12 and later)
    0x00007efe25420be0 0x16a0 int Hello.work(int)               java -XX:+DumpPerfMapAtExit, jcmd PID Compiler.perfmap

Return addresses outside all objects belong to the module "[JIT]" of their process (bias 0), under which the names that
are found become rows of the table `frame`, as those of any other code.

The file grows while the program runs, may be complete only when the program has ended (node holds back 2 MB), and may
be gone with the program's /tmp then. So it is opened when the first such address is seen and again at each later look,
and read when the program has ended; before an exec at once, as the next image writes to the same name.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from heapledger.store.ddl import JIT

if TYPE_CHECKING:
    from heapledger.store.writer import FrameRow
    from heapledger.tracer.image import Image

#: What a node's module is when it is none: the row's number in its process, and that row.
NUMBER = -1
MODULE: dict[str, Any] = {
    "number": NUMBER, "path": JIT, "build_id": "", "bias": 0, "low": 0, "high": 0, "load_seq": 0, "unload_seq": 0,
}  # fmt: skip
#: Nodes with these addresses say that frames were cut, or lost.
MARKS = 2
#: Of a larger file only the end is read: later entries are those that hold.
LIMIT_BYTES = 64 << 20
#: Longer lines are left out, longer names cut.
LIMIT_LINE, LIMIT_NAME = 64 << 10, 2_000
#: Fork children inherit code; so many generations are asked for its names.
LIMIT_ANCESTORS = 16
_CHUNK = 1 << 20
_LINE = re.compile(rb"^(?:0[xX])?([0-9a-fA-F]{1,16}) (?:0[xX])?([0-9a-fA-F]{1,16}) ([^\n]*)\n", re.MULTILINE)
#: V8: kind, tier, name, place. A path may have blanks in it: it begins with a slash or a scheme.
_V8 = re.compile(
    r"(?:[A-Z][A-Za-z]*-)?(JS|LazyCompile|Function|Script|Eval):[~*^+'?-]?(.*?) ((?:/|[a-z]+:)[^\n]*|\S*):(\d+):\d+\Z"
)
_V8_NAMELESS = {"Script": "(script)", "Eval": "(eval)"}

Meaning = tuple[str, str | None, int | None]  # function, file, line


def meaning(name: str) -> Meaning:
    """Function, file and line that an entry's name carries; other names stay whole.

    >>> meaning("py::Shop.sell:/app/shop.py")
    ('Shop.sell', '/app/shop.py', None)
    >>> meaning("JS:*outer file:///app/shop.mjs:3:15")
    ('outer', '/app/shop.mjs', 3)
    >>> meaning("int Hello.work(int)")
    ('int Hello.work(int)', None, None)
    """
    name = name.strip()
    if name.startswith("py::"):
        function, _, file = name[4:].partition(":")
        return function or name, file or None, None
    found = _V8.match(name)
    if found is None:
        return name, None, None
    kind, function, file, line = found.groups()
    number = int(line) if len(line) < 10 else 0
    return function or _V8_NAMELESS.get(kind, "(anonymous)"), file.removeprefix("file://") or None, number or None


class Reading:
    """The names that perf maps have for the `wanted` addresses: the last entry that holds an address wins.

    Files are read from their ends, and no further than until every address has its name. Cost: about 0.5 µs a line;
    memory a few MB whatever the file.
    """

    def __init__(self, wanted: Iterable[int]) -> None:
        # A call's return address may lie just behind the end of its function: the call itself is asked for.
        self.nameless = sorted({address - 1 for address in wanted if address > MARKS})
        self.names: dict[int, bytes] = {}
        self.unreadable = 0  # lines
        self.skipped_bytes = 0

    def read(self, fd: int) -> None:
        """One file, which may be growing. What has a name already keeps it."""
        at = os.fstat(fd).st_size
        low = max(0, at - LIMIT_BYTES)
        rest = b""
        torn = True  # what follows the last end of line was not written to its end: half a name is none
        while at > low and self.nameless:
            start = max(low, at - _CHUNK)
            lines = os.pread(fd, at - start, start)
            if len(lines) < at - start:
                return  # it was cut short meanwhile
            at = start
            lines = lines[: lines.rfind(b"\n") + 1] if torn else lines + rest
            torn = not lines
            cut = lines.find(b"\n") + 1 if at else 0  # the beginning of the first line is still to come
            rest = lines[:cut]
            self._lines(lines[cut:])
            if len(rest) > LIMIT_LINE:
                rest, torn = b"", True
                self.unreadable += 1
        self.skipped_bytes += low if self.nameless else 0

    def _lines(self, lines: bytes) -> None:
        calls, names = self.nameless, self.names
        entries = _LINE.findall(lines)
        self.unreadable += lines.count(b"\n") - len(entries)
        for start_hex, length_hex, name in reversed(entries):
            start = int(start_hex, 16)
            at = bisect_left(calls, start)
            if at < len(calls) and calls[at] - start < (length := int(length_hex, 16)):
                end = bisect_left(calls, start + length)
                names.update(dict.fromkeys(calls[at:end], name))
                del calls[at:end]

    def meanings(self) -> Iterator[tuple[int, Meaning]]:
        """(address as given, what is there) for each that was found."""
        for call, name in self.names.items():
            text = name[:LIMIT_NAME].decode("utf-8", "backslashreplace")
            yield call + 1, meaning(text + "…" if len(name) > LIMIT_NAME else text)


class PerfMap:
    """The perf map of one process image, and those of the processes it was forked from."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._met = False  # an address outside all objects was seen
        self._files: dict[int, int] = {}  # generation (0: its own, 1: the parent's ...) → file descriptor
        self._looked = False
        self._shares_tmp = True  # its /tmp is ours, as far as we know
        self._temporary = ""  # its $TMPDIR
        self._begun_ns = _begun_ns(image)
        image.addresses.origins[image.name] = (_parent_name(image), self._begun_ns)

    def meet(self) -> bool:
        """An address outside all objects was seen. Returns whether it is the first one."""
        first = not self._met
        self._met = True
        if first:
            self.look()
        return first

    def look(self) -> None:
        """Opens what is there now, while the process can be looked at: later it may be gone, or another's."""
        if not self._met or not self._image.addresses.wanted:
            return
        for generation, (pid, begun_ns) in enumerate(self._family()):
            for path in self._candidates(pid):
                if (fd := _open(path, begun_ns, self._owners())) is not None:
                    if generation in self._files:
                        os.close(self._files[generation])
                    self._files[generation] = fd
                    break

    def hold(self, is_exec: bool) -> None:
        """The process waits at its end, or for an exec: then the next image writes to the same file."""
        self.look()
        if is_exec:
            self.write_frames()

    def write_frames(self) -> None:
        """Reads the maps and writes the frames of all addresses seen so far. What was not as it should be is noted."""
        image = self._image
        if not self._met or not image.addresses.wanted:
            return
        self.look()
        reading = Reading(image.addresses.of_module(int(image.module_ids[0])))
        for _, fd in sorted(self._files.items()):
            try:
                reading.read(fd)
            except OSError as error:
                image.notes.append(f"the perf map of the process could not be read: {error.strerror}")
        image.writer.add_frame_rows(_rows(int(image.module_ids[0]), reading.meanings()))
        if reading.unreadable:
            image.notes.append(f"{reading.unreadable} lines of the perf map are not understood")
        if reading.skipped_bytes:
            image.notes.append(f"the perf map is too large: its first {reading.skipped_bytes} bytes were not read")

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files = {}

    # ---- where it may be

    def _family(self) -> Iterator[tuple[int, int]]:
        """(pid as the process itself knows it, when it began): the process, then those it was forked from."""
        yield self._image.control.get("pid"), self._begun_ns
        origins = self._image.addresses.origins
        name = origins[self._image.name][0]
        for _ in range(LIMIT_ANCESTORS):
            if name not in origins:
                return
            pid = int(name.partition(".")[0])
            name, begun_ns = origins[name]
            yield pid, begun_ns

    def _candidates(self, pid: int) -> Sequence[str]:
        name = f"perf-{pid}.map"
        root = f"/proc/{self._image.pid}/root" if self._image.pid else ""
        if root and self._learn(root):
            folders = [f"{root}/tmp", f"{root}{self._temporary}"]
        elif self._shares_tmp and not self._image.foreign:
            folders = ["/tmp", self._temporary]
        else:
            return []
        return [f"{folder}/{name}" for folder in dict.fromkeys(folders) if folder not in ("", root)]

    def _learn(self, root: str) -> bool:
        """What can be learnt of the process only while it lives. Returns whether it does."""
        try:
            own, ours = os.stat(f"{root}/tmp"), os.stat("/tmp")
        except OSError:
            return False
        self._shares_tmp = (own.st_dev, own.st_ino) == (ours.st_dev, ours.st_ino)
        if not self._looked:
            self._looked = True
            with contextlib.suppress(OSError), open(f"/proc/{self._image.pid}/environ", "rb") as file:
                for variable in file.read(1 << 20).split(b"\0"):
                    if variable.startswith(b"TMPDIR=/"):
                        self._temporary = os.path.normpath(os.fsdecode(variable[7:]))
        return True

    def _owners(self) -> set[int]:
        """Whose file it may be: in a /tmp for all, anybody can put one there."""
        owners = {0, os.geteuid()}
        with contextlib.suppress(OSError):
            owners.add(self._image.folder.stat().st_uid)
        return owners


def _open(path: str, begun_ns: int, owners: set[int]) -> int | None:
    """The file, if it is a plain one of the right user, not older than the process (whose pid may be used again)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return None
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_uid in owners and found.st_mtime_ns >= begun_ns and found.st_size:
        return fd
    os.close(fd)
    return None


def _begun_ns(image: Image) -> int:
    """When the image began, on the clock of its files; 0 if that cannot be told."""
    with contextlib.suppress(OSError):
        return (image.folder / "maps.start").stat().st_mtime_ns
    return 0


def _parent_name(image: Image) -> str:
    """The folder's name of the image it was forked from; "" for others."""
    from heapledger.tracer.spool import NO_PARENT

    parent = image.control.get("parent_image")
    return "" if parent == NO_PARENT else f"{image.control.get('ppid')}.{parent}"


def _rows(module_id: int, found: Iterable[tuple[int, Meaning]]) -> Iterator[FrameRow]:
    for address, (function, file, line) in found:
        yield module_id, address, 0, function, file, line
