"""glibc's mtrace log becomes a trace file.

    = Start
    @ ./app:(main+1d)[0x1186] + 0x55d0c0de02a0 0x18         malloc, calloc, memalign: address, size
    @ ./app:[0x11a0] < 0x55d0c0de02a0                       realloc of this block ...
    @ ./app:[0x11a0] > 0x55d0c0de0700 0x30                  ... which became this one
    @ ./app:(f+9)[0x1199] ! 0x55d0c0de0700 0xfffffffffff    realloc failed; the block stays
    - 0x55d0c0de0700                                        free; the caller may be missing on any line
    = End

The offset in a function is written with or without 0x (glibc 2.36: without). The number in brackets is the caller's
offset in its object (glibc 2.34 and newer) or its address (older ones, or no object); it becomes the address of a
one-frame stack, in a module with bias 0, whose function is the log's, or what `tracer.mtrace_symbols` finds in the
object. A failed malloc has `(nil)`; a size of 0 is written `0`.

What a log does not have, the trace does not have either: all times are 0, `word` is 0, there are no threads and no free
of a null pointer; `seq` is a running number. Several `= Start` lines stay one process: that is how the `mtrace` script
reads them. A `<` without its `>` is a FREE and a `>` without its `<` a MALLOC, also as the script sees it.

Speed comes from one regular expression over hundreds of KiB at a time; only portions with a line that it does not know
are looked at line by line.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from heapledger.errors import InputError, MtraceError
from heapledger.store.events import Events, Kind
from heapledger.store.writer import TraceWriter
from heapledger.tracer import mtrace_symbols
from heapledger.tracer.symbols.demangle import demangle

#: Small enough that a portion and its matches stay in the processor's cache: 256 KiB is twice as fast as 4 MiB.
CHUNK_BYTES = 256 << 10
#: A longer line is no line of a log: it is counted as unknown and not kept in memory.
MAX_LINE_BYTES = 16 << 10
#: Unknown lines whose numbers are told; the rest is counted.
SHOWN = 20

_NUMBER = rb"0(?:x[0-9a-fA-F]{1,16})?"
#: Groups: caller, operation, address, size, mark. `(nil)` has been replaced by 0x0 before.
_LINE = re.compile(
    rb"^(?:(?:@ (\S+|[^\n]{1,4096}?) )?([-<]|[+>!](?= \S+ 0)) (" + _NUMBER + rb")(?: (" + _NUMBER + rb"))?"
    rb"|= (Start|End))[ \t\r]*$",
    re.M,
)
_CALLER = re.compile(
    r"(?:(?P<module>.*):)?(?:\((?P<function>.*?)(?:[-+](?:0x)?[0-9a-f]+)?\))?\[0x(?P<address>[0-9a-f]{1,16})\]"
)
_Match = tuple[bytes, bytes, bytes, bytes, bytes]
Progress = Callable[[int], None]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Hundreds of thousands of tuples of bytes are no cycles; searching them for some takes longer than parsing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(slots=True)
class Imported:
    """What became of a log."""

    lines: int = 0
    events: int = 0
    starts: int = 0
    ended: bool = False  #: the last mark was `= End`
    cut: bool = False  #: the last line has no end of line
    callers: int = 0  #: distinct callers
    resolved: int = 0  #: those of them that have a function and line from the object's file
    unknown: int = 0
    unknown_lines: list[int] = field(default_factory=list)  #: numbers of the first SHOWN, from 1

    def notes(self) -> list[str]:
        """What a reader of the trace should know, a line each."""
        notes = ["imported from an mtrace log: no times, no threads, stacks of one frame"]
        if self.resolved:
            notes.append(f"{self.resolved} of {self.callers} callers were looked up in the files as they are now")
        if self.unknown:
            shown = ", ".join(map(str, self.unknown_lines)) + (" ..." if self.unknown > len(self.unknown_lines) else "")
            notes.append(f"{self.unknown} of {self.lines} lines were not understood and left out: line {shown}")
        if self.starts != 1:
            notes.append(f"the log has {self.starts} start marks; it was read as one process")
        if self.cut:
            notes.append("the log's last line is cut off; it was left out")
        elif not self.ended:
            notes.append("the log has no end mark: what was freed later is not in it")
        return notes


def import_log(
    log: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    symbols: bool = True,
    progress: Progress | None = None,
) -> Imported:
    """Writes the trace file `output` from an mtrace log. `progress` is told the bytes read, now and then.

    With `symbols`, callers are looked up in the objects that the log names, if they are still there.

    MtraceError if the file is not such a log at all; then no output is left behind.
    """
    name = str(log)
    try:
        with open(log, "rb") as file:
            return _import(file, name, Path(output), symbols, progress)
    except FileNotFoundError:
        raise InputError(f"there is no file {name!r}") from None
    except IsADirectoryError:
        raise InputError(f"{name!r} is a folder, not an mtrace log") from None
    except OSError as error:
        raise InputError(f"cannot read {name!r}: {error.strerror}") from error


def _import(file: BinaryIO, name: str, output: Path, symbols: bool, progress: Progress | None) -> Imported:
    parser = Parser(file, progress)
    portions = parser.portions()
    first = next(portions, None)
    if first is None and not parser.result.starts:
        raise MtraceError(f"{name!r} is empty" if not parser.result.lines else _not_a_log(name))
    writer = TraceWriter(output, source="mtrace", command=[os.path.basename(name)], cwd=os.getcwd())
    try:
        process = writer.add_process(start="import", end="", page_size=4096)
        while first is not None:
            _write_callers(writer, process, parser)
            writer.append_events(process, first)
            first = next(portions, None)
        parser.result.callers = len(parser.callers) - 1
        if symbols and parser.addresses:
            parser.result.resolved = mtrace_symbols.resolve(writer, parser.modules, parser.addresses)
        writer.update_process(process, notes=parser.result.notes())
        writer.close()
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to be told
            writer.close()
        output.unlink(missing_ok=True)
        raise
    return parser.result


def _not_a_log(name: str) -> str:
    return f"{name!r} is not a log of glibc's mtrace: no line of it was understood"


class Parser:
    """Reads a log once, in portions; `callers` and `result` grow on the way."""

    def __init__(self, file: BinaryIO, progress: Progress | None = None) -> None:
        self.result = Imported()
        self.callers: dict[bytes, int] = {b"": 0}  #: text of a caller → its stack id
        self.new_callers: list[bytes] = []
        self.modules: dict[str, int] = {}  #: path of an object → its id in the trace
        self.addresses: dict[str, dict[int, str]] = {}  #: path of an object → its callers: address → function
        self._file = file
        self._progress = progress
        self._seq = 1

    def portions(self) -> Iterator[Events]:
        """The events of the log, in order."""
        for text in self._texts():
            with _no_garbage_collection():
                events = self._parse(text)
            if len(events):
                self.result.events += len(events)
                yield events

    def _parse(self, text: bytes) -> Events:
        matches = _LINE.findall(text)
        lines = text.count(b"\n")
        if len(matches) != lines:
            matches = self._line_by_line(text)
        self.result.lines += lines
        if b"= " in text:
            matches = self._take_marks(matches)
        return self._events(matches)

    def _texts(self) -> Iterator[bytes]:
        """The file in portions of whole lines, each ended by a newline; a `<` is never the last of one."""
        rest, skipping, total = b"", False, 0
        while data := self._file.read(CHUNK_BYTES):
            total += len(data)
            if self._progress:
                self._progress(total)
            if skipping:  # in the middle of an endless line
                at = data.find(b"\n")
                data, skipping = (data[at + 1 :], False) if at >= 0 else (b"", True)
            data = (rest + data).replace(b"(nil)", b"0x0")
            end = data.rfind(b"\n") + 1
            start_of_last = data.rfind(b"\n", 0, end - 1) + 1 if end else 0
            if b" < " in data[start_of_last:end] or data.startswith(b"< ", start_of_last):
                end = start_of_last
            text, rest = data[:end], data[end:]
            partial = rest[rest.rfind(b"\n") + 1 :]
            if len(partial) > MAX_LINE_BYTES:
                text += rest[: len(rest) - len(partial)]
                self._unknown(self.result.lines + text.count(b"\n") + 1)
                # The endless line still counts as one: it is replaced by an empty one.
                text, rest, skipping = text + b"\n", b"", True
            if text:
                yield text
        yield from self._last(rest)

    def _last(self, rest: bytes) -> Iterator[bytes]:
        """What is left at the end of the file: perhaps a `<` line, perhaps a line that is cut off."""
        whole, _, cut = rest.rpartition(b"\n")
        if cut.rstrip() in (b"= End", b"= Start"):
            whole, cut = rest, b""
        if whole:
            yield whole + b"\n"
        if cut:
            self.result.lines += 1
            self.result.cut = True

    def _unknown(self, line: int) -> None:
        self.result.unknown += 1
        if len(self.result.unknown_lines) < SHOWN:
            self.result.unknown_lines.append(line)

    def _line_by_line(self, text: bytes) -> list[_Match]:
        """The lines that are understood; the others are counted. Empty lines are nothing."""
        found: list[_Match] = []
        for number, line in enumerate(text.split(b"\n")[:-1], self.result.lines + 1):
            match = _LINE.match(line) if len(line) <= MAX_LINE_BYTES else None
            if match:
                caller, operation, address, size, mark = match.groups(b"")
                found.append((caller, operation, address, size, mark))
            elif line.strip():
                self._unknown(number)
        return found

    def _take_marks(self, matches: list[_Match]) -> list[_Match]:
        """Counts `= Start` and `= End`; what is left are operations."""
        marks = [match[4] for match in matches if match[4]]
        if marks:
            self.result.starts += marks.count(b"Start")
            self.result.ended = marks[-1] == b"End"
        return [match for match in matches if match[1]]

    def _events(self, matches: list[_Match]) -> Events:
        if not matches:
            return Events.empty()
        callers, operations, addresses, sizes, _ = zip(*matches, strict=True)
        self._learn(callers)
        return self._assemble(
            np.frombuffer(b"".join(operations), np.uint8),
            np.array(list(map(int, addresses, repeat(16))), np.uint64),
            np.array([int(size, 16) if size else 0 for size in sizes], np.uint64),
            np.array([self.callers[caller] for caller in callers], np.uint32),
        )

    def _learn(self, callers: tuple[bytes, ...]) -> None:
        for caller in Counter(callers):
            if caller not in self.callers:
                self.callers[caller] = len(self.callers)
                self.new_callers.append(caller)

    def _assemble(
        self,
        operation: npt.NDArray[np.uint8],
        address: npt.NDArray[np.uint64],
        size: npt.NDArray[np.uint64],
        stack: npt.NDArray[np.uint32],
    ) -> Events:
        """Operations become events: a `<` and the `>` right behind it are one."""
        begins, ends = operation == ord("<"), operation == ord(">")
        paired_end = np.zeros(len(operation), np.bool_)
        paired_end[1:] = begins[:-1] & ends[1:]
        paired_begin = np.zeros(len(operation), np.bool_)
        paired_begin[:-1] = paired_end[1:]
        failed = operation == ord("!")

        kind = np.full(len(operation), Kind.MALLOC, np.uint8)
        kind[(operation == ord("-")) | begins] = Kind.FREE
        kind[paired_end | failed] = Kind.REALLOC
        old = np.zeros(len(operation), np.uint64)
        old[paired_end] = address[paired_begin]
        old[failed] = address[failed]
        result = np.where(failed, np.uint64(0), address)
        size = np.where(kind == Kind.FREE, np.uint64(0), size)

        keep = ~paired_begin
        events = Events.empty(int(np.count_nonzero(keep)))
        events.kind, events.addr, events.size = kind[keep], result[keep], size[keep]
        events.arg, events.stack = old[keep], stack[keep]
        events.seq = self._seq + 2 * np.arange(len(events), dtype=np.uint64)
        events.seq_exit = events.seq + np.uint64(1)
        self._seq += 2 * len(events)
        return events


def _write_callers(writer: TraceWriter, process: int, parser: Parser) -> None:
    """Stacks, modules and symbols for the callers that are new since the last time."""
    rows, parser.new_callers = parser.new_callers, []
    if not rows:
        return
    ids = np.array([parser.callers[caller] for caller in rows])
    parsed = [_parse_caller(caller) for caller in rows]
    # A caller that is not an address in an object has its text as function, in a nameless module of its own.
    keys = [path if address else f"?{stack}" for stack, (path, _, address) in zip(ids.tolist(), parsed, strict=True)]
    for path, function, address in parsed:
        if path and address:
            parser.addresses.setdefault(path, {})[address] = function
    _add_modules(writer, process, parser, keys)
    addresses = np.array([address for _, _, address in parsed], np.uint64)
    writer.add_nodes(process, ids, np.zeros(len(ids)), addresses, [parser.modules[key] for key in keys])
    writer.add_frames(
        {"module_id": parser.modules[key], "offset": address, "depth": 0, "function": function}
        for key, (_, function, address) in zip(keys, parsed, strict=True)
        if function
    )


def _add_modules(writer: TraceWriter, process: int, parser: Parser, keys: list[str]) -> None:
    """Gives each key that has none a module: a path, or `?` and a number for a nameless one."""
    new = [key for key in dict.fromkeys(keys) if key not in parser.modules]
    first = len(parser.modules)
    rows = [{"number": first + i, "path": "" if key.startswith("?") else key} for i, key in enumerate(new)]
    ids = writer.add_modules(process, rows)
    parser.modules.update({key: ids[first + i] for i, key in enumerate(new)})


def _parse_caller(text: bytes) -> tuple[str, str, int]:
    """(path of the object, function, address): `./a:(f+0x1)[0x10]` → ("./a", "f", 0x10). Address 0: just a text."""
    caller = text.decode("utf-8", "backslashreplace")
    match = _CALLER.fullmatch(caller)
    if not match:
        return "", caller, 0
    return match["module"] or "", demangle(match["function"] or ""), int(match["address"], 16)
